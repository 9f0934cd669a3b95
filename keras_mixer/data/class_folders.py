"""Reads datasets of image files in class folders."""

import os

import numpy as np

from keras_mixer.data.image_checks import find_unreadable
from keras_mixer.data.image_listing import IMAGE_SUFFIXES, leads_to_folder, list_images
from keras_mixer.data.readers import Reader
from keras_mixer.data.splits import FileImages, refuse_bad
from keras_mixer.errors import InputError, join_names, path_errors

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def _read_folder(request):
    """Reads images from class folders, directly in the directory or in train/, val/ and test/.

    Raises:
        InputError: If splits differ in classes, a class has no images, or a file is unreadable.
    """
    directory = request.directory
    folders = _find_split_folders(directory)
    class_names = _list_class_names(folders["train"], request.least_classes)
    for folder in folders.values():
        found = _list_class_names(folder, request.least_classes)
        if differing := sorted({*found} ^ {*class_names}):
            raise InputError(
                f"--data_dir: {folder} and {folders['train']} differ in their class folders: "
                f"{', '.join(differing)}"
            )
    splits = _read_splits(request, folders, class_names)
    return class_names, {"all": splits["train"]} if folders["train"] == directory else splits


def _find_split_folders(directory):
    """Returns the folder of each split; without any of them, the directory itself as `train`."""
    folders = subfolders(directory)
    by_split = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            if split not in by_split and name in folders:
                by_split[split] = directory / folders[name]
    if "train" not in by_split and len(by_split) > 0:
        raise InputError(
            f"--data_dir={directory} holds {', '.join(f.name for f in by_split.values())} but no "
            f"train folder; expected class folders, directly or under train, val and test"
        )
    return by_split or {"train": directory}


def subfolders(directory):
    """Returns the names of the subfolders, keyed by the same in lower case."""
    return {name.lower(): name for name in _list_folders(directory)}


def _list_folders(directory):
    with path_errors(directory), os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if leads_to_folder(entry))


def _list_class_names(folder, least):
    names = tuple(name for name in _list_folders(folder) if not name.startswith("."))
    if len(names) < least:
        raise InputError(
            f"--data_dir: {folder} holds {len(names)} class folder{'s' * (len(names) != 1)}; "
            f"expected at least {least}, one per class, with the images inside"
        )
    if odd := [n for n in names if os.fsencode(n).decode(errors="replace") != n]:
        raise InputError(
            f"--data_dir: {folder} holds class folders whose names are not UTF-8, rename them: "
            f"{join_names(list(map(ascii, odd)))}"
        )
    return names


def _read_splits(request, folders, class_names):
    """Returns the images of each split, checked unless bad ones are looked for later."""
    directory = request.directory
    paths = [folder / name for folder in folders.values() for name in class_names]
    listing, folder_of = list_images(directory, [os.path.relpath(p, directory) for p in paths])
    counts = np.bincount(folder_of, minlength=len(paths))
    if not counts.all():
        raise InputError(
            f"--data_dir: the class folder {paths[np.argmin(counts)]} has no images "
            f"({', '.join(IMAGE_SUFFIXES)}); remove it, or put images into it"
        )
    split_of, labels = np.divmod(folder_of, len(class_names))
    images = FileImages(listing, labels, request.info.channels)
    if not request.find_bad:
        refuse_unreadable(images)
    return {
        name: images.take(np.flatnonzero(split_of == index)) for index, name in enumerate(folders)
    }


def refuse_unreadable(images):
    """Checks image files by their headers and ends, so that training does not fail on them.

    Args:
        images: `FileImages`.

    Raises:
        InputError: Names the unreadable files.
    """
    refuse_bad(images, find_unreadable(images.listing))


CLASS_FOLDERS = Reader(_read_folder)
