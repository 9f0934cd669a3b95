"""Image files in class folders."""

import os

import numpy as np

from keras_mixer.data.image_checks import refuse_unreadable
from keras_mixer.data.image_listing import IMAGE_SUFFIXES, list_images
from keras_mixer.data.splits import FileImages
from keras_mixer.errors import InputError, path_errors, some_of

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def read_folder(request):
    """Class folders, either directly in the directory or under train/, val/ and test/.

    Raises:
        InputError: If folders differ in their classes or hold no images, or files are unreadable.
    """
    directory = request.directory
    folders = _split_folders(directory)
    class_names = _class_names(folders["train"])
    for folder in folders.values():
        if differing := sorted(set(_class_names(folder)) ^ set(class_names)):
            raise InputError(
                f"--data_dir: {folder} and {folders['train']} differ in their class folders: "
                f"{', '.join(differing)}"
            )
    splits = _listed(directory, folders, class_names, request.row.channels)
    return class_names, {"all": splits["train"]} if folders["train"] == directory else splits


def _split_folders(directory):
    """Finds train/, val/ and test/; without a train/, the directory itself is what there is."""
    folders = subfolders(directory)
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            if split not in found and name in folders:
                found[split] = directory / folders[name]
    if "train" not in found and len(found) > 0:
        raise InputError(
            f"--data_dir={directory} holds {', '.join(f.name for f in found.values())} but no "
            f"train folder; expected class folders, directly or under train, val and test"
        )
    return found or {"train": directory}


def subfolders(directory):
    """Returns the names of a folder's folders, keyed by the same in small letters."""
    return {name.lower(): name for name in _folder_names(directory)}


def _folder_names(directory):
    with path_errors(directory), os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _class_names(folder):
    names = tuple(name for name in _folder_names(folder) if not name.startswith("."))
    if len(names) < 2:
        raise InputError(
            f"--data_dir: {folder} holds {len(names)} class folders; expected at least 2, "
            f"one per class, with the images inside"
        )
    if odd := [name for name in names if not _is_text(name)]:
        raise InputError(
            f"--data_dir: {folder} holds class folders whose names are not UTF-8, rename them: "
            f"{some_of(list(map(ascii, odd)))}"
        )
    return names


def _is_text(name):
    return os.fsencode(name).decode(errors="replace") == name


def _listed(directory, folders, class_names, channels):
    """Lists and checks the images of every split and class, in one pass each."""
    paths = [folder / name for folder in folders.values() for name in class_names]
    listing, found = list_images(directory, [os.path.relpath(p, directory) for p in paths])
    counts = np.bincount(found, minlength=len(paths))
    if not counts.all():
        raise InputError(
            f"--data_dir: the class folder {paths[np.argmin(counts)]} holds no image "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    refuse_unreadable(listing)
    of_split, labels = np.divmod(found, len(class_names))
    everything = FileImages(listing, labels, channels)
    return {
        name: everything.take(np.flatnonzero(of_split == position))
        for position, name in enumerate(folders)
    }
