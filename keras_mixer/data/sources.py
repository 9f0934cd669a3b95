"""Images and labels before TensorFlow: embedded digits, IDX files, image folders.

A source is indexable and has an identity: a digest that changes whenever the images, their order,
their labels or their classes do, so that a resumed run can tell that its data are still the same.
(Of image files the names and sizes are digested, not the contents: that would take hours for some.)
Nothing here imports TensorFlow, so every mistake in the data is reported within a second or two.
"""

import dataclasses
import gzip
import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from keras_mixer import console
from keras_mixer.data.datasets import DATASETS, SPLITS
from keras_mixer.data.images import IMAGE_SUFFIXES, check_image_file
from keras_mixer.errors import InputError, path_errors

SPLIT_SEED = 0  # the splits of a data set are fixed: they never follow the seed of a run
MOST_FILES_NAMED = 20


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels, in a fixed order.

    Attributes:
        images: uint8 array `(n, height, width, channels)`, or a list of n file paths (bytes).
        labels: int64 array `(n,)` of class indices.
    """

    images: np.ndarray | list[bytes]
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    @property
    def in_memory(self):
        """Whether the images are an array; else they are files."""
        return isinstance(self.images, np.ndarray)

    def take(self, indices):
        """Returns the split of the images at these indices, in this order."""
        if self.in_memory:
            return Split(self.images[indices], self.labels[indices])
        return Split([self.images[i] for i in indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: its classes and its splits.

    Attributes:
        class_names: One name per class, in the order of the labels.
        channels: Colour channels of the images.
        train: Split to learn from.
        validation: Split to choose with; None when there is none.
        test: Split to score once, at the end; None when the data set has none.
        identity: Hexadecimal sha256 of all of the above.
    """

    class_names: tuple[str, ...]
    channels: int
    train: Split
    validation: Split | None
    test: Split | None
    identity: str

    def split(self, name):
        """Returns the split called `train`, `validation` or `test`.

        Raises:
            InputError: If this data set has no such split.
        """
        split = getattr(self, name)
        if split is None:
            there = [other for other in SPLITS if getattr(self, other) is not None]
            raise InputError(
                f"--eval_split={name}: this data set has no {name} split; "
                f"give one of {', '.join(there)}"
            )
        return split


def load_source(dataset, data_dir=None, validation_fraction=0.1):
    """Opens a data set: reads small ones into memory, lists and checks the files of large ones.

    Args:
        dataset: string, a key of `DATASETS`.
        data_dir: Folder that holds the files; None for the embedded set.
        validation_fraction: float in [0, 1). Share of the training images set aside, stratified
            and always the same ones, where the data set brings no validation split of its own.

    Returns:
        A `Source`.

    Raises:
        InputError: If files are missing, damaged or inconsistent; the message names them.
    """
    row = DATASETS[dataset]
    directory = _data_directory(dataset, row, data_dir)
    class_names, splits = _READERS[row.origin](row, directory)
    train, validation, test = _completed(splits, validation_fraction)
    return Source(
        class_names, row.channels, train, validation, test,
        _identity(class_names, (train, validation, test), directory),
    )  # fmt: skip


def _data_directory(dataset, row, data_dir):
    if row.origin == "embedded":
        if data_dir is not None:
            raise InputError(
                f"--data_dir={data_dir}: --dataset={dataset} is embedded and reads no files; "
                f"to train on your own images add --dataset=folder"
            )
        return None
    if data_dir is None:
        raise InputError(f"--dataset={dataset} needs --data_dir, the folder that holds its files")
    with path_errors(f"--data_dir={data_dir}"):
        if not Path(data_dir).is_dir():
            kind = "not a folder" if Path(data_dir).exists() else "no such folder"
            raise InputError(f"--data_dir={data_dir}: {kind}")
    return Path(data_dir)


def _completed(splits, validation_fraction):
    """Sets a validation split aside, stratified, where the data set brings none."""
    train, validation, test = (splits.get(name) for name in ("train", "validation", "test"))
    if validation is None and validation_fraction > 0:
        train, validation = _stratified(train, validation_fraction, "--validation_fraction")
    return train, validation, test


def _stratified(split, fraction, flag):
    """Splits off a share of every class, the same images every time."""
    from sklearn.model_selection import train_test_split

    try:
        kept, aside = train_test_split(
            np.arange(len(split)),
            test_size=fraction,
            stratify=split.labels,
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise InputError(
            f"{flag}={fraction}: {len(split)} images cannot be split so that every class "
            f"is on both sides ({error})"
        ) from error
    return split.take(np.sort(kept)), split.take(np.sort(aside))


def _identity(class_names, splits, directory):
    """Digests everything that a resumed run relies on; where the files lie does not matter."""
    digest = hashlib.sha256(repr(class_names).encode())
    for split in splits:
        if split is None:
            digest.update(b"none")
            continue
        digest.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
        if split.in_memory:
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).tobytes())
        else:
            for path in split.images:
                digest.update(os.path.relpath(path, os.fsencode(directory)))
                digest.update(struct.pack("<q", os.stat(path).st_size))
    return digest.hexdigest()


# === Embedded digits ===


def _read_digits(row, directory):
    """scikit-learn's 1,797 digits; 20% of them, stratified, are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # levels 0 to 16
    everything = Split(images, bunch.target.astype(np.int64))
    train, test = _stratified(everything, 0.2, "test share")
    return row.class_names, {"train": train, "test": test}


# === IDX files ===


def _read_idx_set(row, directory):
    """The four files that MNIST and Fashion-MNIST are published as, gzipped or not."""
    splits = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images_path = _idx_path(directory, f"{prefix}-images-idx3-ubyte")
        images = _read_idx(images_path, dimensions=3)[..., None]
        labels_path = _idx_path(directory, f"{prefix}-labels-idx1-ubyte")
        labels = _read_idx(labels_path, dimensions=1).astype(np.int64)
        if len(images) != len(labels) or not len(labels):
            raise InputError(
                f"--data_dir: {images_path} holds {len(images)} images, "
                f"but {labels_path} holds {len(labels)} labels"
            )
        if labels.max() >= len(row.class_names):
            raise InputError(
                f"--data_dir: {labels_path} holds the label {labels.max()}; expected labels "
                f"below {len(row.class_names)}"
            )
        splits[name] = Split(images, labels)
    return row.class_names, splits


def _idx_path(directory, name):
    for candidate in (directory / f"{name}.gz", directory / name):
        if candidate.is_file():
            return candidate
    raise InputError(f"--data_dir={directory}: expected the file {name}.gz (or {name})")


def _read_idx(path, dimensions):
    """Reads an IDX file of unsigned bytes: a magic number, the sizes, then the values."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--data_dir: cannot read {path}: {error}") from error
    header = 4 * (1 + dimensions)
    expected_magic = 0x0800 + dimensions  # 08: unsigned byte; then the number of dimensions
    if len(content) < header or struct.unpack(">I", content[:4])[0] != expected_magic:
        raise InputError(f"--data_dir: {path} is not an IDX file of {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise InputError(
            f"--data_dir: {path} is damaged: its header announces {int(np.prod(shape))} values, "
            f"the file holds {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# === Image folders ===

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def _read_folder(row, directory):
    """Class folders, either directly in the directory or under train/, val/ and test/."""
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
    if list(splits) == ["train"] and folders["train"] == directory:
        splits["train"], splits["test"] = _stratified(splits["train"], 0.2, "test share")
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
                f"({', '.join(IMAGE_SUFFIXES)})"
            )
        images += paths
        labels += [label] * len(paths)
    return Split(images, np.array(labels, np.int64))


def image_files(folder):
    """Yields the paths, as bytes, of the image files below a folder; hidden ones are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
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


_READERS = {"embedded": _read_digits, "idx": _read_idx_set, "folder": _read_folder}
