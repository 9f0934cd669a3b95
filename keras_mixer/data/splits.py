"""An open dataset: its class names, splits and identity.

A split is a set of labeled images, with the interface `Images`: `ArrayImages` in memory,
`FileImages` on disk, or `tfrecords.RecordImages` in TFRecord files.

The identity is a digest of the images, their order, labels and classes, by which a resumed run
checks that its data have not changed. For image files it covers names and sizes, not contents:
reading those would take hours for large datasets.
"""

import dataclasses
import hashlib
import math
import os
import struct
from typing import ClassVar, Protocol

import numpy as np

from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.image_listing import Listing
from keras_mixer.errors import InputError, join_names, path_errors
from keras_mixer.log import logger, one_line


class Images(Protocol):
    """Labeled images of a split.

    Attributes:
        channels: Color channels, 1 or 3.
        labels: int64 array `(n,)` of class indices; None if they have to be read.
        fix: What a user can do about damaged images, for messages.
        folder: What completes `name_of` to a path, for messages; "" if it is complete.
    """

    channels: int
    labels: np.ndarray | None
    fix: str
    folder: str

    def __len__(self): ...

    def take(self, indices):
        """Returns the images at these indices, in this order."""

    def read_labels(self):
        """Returns the labels, int64 `(n,)`."""

    def sizes(self):
        """Returns the sizes of the images in bytes, as they are stored, an int array `(n,)`."""

    def content(self, index):
        """Returns an image as bytes, as it is stored; raises InputError if it cannot be read."""

    def name_of(self, index):
        """Returns the name of an image, for messages."""

    def digest(self):
        """Returns bytes that identify the images and labels, wherever they are stored."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory.

    Attributes:
        pixels: uint8 array `(n, height, width, channels)`.
        labels: int64 array `(n,)` of class indices.
    """

    pixels: np.ndarray
    labels: np.ndarray
    fix: ClassVar[str] = "repair the data"
    folder: ClassVar[str] = ""

    @property
    def channels(self):
        """Color channels of the images."""
        return self.pixels.shape[-1]

    def __len__(self):
        return len(self.pixels)

    def take(self, indices):
        """Returns the images at these indices, in this order."""
        return ArrayImages(self.pixels[indices], self.labels[indices])

    def read_labels(self):
        """Returns the labels."""
        return self.labels

    def sizes(self):
        """Returns the sizes of the images in bytes, an int array `(n,)`."""
        return np.full(len(self), self.pixels[0].nbytes if len(self) else 0)

    def content(self, index):
        """Returns the pixels of an image as bytes."""
        return self.pixels[index].tobytes()

    def name_of(self, index):
        """Returns the index of an image, for messages."""
        return f"number {index}"

    def digest(self):
        """Returns bytes that identify the images and labels."""
        pixels = repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()
        return _bytes_of(self.labels) + pixels


@dataclasses.dataclass(frozen=True, eq=False)
class FileImages:
    """Image files.

    Attributes:
        listing: `Listing` of the files.
        labels: int64 array `(n,)` of class indices.
        channels: Color channels to decode them to, 1 or 3.
    """

    listing: Listing
    labels: np.ndarray
    channels: int
    fix: ClassVar[str] = "repair or remove"

    @property
    def folder(self):
        """Folder that names are relative to."""
        return os.fsdecode(self.listing.directory)

    @property
    def paths(self):
        """Bytes array `(n,)` of the files' paths."""
        return self.listing.paths()

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        """Returns the images at these indices, in this order."""
        return FileImages(self.listing.take(indices), self.labels[indices], self.channels)

    def read_labels(self):
        """Returns the labels."""
        return self.labels

    def sizes(self):
        """Returns the sizes of the files in bytes, an int array `(n,)`."""
        return self.listing.sizes

    def content(self, index):
        """Returns the content of a file as bytes."""
        path = self.listing.take([index]).paths()[0]
        with path_errors(os.fsdecode(path)), open(path, "rb") as file:
            return file.read()

    def name_of(self, index):
        """Returns the name of a file, relative to the folder of the data."""
        return os.fsdecode(self.listing.names[index])

    def digest(self):
        """Returns bytes that identify the images, by name and size, and the labels."""
        files = zip(self.listing.names.tolist(), self.listing.sizes.tolist(), strict=True)
        return _bytes_of(self.labels) + b"".join(n + struct.pack("<q", size) for n, size in files)


def _bytes_of(labels):
    return np.ascontiguousarray(labels, "<i8").tobytes()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset: its classes and its splits.

    Attributes:
        class_names: One name per class, in the order of the labels.
        train: `Images` to train on.
        validation: `Images` to choose epochs and hyperparameters by; may be None.
        test: `Images` to score once, at the end; may be None.
        identity: Hexadecimal sha256 of all of the above.
        skipped: (name, reason) of the images that were left out, since they cannot be decoded.
    """

    class_names: tuple[str, ...]
    train: Images
    validation: Images | None
    test: Images | None
    identity: str
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def channels(self):
        """Color channels of the images."""
        return self.train.channels

    def split_to_score(self, name=None):
        """Returns the name of the split to score: as given, or test, or validation without it."""
        without_test = self.test is None and self.validation is not None
        return name or ("validation" if without_test else "test")

    def split(self, name):
        """Returns the split called `train`, `validation` or `test`.

        Raises:
            InputError: If there is no such split.
        """
        split = getattr(self, name)
        if split is None:
            available = [other for other in SPLITS if getattr(self, other) is not None]
            raise InputError(
                f"--eval_split={name}: this dataset has no {name} split; "
                f"give one of {', '.join(available)}"
            )
        return split


def set_aside(images, *arguments):
    """Splits by class, or at random if labels have to be read. Arguments: As `split_stratified`."""
    split = split_randomly if images.labels is None else split_stratified
    return split(images, *arguments)


def split_stratified(images, fraction, seed, flag, class_names):
    """Sets aside a fraction of every class at random (a stratified split).

    Args:
        images: `Images` with known labels.
        fraction: float in (0, 1).
        seed: int.
        flag: Name of the flag for the fraction, for messages.
        class_names: One name per class, for messages.

    Returns:
        (kept, aside): two `Images`, each in the original order.

    Raises:
        InputError: If some class cannot be on both sides.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(images.labels, minlength=len(class_names))
    if few := [class_names[label] for label in np.flatnonzero(counts < 2)]:
        raise InputError(
            f"{flag}={fraction}: fewer than 2 images to split of {len(few)} of "
            f"{len(class_names)} classes: {join_names(few)}"
        )
    try:
        kept, aside = train_test_split(
            np.arange(len(images)), test_size=fraction, stratify=images.labels, random_state=seed
        )
    except ValueError as error:
        least = math.ceil(1000 * len(class_names) / len(images)) / 1000
        raise InputError(
            f"{flag}={fraction}: {len(images)} images cannot be split so that each of the "
            f"{len(class_names)} classes is on both sides; expected {least:g} to {1 - least:g}, or "
            f"0 to set none aside"
        ) from error
    aside, kept = _with_every_class(images.labels, aside, kept)
    kept, aside = _with_every_class(images.labels, kept, aside)
    return images.take(np.sort(kept)), images.take(np.sort(aside))


def _with_every_class(labels, side, other):
    """Moves one image of each class that a side lacks, by rounding, to it from the other side."""
    missing = np.setdiff1d(labels, labels[side])
    moved = [other[np.argmax(labels[other] == label)] for label in missing]
    return np.append(side, moved).astype(int), np.setdiff1d(other, moved)


def split_randomly(images, fraction, seed, flag, class_names):
    """Sets aside a fraction of all images at random; arguments as for `split_stratified`."""
    aside = round(len(images) * fraction)
    if not 0 < aside < len(images):
        raise InputError(
            f"{flag}={fraction}: expected a fraction of the {len(images)} images that leaves some "
            f"on both sides, received one that sets aside {aside}; 0 sets none aside"
        )
    order = np.random.default_rng(seed).permutation(len(images))
    return images.take(np.sort(order[aside:])), images.take(np.sort(order[:aside]))


def without_bad(splits, class_names, find_bad):
    """Leaves out images that cannot be decoded, and logs which.

    Args:
        splits: dict from names to `Images`.
        class_names: One name per class.
        find_bad: Function of `Images` that returns a list of (index, reason).

    Returns:
        (splits, skipped): the same without them, and a tuple of (name, reason).

    Raises:
        InputError: If no image is left of a split, or of a class in it.
    """
    kept, skipped = {}, []
    for name, images in splits.items():
        reasons = dict(find_bad(images))
        skipped += [(images.name_of(index), why) for index, why in reasons.items()]
        kept[name] = images.take(np.setdiff1d(np.arange(len(images)), list(reasons)).astype(int))
        _refuse_lost(name, images, kept[name], class_names)
    if skipped:
        count = sum(map(len, splits.values()))
        names = join_names([one_line(f"{name} ({why})") for name, why in skipped])
        logger.warning(f"{len(skipped):,} of {count:,} images are bad and skipped: {names}")
    return kept, tuple(skipped)


def _refuse_lost(name, before, after, class_names):
    """Refuses a class without images or, if labels have to be read, a split without images."""
    lost = [] if len(after) else ["any class"]
    if len(after) and after.labels is not None:
        lost = [class_names[label] for label in np.setdiff1d(before.labels, after.labels)]
    if lost:
        raise InputError(
            f"--bad_images=skip: no readable image is left of {join_names(lost)} (split: {name}); "
            f"{before.fix}"
        )


def refuse_bad(images, problems):
    """Raises an `InputError` if images of a split are unreadable.

    Args:
        images: `Images` that they belong to.
        problems: list of (index, reason).
    """
    if problems:
        names = join_names(
            [f"{os.path.join(images.folder, images.name_of(i))} ({why})" for i, why in problems]
        )
        raise InputError(
            f"--data_dir: {len(problems)} unreadable image{'s' * (len(problems) > 1)}, "
            f"{images.fix}, or skip with --bad_images=skip: {names}"
        )


def identity_of(class_names, splits):
    """Returns a hexadecimal sha256 of the data that does not depend on where the files are.

    Args:
        class_names: One name per class.
        splits: `Images` or None, in the order train, validation, test.
    """
    digest = hashlib.sha256(repr(class_names).encode())
    for images in splits:
        digest.update(b"none" if images is None else images.digest())
    return digest.hexdigest()
