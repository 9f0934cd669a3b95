"""Atomic and durable writing of files, sealed JSON files, the cache folder, and file locks.

A process that is killed leaves either the old or the new content of a file.
"""

import contextlib
import csv
import errno
import fnmatch
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from pathlib import Path

import filelock
import numpy as np
import safetensors.numpy

from keras_mixer.errors import path_errors


def pack(arrays, metadata=None):
    """Returns arrays as the bytes of a .safetensors file.

    Args:
        arrays: dict from name to array.
        metadata: dict from string to string.
    """
    # safetensors 0.8 ignores strides: a transposed array would be saved with other values.
    row_major = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(row_major, metadata)


def write_atomically(path, content):
    """Writes bytes to a temporary file, flushes it to disk, and renames it to `path`, a `Path`."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_output(path, content):
    """Writes bytes to the path of an `--output`.

    Files are replaced atomically, behind symbolic links; a pipe or a device is written to.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        Path(path).write_bytes(content)
    else:
        write_atomically(Path(os.path.realpath(path)), content)


def read_regular(path, most):
    """Reads a regular file of at most `most` bytes; never blocks on a pipe or a device.

    Args:
        path: `Path`.
        most: int.

    Returns:
        bytes.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a regular file, or larger.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    if found.st_size > most:
        raise ValueError(f"{path.name} has {found.st_size:,} bytes, expected at most {most:,}")
    return path.read_bytes()


def remove(path):
    """Removes a file, a link, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# === Sealed JSON files: with the sha256 of their values ===

SEAL = "sha256"  # key of the digest
_MOST_SEALED = 1_000_000  # bytes of a file that `read_sealed` reads


def seal(values):
    """Returns the sha256 of a dict of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_sealed(path, values):
    """Writes a dict of JSON values and their sha256 to a JSON file, atomically."""
    content = json.dumps(values | {SEAL: seal(values)}, indent=2)
    write_atomically(path, content.encode() + b"\n")


def unseal(values):
    """Returns the values that `write_sealed` wrote, parsed from JSON, without their sha256.

    Raises:
        ValueError: If they do not match it.
    """
    others = {name: value for name, value in values.items() if name != SEAL}
    if values.get(SEAL) != seal(others):
        raise ValueError("its contents do not match its sha256")
    return others


def read_sealed(path):
    """Reads the values of a file that `write_sealed` wrote; None if it is missing or damaged."""
    try:
        return unseal(json.loads(read_regular(path, _MOST_SEALED)))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


# === Files and folders ===


def nearest_existing(folder):
    """Returns the folder, a `Path`, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def listed(folder, pattern="*"):
    """Returns the sorted paths in a folder, a `Path`, whose names match; [] if it does not exist.

    `Path.glob` takes a folder that cannot be listed for an empty one.

    Raises:
        InputError: If it cannot be listed.
    """
    names = []
    with (
        path_errors(f"{folder} cannot be listed now, nothing was changed"),
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
    ):
        names = os.listdir(folder)
    return sorted(folder / name for name in fnmatch.filter(names, pattern))


def write_durably(path, content):
    """Writes bytes to a new file, never through a link, and flushes them to disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_tree(path):
    """Flushes a folder to disk, with every file and folder in it."""
    for parent, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        flush_folder(parent)


_FORMULA = tuple("=+-@\t\n")  # of which each starts one in some spreadsheet


def rows_as_csv(rows, columns=()):
    """Returns a list of dicts with the same keys as a CSV table, as text.

    An apostrophe goes before text that a spreadsheet would run as a formula.

    Args:
        rows: list of dicts.
        columns: Header of a table without rows.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else columns), lineterminator="\n")
    writer.writerow({name: _no_formula(name) for name in writer.fieldnames})
    writer.writerows({name: _no_formula(cell) for name, cell in row.items()} for row in rows)
    return text.getvalue()


def _no_formula(cell):
    """Returns a cell; with an apostrophe before text that starts a formula and is no number."""
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", "\\r")  # which csv does not quote, and spreadsheets end a row at
    if cell == "-" or not cell.startswith(_FORMULA):
        return cell
    with contextlib.suppress(ValueError):
        float(cell)  # as in history.csv
        return cell
    return f"'{cell}"


def flush_folder(path):
    """Flushes a folder's entries to disk, so that a rename within it survives a power cut."""
    if os.name == "nt":  # Windows cannot open folders, and flushes renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder():
    """Returns the `Path` of the cache: `KERAS_MIXER_CACHE`, or a folder in the user's cache.

    https://specifications.freedesktop.org/basedir-spec/latest/
    """
    if given := os.environ.get("KERAS_MIXER_CACHE"):
        return Path(given)
    variable, usual = ("LOCALAPPDATA", "~/AppData/Local") if os.name == "nt" else (
        "XDG_CACHE_HOME", "~/.cache",
    )  # fmt: skip
    return Path(os.environ.get(variable) or os.path.expanduser(usual)) / "keras_mixer"


# Temporary errors of the machine, which do not mean that a file is damaged.
OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


# === Locks ===

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
HELD = ".held"  # suffix of a file that is a lock


@contextlib.contextmanager
def locked(path, timeout=-1):
    """Context manager that holds a lock on a file.

    On file systems without locks, the lock is a second file with the suffix `HELD`. It is removed
    at the end; one whose process was killed on this computer is ignored.

    Args:
        path: `Path` of the file, in a folder that exists.
        timeout: float. Seconds to wait for another process; -1 to wait forever.

    Raises:
        filelock.Timeout: If another process still holds it.
        OSError: If the file cannot be created.
    """
    lock = filelock.FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # The attempt has created `path`, where a soft lock would be taken for held.
        lock = filelock.SoftFileLock(path.with_name(path.name + HELD), timeout=timeout)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def locked_in_turn(path, on_wait):
    """As `locked`, waiting forever; calls `on_wait` first if another process holds the lock."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0))
        except filelock.Timeout:
            on_wait()
            stack.enter_context(locked(path))
        yield
