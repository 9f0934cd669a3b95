"""Image files in class folders."""

import os
from pathlib import Path

import numpy as np

from keras_mixer import console
from keras_mixer.data.images import check_image_file
from keras_mixer.data.splits import Split
from keras_mixer.errors import InputError

MOST_FILES_NAMED = 20

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def read_folder(request):
    """Class folders, either directly in the directory or under train/, val/ and test/.

    Raises:
        InputError: If folders differ in their classes or hold no images, or files are unreadable.
    """
    directory = request.directory
    folders = _split_folders(directory)
    class_names = _class_names(folders["train"])
    splits = {}
    for name, folder in folders.items():
        if name != "train" and _class_names(folder) != class_names:
            differing = sorted(set(_class_names(folder)) ^ set(class_names))
            raise InputError(
                f"--data_dir: {folder} and {folders['train']} differ in their class folders: "
                f"{', '.join(differing)}"
            )
        splits[name] = _list_images(folder, class_names)
    _refuse_unreadable(splits)
    if folders["train"] == directory:
        return class_names, {"all": splits["train"]}
    return class_names, splits


def _split_folders(directory):
    """Finds train/, val/ and test/; without a train/, the directory itself is what there is."""
    folders = {entry.name.lower(): entry.path for entry in os.scandir(directory) if entry.is_dir()}
    found = {}
    for split, names in _SPLIT_FOLDERS.items():
        for name in names:
            if split not in found and name in folders:
                found[split] = Path(folders[name])
    if "train" not in found and len(found) > 0:
        raise InputError(
            f"--data_dir={directory} holds {', '.join(f.name for f in found.values())} but no "
            f"train folder; expected class folders, directly or under train, val and test"
        )
    return found or {"train": directory}


def _class_names(folder):
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if _is_class_folder(entry)))
    if len(names) < 2:
        raise InputError(
            f"--data_dir: {folder} holds {len(names)} class folders; expected at least 2, "
            f"one per class, with the images inside"
        )
    return names


def _is_class_folder(entry):
    return entry.is_dir() and not entry.name.startswith(".")


def _list_images(folder, class_names):
    images, labels = [], []
    for label, name in enumerate(class_names):
        paths = sorted(image_files(folder / name))
        if not paths:
            raise InputError(
                f"--data_dir: the class folder {folder / name} holds no image "
                f"({', '.join(_IMAGE_SUFFIXES)})"
            )
        images += paths
        labels += [label] * len(paths)
    return Split(np.array(images), np.array(labels, np.int64))


def image_files(folder):
    """Yields the paths, as bytes, of the image files below a folder; hidden ones are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            if not name.startswith(".") and name.lower().endswith(_IMAGE_SUFFIXES):
                yield os.fsencode(path)


def _refuse_unreadable(splits):
    """Checks every file's header and end, so that a bad one is named now, not in epoch 3."""
    paths = [path for split in splits.values() for path in split.images]
    found = zip(paths, map(check_image_file, console.track(paths, "checking images")), strict=True)
    refuse_files([(path, problem) for path, problem in found if problem])


def refuse_files(problems):
    """Raises an InputError that names the files and what is wrong with each, if there are any.

    Args:
        problems: list of (path as bytes, reason as string).
    """
    if problems:
        named = [f"{os.fsdecode(path)} ({why})" for path, why in problems[:MOST_FILES_NAMED]]
        more = f" and {len(problems) - len(named)} more" if len(problems) > len(named) else ""
        raise InputError(
            f"--data_dir: {len(problems)} unreadable image{'s' * (len(problems) > 1)}, "
            f"mend or remove: {', '.join(named)}{more}"
        )
