"""What a data set is once it is open: images with labels, in splits, under an identity.

The identity is a digest that changes whenever the images, their order, their labels or their
classes do, so that a resumed run can tell that its data are still the same. (Of image files the
names and sizes are digested, not the contents: that would take hours for some.)
"""

import dataclasses
import hashlib
import os
import struct

import numpy as np

from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.records import Records
from keras_mixer.errors import InputError, some_of


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels, in a fixed order.

    Attributes:
        images: uint8 array `(n, height, width, channels)`, bytes array `(n,)` of file paths, or
            `Records`.
        labels: int64 array `(n,)` of class indices; None for records, whose labels lie with the
            images.
        sizes: int64 array `(n,)` of the files' sizes in bytes; None for pixels and records.
    """

    images: np.ndarray | Records
    labels: np.ndarray | None
    sizes: np.ndarray | None = None

    def __len__(self):
        return len(self.images)

    @property
    def in_memory(self):
        """Whether the images are pixels; else they are files or records."""
        return not self.in_records and self.images.dtype == np.uint8

    @property
    def in_records(self):
        """Whether the images are records."""
        return isinstance(self.images, Records)

    def take(self, indices):
        """Returns the split of the images at these indices, in this order."""
        labels, sizes = (
            None if column is None else column[indices] for column in (self.labels, self.sizes)
        )
        return Split(self.images[indices], labels, sizes)

    def read_labels(self):
        """Returns the labels as an int64 array `(n,)`; for records it reads every one of them."""
        return self.images.read_labels() if self.labels is None else self.labels


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


def stratified(split, fraction, seed, flag, class_names):
    """Splits off a share of every class, the same images every time.

    Args:
        split: `Split`.
        fraction: float in (0, 1).
        seed: int. Another seed sets other images aside.
        flag: Name of the flag that asked for it, for the message.
        class_names: One name per class, for the message.

    Returns:
        (kept, aside): two `Split`s, each in the order of the original.

    Raises:
        InputError: If some class would be on one side only.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(split.labels, minlength=len(class_names))
    if few := [class_names[label] for label in np.flatnonzero(counts < 2)]:
        raise InputError(
            f"{flag}={fraction}: fewer than 2 images to split of {len(few)} of "
            f"{len(class_names)} classes: {some_of(few)}"
        )
    try:
        kept, aside = train_test_split(
            np.arange(len(split)), test_size=fraction, stratify=split.labels, random_state=seed
        )
    except ValueError as error:
        raise InputError(
            f"{flag}={fraction}: {len(split)} images cannot be split so that every class "
            f"is on both sides ({error})"
        ) from error
    aside, kept = _with_every_class(split.labels, aside, kept)
    kept, aside = _with_every_class(split.labels, kept, aside)
    return split.take(np.sort(kept)), split.take(np.sort(aside))


def _with_every_class(labels, side, other):
    """Moves an image to a side of every class that rounding has left without one there."""
    missing = np.setdiff1d(labels, labels[side])
    moved = [other[np.argmax(labels[other] == label)] for label in missing]
    return np.append(side, moved).astype(int), np.setdiff1d(other, moved)


def at_random(split, fraction, seed, flag, class_names):
    """Splits off a share of all images without regard to their classes, the same every time.

    Args, Returns, Raises: as `stratified`.
    """
    aside = round(len(split) * fraction)
    if not 0 < aside < len(split):
        raise InputError(f"{flag}={fraction}: of {len(split)} images that would be {aside}")
    order = np.random.default_rng(seed).permutation(len(split))
    return split.take(np.sort(order[aside:])), split.take(np.sort(order[:aside]))


def identity_of(class_names, splits, directory):
    """Digests everything that a resumed run relies on; where the files lie does not matter.

    Args:
        class_names: One name per class.
        splits: `Split`s or None, in the order train, validation, test.
        directory: Folder that holds the files; None for embedded data.

    Returns:
        Hexadecimal sha256.
    """
    digest = hashlib.sha256(repr(class_names).encode())
    for split in splits:
        if split is None:
            digest.update(b"none")
            continue
        if split.in_records:
            digest.update(split.images.digest())
            continue
        digest.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
        if split.in_memory:
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).tobytes())
        else:
            start = len(os.path.join(os.fsencode(directory), b""))
            for path, size in zip(split.images, split.sizes.tolist(), strict=True):
                digest.update(path[start:] + struct.pack("<q", size))
    return digest.hexdigest()
