"""Refuses unreadable images before a run, and remembers which files were found sound.

The memory is a file in the user's cache folder for each folder of images. It holds the size and
the time of change of every sound file, so the next start opens only files that are new or differ
in one of them. It can be deleted at any time.
"""

import hashlib
import io
import os
import pkgutil

import numpy as np
import PIL

from keras_mixer import console
from keras_mixer.data import images
from keras_mixer.data.listing import MISSING, Listing, position_of
from keras_mixer.errors import InputError, some_of
from keras_mixer.files import cache_folder, write_atomically


def refuse_unreadable(listing):
    """Checks every file that is not known to be sound, so that bad ones are named before epoch 1.

    Args:
        listing: `Listing` of the files.

    Raises:
        InputError: Names the files that are no sound images.
    """
    memory = _memory_of(listing.directory)
    sound = _known(listing, _recalled(memory))
    paths, problems = listing.paths(), []
    unknown = np.flatnonzero(~sound)
    try:
        for index in console.track(unknown, "checking images"):
            problem = images.check_image_file(paths[index])
            sound[index] = problem is None
            if problem:
                problems.append((paths[index], problem))
    finally:  # an interrupted check goes on where it stopped
        if len(unknown):
            _remember(memory, listing.take(sound))
    refuse_files(problems)


def refuse_files(problems):
    """Raises an InputError that names the files and what is wrong with each, if there are any.

    Args:
        problems: list of (path as bytes, reason as string).
    """
    if problems:
        named = some_of([f"{os.fsdecode(path)} ({why})" for path, why in problems])
        raise InputError(
            f"--data_dir: {len(problems)} unreadable image{'s' * (len(problems) > 1)}, "
            f"mend or remove: {named}"
        )


# === Memory ===


def _memory_of(directory):
    """Where the verdicts on a folder's files are kept.

    The name holds the place of the folder and what the verdicts rest on, our checks and Pillow's:
    where either has changed, nothing is known.
    """
    digest = hashlib.sha256(os.path.abspath(directory))
    digest.update(pkgutil.get_data("keras_mixer.data", "images.py") + PIL.__version__.encode())
    return cache_folder() / "sound_images" / f"{digest.hexdigest()[:32]}.npz"


def _recalled(memory):
    """Returns (names, sizes, mtimes) of the files that were sound; empty where none are known."""
    nothing = np.empty(0, "S1"), np.empty(0, np.int64), np.empty(0, np.int64)
    try:
        kept = np.load(io.BytesIO(memory.read_bytes()), allow_pickle=False)
        columns = tuple(kept[name] for name in Listing._fields[1:])
        if [(c.dtype.kind, c.shape) for c in columns] != [(k, (len(columns[0]),)) for k in "Sii"]:
            raise ValueError("it holds something else")
    except OSError:
        return nothing
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds on damaged files
        console.say(f"{memory}: damaged, so the images are checked again ({error})")
        return nothing
    return columns


def _known(listing, recalled):
    """Returns a bool array `(n,)`: which files were sound and have not changed since."""
    names, sizes, mtimes = recalled
    known = np.zeros(len(listing), bool)
    place = position_of(listing.names, names)
    there = np.flatnonzero(place != MISSING)
    place = place[there]
    known[there] = (sizes[place] == listing.sizes[there]) & (mtimes[place] == listing.mtimes[there])
    return known


def _remember(memory, sound):
    """Keeps the listing of the sound files, sorted by name; that it could not is no error."""
    columns = sound.take(np.argsort(sound.names))._asdict()
    del columns["directory"]
    content = io.BytesIO()
    np.savez_compressed(content, **columns)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, content.getvalue())
    except OSError as error:
        console.say(
            f"{memory.parent}: cannot remember which images are sound ({error.strerror}), so they "
            f"are checked again next time; KERAS_MIXER_CACHE=FOLDER names another place"
        )
