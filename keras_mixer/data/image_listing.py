"""Which image files a folder holds, found in one pass: their names, sizes and times of change.

Sets of a million images are listed in seconds and kept as NumPy arrays, about a hundred bytes an
image; nothing here opens a file.
"""

import os
from array import array
from typing import NamedTuple

import numpy as np

from keras_mixer import console
from keras_mixer.errors import path_errors

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")  # the bytes may be any of these


class Listing(NamedTuple):
    """Image files below a folder.

    Attributes:
        directory: The folder, as bytes.
        names: bytes array `(n,)`: the files' paths relative to it.
        sizes: int64 array `(n,)`, in bytes.
        mtimes: int64 array `(n,)`: when the contents changed last, in ns since 1970.
    """

    directory: bytes
    names: np.ndarray
    sizes: np.ndarray
    mtimes: np.ndarray

    def __len__(self):
        return len(self.names)

    def take(self, indices):
        """Returns the listing of the files at these indices, in this order."""
        return Listing(self.directory, *(column[indices] for column in self[1:]))

    def paths(self):
        """Returns a bytes array `(n,)` of the files' paths, to be opened."""
        return np.strings.add(os.path.join(self.directory, b""), self.names)


def list_images(directory, folders=("",)):
    """Lists the image files below some folders, at any depth; hidden ones are left out.

    Args:
        directory: Path of the folder that the names are relative to.
        folders: Names of folders in it; by default, all of it is listed.

    Returns:
        (listing, places): a `Listing`, sorted within each folder, and an int64 array `(n,)` that
        says in which of the folders each file was found.

    Raises:
        InputError: If a folder cannot be read.
    """
    directory = os.fsencode(directory)
    start = len(os.path.join(directory, b""))
    names, sizes, mtimes, places = [], array("q"), array("q"), array("q")
    for place, entry in console.track(_entries_in(directory, folders), "listing images"):
        size, mtime = _size_and_time(entry)
        names.append(entry.path[start:])
        sizes.append(size)
        mtimes.append(mtime)
        places.append(place)
    listing = Listing(directory, np.array(names, np.bytes_), np.array(sizes), np.array(mtimes))
    order = np.lexsort((listing.names, places))
    return listing.take(order), np.array(places)[order]


def _entries_in(directory, folders):
    for place, folder in enumerate(folders):
        for entry in _image_entries(os.path.join(directory, os.fsencode(folder))):
            yield place, entry


def _image_entries(folder):
    """Yields the entries of the image files below a folder, which is read entry by entry.

    Links to files count as files; links to folders are not followed, for they may lead in circles.
    """
    with path_errors(os.fsdecode(folder)), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _image_entries(entry.path)
            elif has_image_suffix(entry.name) and not entry.is_dir():
                yield entry


def has_image_suffix(name):
    """Says whether a file's name, as bytes, ends as that of an image does."""
    return os.fsdecode(os.path.splitext(name)[1]).lower() in IMAGE_SUFFIXES


def _size_and_time(entry):
    try:
        status = entry.stat()
    except OSError:  # a dangling link, or gone since; `check_image_file` says what is wrong
        return 0, 0
    return status.st_size, status.st_mtime_ns


# === Finding ===

MISSING, SEVERAL = -1, -2


def find_images(names, wanted, folders=("",)):
    """Finds files by their names, which may lack the suffix and the folder.

    Args:
        names: bytes array `(n,)` of relative paths, sorted, as in a `Listing`.
        wanted: bytes array `(m,)` of what to find.
        folders: Names of folders to look in, the first ones first.

    Returns:
        int64 array `(m,)` of positions in `names`; `MISSING` where nothing has that name, and
        `SEVERAL` where it stands for several files that differ in their suffix.
    """
    stems = np.array([os.path.splitext(name)[0] for name in names], np.bytes_)
    order = np.argsort(stems)
    found = np.full(len(wanted), MISSING)
    for folder in folders if len(names) else ():
        missing = np.flatnonzero(found == MISSING)
        sought = np.strings.add(os.path.join(os.fsencode(folder), b""), wanted[missing])
        exact = position_of(sought, names)
        first, end = (np.searchsorted(stems, sought, side, order) for side in ("left", "right"))
        by_stem = order[np.minimum(first, len(order) - 1)]
        found[missing] = np.select(
            [exact != MISSING, end - first == 1, end - first > 1],
            [exact, by_stem, SEVERAL],
            MISSING,
        )
    return found


def position_of(wanted, names):
    """Returns the positions of values in a sorted array; `MISSING` of those that are not there."""
    if not len(names):
        return np.full(len(wanted), MISSING)
    place = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return np.where(names[place] == wanted, place, MISSING)
