"""Lists the image files in a folder: their names, sizes and modification times.

A million images take seconds, and about a hundred bytes each as NumPy arrays; no file is opened.
"""

import collections
import os
from array import array
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import logger, track

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")  # may differ from the format
# Of images that are not decoded; they are left out with a warning.
OTHER_SUFFIXES = (
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".dng"),
)
# Folders of systems and programs, besides hidden ones: thumbnails and what was deleted, never data.
_LITTER = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
MISSING, SEVERAL = -1, -2  # instead of indices, see `find_images`


class Listing(NamedTuple):
    """Image files below a folder.

    Attributes:
        directory: The folder, as bytes.
        names: bytes array `(n,)`: the files' paths relative to it.
        sizes: int64 array `(n,)`, in bytes.
        mtimes: int64 array `(n,)`: modification times, in ns since 1970.
    """

    directory: bytes
    names: np.ndarray
    sizes: np.ndarray
    mtimes: np.ndarray

    def __len__(self):
        return len(self.names)

    def take(self, indices):
        """Returns the listing of the files at these indices."""
        return Listing(self.directory, *(column[indices] for column in self[1:]))

    def paths(self):
        """Returns a bytes array `(n,)` of the files' paths."""
        return np.strings.add(os.path.join(self.directory, b""), self.names)


def list_images(directory, folders=("",)):
    """Lists the image files in folders and their subfolders, except for hidden ones.

    Args:
        directory: Path that the names are relative to.
        folders: Names of folders in it; by default, all of it is listed.

    Returns:
        (listing, folder_of): a `Listing`, sorted within each folder, and an int64 array `(n,)`,
        the index in `folders` of each file's folder.

    Raises:
        InputError: If a folder cannot be read.
    """
    directory = os.fsencode(directory)
    start = len(os.path.join(directory, b""))
    names, sizes, mtimes, folder_of = [], array("q"), array("q"), array("q")
    left_out = collections.Counter()
    entries = _entries_in(directory, folders, left_out)
    for index, entry in track(entries, "listing images"):
        size, mtime = _size_and_time(entry)
        names.append(entry.path[start:])
        sizes.append(size)
        mtimes.append(mtime)
        folder_of.append(index)
    if left_out:
        logger.warning(
            f"{os.fsdecode(directory)}: {left_out.total()} images left out "
            f"({', '.join(sorted(left_out))}); expected {', '.join(IMAGE_SUFFIXES)}"
        )
    listing = Listing(directory, np.array(names, np.bytes_), np.array(sizes), np.array(mtimes))
    order = np.lexsort((listing.names, folder_of))
    return listing.take(order), np.array(folder_of)[order]


def _entries_in(directory, folders, left_out):
    for index, folder in enumerate(folders):
        for entry in _image_entries(os.path.join(directory, os.fsencode(folder)), left_out):
            yield index, entry


def _image_entries(folder, left_out):
    """Yields the directory entries of the image files in a folder and its subfolders.

    Images of other formats are counted in `left_out`, by suffix.

    Links to files and folders count as these.
    """
    folders = [(folder, ())]  # not by recursion: there may be thousands within each other
    while folders:
        folder, links = folders.pop()
        with path_errors(os.fsdecode(folder)), os.scandir(folder) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    continue
                suffix = _suffix(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, links))
                elif entry.is_symlink() and leads_to_folder(entry):
                    folders.append((entry.path, _follow(entry, folder, links)))
                elif suffix in IMAGE_SUFFIXES:
                    yield entry
                elif suffix in OTHER_SUFFIXES:
                    left_out[suffix] += 1


def _follow(entry, folder, links):
    """Returns the folders of all links passed, with this one's; refuses a link back to any."""
    target = os.path.join(os.path.realpath(entry.path), b"")
    links = (*links, os.path.join(os.path.realpath(folder), b""))
    if any(link.startswith(target) for link in links):
        raise InputError(
            f"{os.fsdecode(entry.path)}: a link to {os.fsdecode(target)}, a folder that holds it, "
            f"so the images would never end; remove the link"
        )
    return links


def is_litter(name):
    """Returns whether a file or folder is hidden or of the system, by its name."""
    name = os.fsdecode(name)
    return name.startswith(".") or name.lower() in _LITTER


def has_images(folder):
    """Returns whether a folder or its subfolders have an image file."""
    return any(True for _ in _image_entries(os.fsencode(folder), collections.Counter()))


def count_loose(folder):
    """Returns the number of image files in a folder, without its subfolders."""
    with path_errors(folder), os.scandir(os.fsencode(folder)) as entries:
        return sum(
            has_image_suffix(e.name) and not is_litter(e.name) and not leads_to_folder(e)
            for e in entries
        )


def leads_to_folder(entry):
    """Returns whether a directory entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def has_image_suffix(name):
    """Returns whether a file name, as bytes, has the suffix of an image."""
    return _suffix(name) in IMAGE_SUFFIXES


def _suffix(name):
    return os.fsdecode(os.path.splitext(name)[1]).lower()


def _size_and_time(entry):
    try:
        status = entry.stat()
    except OSError:  # a dangling link or deleted since: `check_image_file` will report it
        return 0, 0
    return status.st_size, status.st_mtime_ns


def find_images(names, wanted, folders=("",)):
    """Finds files by names that may lack the suffix and the folder.

    Args:
        names: bytes array `(n,)` of relative paths, sorted, as in a `Listing`.
        wanted: bytes array `(m,)` of the names to find.
        folders: Names of folders to look in, in this order.

    Returns:
        int64 array `(m,)` of indices in `names`; `MISSING` where no file has that name, and
        `SEVERAL` where several files differ only in their suffix.
    """
    stems = np.array([os.path.splitext(name)[0] for name in names], np.bytes_)
    order = np.argsort(stems)
    indices = np.full(len(wanted), MISSING)
    for folder in folders if len(names) else ():
        missing = np.flatnonzero(indices == MISSING)
        sought = np.strings.add(os.path.join(os.fsencode(folder), b""), wanted[missing])
        exact = position_of(sought, names)
        first, end = (np.searchsorted(stems, sought, side, order) for side in ("left", "right"))
        by_stem = order[np.minimum(first, len(order) - 1)]
        indices[missing] = np.select(
            [exact != MISSING, end - first == 1, end - first > 1],
            [exact, by_stem, SEVERAL],
            MISSING,
        )
    return indices


def position_of(wanted, names):
    """Returns the indices of values in a sorted array, `MISSING` for those not in it."""
    if not len(names):
        return np.full(len(wanted), MISSING)
    index = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return np.where(names[index] == wanted, index, MISSING)
