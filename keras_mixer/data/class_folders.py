"""Reads datasets of image files in class folders."""

import os

import numpy as np

from keras_mixer.data.image_checks import find_unreadable
from keras_mixer.data.image_listing import (
    IMAGE_SUFFIXES,
    count_loose,
    has_images,
    is_litter,
    leads_to_folder,
    list_images,
)
from keras_mixer.data.readers import Reader
from keras_mixer.data.splits import FileImages, refuse_bad
from keras_mixer.errors import InputError, join_names, path_errors
from keras_mixer.log import logger

SPLIT_FOLDERS = {
    "train": ("train", "training", "train_set", "training_set", "seg_train"),
    "validation": (
        *("validation", "val", "valid", "dev", "eval"),
        *("val_set", "validation_set", "holdout"),
    ),
    "test": ("test", "testing", "test_set", "seg_test"),
}
SPLIT_OF = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
_UNLABELED = ("pred", "seg_pred", "unlabeled")


def _read_folder(request):
    """Reads images from class folders, directly in the directory or in train/, val/ and test/.

    Raises:
        InputError: If it is not clear what is a class and what a split, a class has no training
            images, or a file is unreadable.
    """
    directory = request.directory
    folders = _find_split_folders(directory)
    train = folders["train"]
    class_names = _list_class_names(train, request.least_classes)
    folders = {s: f for s, f in folders.items() if f == train or _is_labeled(f, train, class_names)}
    for folder in dict.fromkeys((directory, *folders.values())):
        if loose := count_loose(folder):
            logger.info(f"left aside: {loose:,} images in {folder}, outside of its folders")
    splits = _read_splits(request, folders, class_names)
    return class_names, {"all": splits["train"]} if train == directory else splits


def _find_split_folders(directory):
    """Returns the folder of each split; without any of them, the directory itself as `train`."""
    names = _list_folders(directory)
    found = {split: [n for n in names if _split_of(n) == split] for split in SPLIT_FOLDERS}
    if not any(found.values()):
        return {"train": directory}
    others = [name for name in names if not _split_of(name)]
    unlabeled = [name for name in others if _key(name) in _UNLABELED]
    classes = [n for n in others if n not in unlabeled and has_images(directory / n)]
    if classes or not found["train"] or max(map(len, found.values())) > 1:
        raise InputError(_ask_what_is_meant(directory, names))
    for name in others:
        _leave_aside(directory / name)
    return {s: _without_nesting(directory / f[0], s) for s, f in found.items() if f}


def _ask_what_is_meant(directory, names):
    splits, others = [n for n in names if _split_of(n)], [n for n in names if not _split_of(n)]
    tree = join_names([_branch(directory / name) for name in names])
    return (
        f"--data_dir={directory}: it is not clear what is a split and what a class in: {tree}; to "
        f"read {join_names(splits)} as splits, keep one train folder, at most one of validation "
        f"and one of test"
        + f", and move {join_names(others)} elsewhere" * bool(others)
        + f"; to read all as classes, move all class folders into a new {directory / 'train'}"
    )


def _branch(folder):
    """Returns a folder and what it holds, in one line."""
    inside = [f"{name}/" for name in _list_folders(folder)]
    inside += [f"{loose:,} images"] if (loose := count_loose(folder)) else []
    return f"{folder.name}/ ({join_names(inside, 6) or 'nothing'})"


def _without_nesting(folder, split):
    """Returns the folder, or the one in it of an archive such as seg_train/seg_train/."""
    names = _list_folders(folder)
    return folder / names[0] if list(map(_split_of, names)) == [split] else folder


def _is_labeled(folder, train, class_names):
    """Returns whether a split has class folders; without them, it is left aside."""
    found = _list_folders(folder)
    others = sorted({*found} - {*class_names})
    if len(found) == len(others) < 2:
        _leave_aside(folder)
        return False
    if others:
        raise InputError(
            f"--data_dir: {folder} has class folders that {train} has not: {join_names(others)}; "
            f"expected the same class folders in both"
        )
    return True


def _leave_aside(folder):
    if has_images(folder):
        why = f"no class folders; to classify its images: keras-mixer predict RUN {folder}"
    else:
        why = "no images"
    logger.info(f"left aside: {folder}, {why}")


def subfolders(directory):
    """Returns the names of the subfolders, keyed by the same in lower case with underscores."""
    return {_key(name): name for name in _list_folders(directory)}


def _key(name):
    return name.lower().replace("-", "_").replace(" ", "_")


def _split_of(name):
    return SPLIT_OF.get(_key(name))


def _list_folders(directory):
    with path_errors(directory), os.scandir(directory) as entries:
        return sorted(e.name for e in entries if not is_litter(e.name) and leads_to_folder(e))


def _list_class_names(folder, least):
    names = tuple(_list_folders(folder))
    if len(names) < least:
        tree = f": {join_names([_branch(folder / n) for n in names])}" if names else ""
        raise InputError(
            f"--data_dir: {folder} holds {len(names)} class folder{'s' * (len(names) != 1)}{tree}; "
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
    present = np.flatnonzero([path.is_dir() for path in paths])
    names = [os.path.relpath(paths[index], directory) for index in present]
    listing, folder_of = list_images(directory, names)
    folder_of = present[folder_of]
    counts = np.bincount(folder_of, minlength=len(paths)).reshape(len(folders), -1)
    _note_missing(folders, class_names, counts)
    split_of, labels = np.divmod(folder_of, len(class_names))
    images = FileImages(listing, labels, request.info.channels)
    if not request.find_bad:
        refuse_unreadable(images)
    return {
        name: images.take(np.flatnonzero(split_of == index))
        for index, name in enumerate(folders)
        if counts[index].any()
    }


def _note_missing(folders, class_names, counts):
    """Warns of classes without images in validation or test, and refuses them in training."""
    for folder, (split, path) in zip(counts, folders.items(), strict=True):
        missing = [class_names[label] for label in np.flatnonzero(folder == 0)]
        if missing and split == "train":
            raise InputError(
                f"--data_dir: the class folder {path / missing[0]} has no images "
                f"({', '.join(IMAGE_SUFFIXES)}); remove it, or put images into it"
            )
        if missing:
            logger.warning(f"{path}: no images of {join_names(missing)}; they are not scored")


def refuse_unreadable(images):
    """Checks image files by their headers and ends, so that training does not fail on them.

    Args:
        images: `FileImages`.

    Raises:
        InputError: Names the unreadable files.
    """
    refuse_bad(images, find_unreadable(images.listing))


CLASS_FOLDERS = Reader(_read_folder)
