"""Versions of an exported model: `export_dir/name/1/`, `2/` and so on, as servers expect them.

A server that watches the folder loads the version with the highest number. Every version has, in
the folder assets.extra/ that a SavedModel reserves for other files, its model.json and the sha256
of the weights it was exported from. TensorFlow is not imported.
"""

import contextlib
import os
import re
import socket
import tempfile
from pathlib import Path

from keras_mixer.errors import InputError, join_names
from keras_mixer.files import nearest_existing, remove, write_durably
from keras_mixer.weights import model_folder

EXTRA, SOURCE = "assets.extra", "weights.sha256"


def check_target(export_dir, name, spec):
    """Checks, before the export, that its folder can be written and serves the same classes.

    Args:
        export_dir: Folder for exports.
        name: Name of the model.
        spec: `ModelSpec`.

    Raises:
        InputError: If the folder cannot be written, or has versions of other classes.
    """
    home = Path(export_dir) / name
    _check_writable(home, f"--export_dir={export_dir}")
    numbers = version_numbers(home)
    if not numbers or not model_folder.is_model_folder(newest := home / str(numbers[-1]) / EXTRA):
        return
    served = model_folder.read_spec(newest).names
    if served != spec.names:
        raise InputError(
            f"--name={name}: {newest.parent} serves the classes {_first(served)}, this model "
            f"{_first(spec.names)}; a server would take it for an upgrade, so give another --name"
        )


def _check_writable(folder, given):
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        raise InputError(f"{given}: cannot write to {existing}: {error.strerror}") from error


def _first(names):
    return f"{join_names(names[:3])}{', …' * (len(names) > 3)}"


def write_source(version, sha256):
    """Writes the `model_folder.digest` of the exported weights into a version, a `Path`."""
    write_durably(version / EXTRA / SOURCE, f"{sha256}\n".encode())


def published(home, sha256):
    """Returns the newest version in a folder if its weights have this digest, else None.

    So a job that was killed right after its export does not export again.
    """
    for number in version_numbers(home)[-1:]:
        source = home / str(number) / EXTRA / SOURCE
        if source.is_file() and source.read_text("ascii", "replace").strip() == sha256:
            return home / str(number)
    return None


def make_unfinished(home):
    """Creates a folder for an unfinished version, and removes those of killed processes.

    Args:
        home: `Path` of the versions.

    Returns:
        Path of the folder. Its name has the computer and the process it belongs to.
    """
    computer = re.sub(r"\W", "-", socket.gethostname())
    # On Windows, `os.kill` would end the process.
    for left in home.glob(f".export-{computer}.*.*") if os.name != "nt" else ():
        with contextlib.suppress(ValueError, PermissionError):  # PermissionError: another user's
            try:
                os.kill(int(left.name.split(".")[-2]), 0)
            except ProcessLookupError:
                remove(left)
    return tempfile.mkdtemp(prefix=f".export-{computer}.{os.getpid()}.", dir=home)


def version_numbers(home):
    """Returns the sorted numbers of the versions in a folder, [] if it does not exist."""
    entries = home.iterdir() if home.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())
