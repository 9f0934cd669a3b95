"""The folder of an HTML report: the page and the data of its figures. Other files stay as they are.

TensorFlow is not imported, so that a folder is refused before the work for it is done.
"""

import os
import re
from pathlib import Path

from keras_mixer.errors import InputError, join_names, path_errors
from keras_mixer.files import nearest_existing, write_atomically

INDEX = "index.html"
GENERATOR = "keras_mixer report"  # in a meta element, by which a page is known as ours
_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
_HEAD = 4096  # bytes in which the mark is
_LINK = re.compile(rb'href="([a-z0-9-]+\.csv)"')


def check_page_folder(folder):
    """Raises an `InputError` if a page cannot be written to a folder, or might replace a user's."""
    folder = Path(folder)
    with path_errors(f"--html={folder}"):
        if problem := _problem(folder):
            raise InputError(f"--html={folder}: {problem}; give a new or an empty folder")


def _problem(folder):
    """Returns why a folder cannot be written to, or None."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        return f"{existing} is no folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write in {existing}"
    others = [] if existing != folder else _visible(folder)
    if others and not _is_ours(folder / INDEX):
        return f"it holds other files and no page of ours: {join_names(others)}"
    return None


def _visible(folder):
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if not name.startswith(".")]


def _is_ours(index):
    return index.is_file() and _MARK in index.read_bytes()[:_HEAD]


def write_page_folder(folder, files):
    """Writes a page and its data, after `check_page_folder`; removes the data of the page before.

    Args:
        folder: Path; created if needed.
        files: dict from name to bytes, with `INDEX`.
    """
    folder = Path(folder)
    index = folder / INDEX
    before = set(_LINK.findall(index.read_bytes())) if index.exists() else set()
    folder.mkdir(parents=True, exist_ok=True)
    # The page first: by it, a later report knows the folder as ours, whenever this one is killed.
    for name in sorted(files, key=lambda name: name != INDEX):
        write_atomically(folder / name, files[name])
    for name in sorted(map(os.fsdecode, before) - files.keys()):
        (folder / name).unlink(missing_ok=True)
