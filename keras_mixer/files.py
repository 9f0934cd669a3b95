"""Locks, and atomic and durable writing of files: a kill leaves the old or the new content.

Devices and pipes, which cannot be replaced, are written to.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import stat
from pathlib import Path

import filelock
import numpy as np
import safetensors.numpy


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
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_through(path, content):
    """Writes bytes to what a user's path leads to, which need not be a plain file.

    Links are followed and stay. A regular or new file is replaced as by `write_atomically`.
    Anything else, such as a device or a pipe, is opened and written to; a pipe waits for a reader.

    Args:
        path: Path as string.
        content: bytes.

    Raises:
        OSError: If it cannot be written, as a device that is full.
    """
    if is_special(path):
        # Without O_CREAT, which kernels refuse for pipes in /tmp, and which could leave a file.
        with open(os.open(path, os.O_WRONLY), "wb") as file:
            file.write(content)
    else:
        write_atomically(Path(os.path.realpath(path)), content)


def read_regular(path, most):
    """Reads a regular file of at most `most` bytes; a pipe or a device is not waited for.

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
    """Removes a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


SEAL = "sha256"  # of the other values, in a sealed file
_MOST_SEALED = 1_000_000  # bytes of one that `read_sealed` reads


def write_sealed(path, values):
    """Replaces a JSON file by a dict of JSON values and their sha256."""
    content = json.dumps(values | {SEAL: seal(values)}, indent=2)
    write_atomically(path, content.encode() + b"\n")


def read_sealed(path):
    """Returns the values of a file of `write_sealed`; None if it is missing or damaged."""
    try:
        return unseal(json.loads(read_regular(path, _MOST_SEALED)))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def unseal(values):
    """Returns the values of `write_sealed`, as JSON gave them back, without their sha256.

    Raises:
        ValueError: If they do not match it.
    """
    others = {name: value for name, value in values.items() if name != SEAL}
    if values.get(SEAL) != seal(others):
        raise ValueError("its contents do not match its sha256")
    return others


def seal(values):
    """Returns the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def nearest_existing(folder):
    """Returns the folder, a `Path`, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def is_special(path):
    """Returns whether a path leads to something that is no regular file, such as a device."""
    return os.path.exists(path) and not os.path.isfile(path)


def write_durably(path, content):
    """Writes bytes to a new file and flushes them to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_tree(path):
    """Flushes every file and folder below a folder, and the folder itself."""
    for parent, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        flush_folder(parent)


def rows_as_csv(rows, columns=()):
    """Returns a list of dicts with the same keys as a CSV table, as text.

    Args:
        rows: list of dicts.
        columns: Names in the header of a table without rows.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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


# Errors that a file may not have another time.
OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


# === Locks ===

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
HELD = ".held"  # suffix of a file that is a lock


@contextlib.contextmanager
def locked(path, timeout=-1):
    """Context manager that holds a lock on a file.

    Where the file system has no locks, another file, with the suffix `HELD`, is the lock. It is
    removed in the end; that of a process of this computer that was killed does not count.

    Args:
        path: `Path` of the file, in a folder that exists.
        timeout: float. Seconds to wait for another process; -1 for any time.

    Raises:
        filelock.Timeout: If another process has it.
        OSError: If the file cannot be made.
    """
    lock = _acquired(path, timeout)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def locked_in_turn(path, on_wait):
    """As `locked`, waiting for other processes; before that, a function is called."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0))
        except filelock.Timeout:
            on_wait()
            stack.enter_context(locked(path))
        yield


def _acquired(path, timeout):
    lock = filelock.FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Not the same file, which the attempt has made: it would be in the way.
        lock = filelock.SoftFileLock(path.with_name(path.name + HELD), timeout=timeout)
        lock.acquire()
    return lock
