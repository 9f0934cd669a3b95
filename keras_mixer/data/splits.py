"""An open data set: its class names, its three splits, and its identity.

A split is a set of labeled images of one of three classes: `ArrayImages` in memory, `FileImages`
on disk, `tfrecords.RecordImages` in record files. They have one interface, `Images` in docstrings:
`len`, `channels`, `labels` (None where they have to be read), `read_labels`, `take`, `digest`.

The identity is a digest that changes whenever the images, their order, their labels or their
classes do, so that a resumed run can tell that its data are still the same. (Of image files the
names and sizes are digested, not the contents: that would take hours for large sets.)
"""

import dataclasses
import hashlib
import struct

import numpy as np

from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.image_listing import Listing
from keras_mixer.errors import InputError, some_of


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory.

    Attributes:
        pixels: uint8 array `(n, height, width, channels)`.
        labels: int64 array `(n,)` of class indices.
    """

    pixels: np.ndarray
    labels: np.ndarray

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

    def digest(self):
        """Returns bytes that tell these images and labels from others."""
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

    def digest(self):
        """Returns bytes that tell these images and labels from others, by names and sizes."""
        files = zip(self.listing.names.tolist(), self.listing.sizes.tolist(), strict=True)
        return _bytes_of(self.labels) + b"".join(n + struct.pack("<q", size) for n, size in files)


def _bytes_of(labels):
    return np.ascontiguousarray(labels, "<i8").tobytes()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: its classes and its splits.

    Attributes:
        class_names: One name per class, in the order of the labels.
        train: `Images` to train on.
        validation: `Images` for choices: of the best epoch, of hyperparameters; may be None.
        test: `Images` to score once, at the end; may be None.
        identity: Hexadecimal sha256 of all of the above.
    """

    class_names: tuple[str, ...]
    train: object
    validation: object
    test: object
    identity: str

    @property
    def channels(self):
        """Color channels of the images."""
        return self.train.channels

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


def split_stratified(images, fraction, seed, flag, class_names):
    """Sets aside a fraction of every class, the same images every time.

    Args:
        images: `Images` with known labels.
        fraction: float in (0, 1).
        seed: int. Another seed sets other images aside.
        flag: Name of the flag that asked for it, for the message.
        class_names: One name per class, for the message.

    Returns:
        (kept, aside): two sets of `Images`, each in the order of the original.

    Raises:
        InputError: If some class would be on one side only.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(images.labels, minlength=len(class_names))
    if few := [class_names[label] for label in np.flatnonzero(counts < 2)]:
        raise InputError(
            f"{flag}={fraction}: fewer than 2 images to split of {len(few)} of "
            f"{len(class_names)} classes: {some_of(few)}"
        )
    try:
        kept, aside = train_test_split(
            np.arange(len(images)), test_size=fraction, stratify=images.labels, random_state=seed
        )
    except ValueError as error:
        raise InputError(
            f"{flag}={fraction}: {len(images)} images cannot be split so that every class "
            f"is on both sides ({error})"
        ) from error
    aside, kept = _with_every_class(images.labels, aside, kept)
    kept, aside = _with_every_class(images.labels, kept, aside)
    return images.take(np.sort(kept)), images.take(np.sort(aside))


def _with_every_class(labels, side, other):
    """Moves an image to a side of every class that rounding has left without one there."""
    missing = np.setdiff1d(labels, labels[side])
    moved = [other[np.argmax(labels[other] == label)] for label in missing]
    return np.append(side, moved).astype(int), np.setdiff1d(other, moved)


def split_randomly(images, fraction, seed, flag, class_names):
    """Sets aside a fraction of all images whatever their classes, the same every time.

    Args, Returns, Raises: as `split_stratified`.
    """
    aside = round(len(images) * fraction)
    if not 0 < aside < len(images):
        raise InputError(f"{flag}={fraction}: of {len(images)} images that would be {aside}")
    order = np.random.default_rng(seed).permutation(len(images))
    return images.take(np.sort(order[aside:])), images.take(np.sort(order[:aside]))


def identity_of(class_names, splits):
    """Digests everything that a resumed run relies on; where the files lie does not matter.

    Args:
        class_names: One name per class.
        splits: `Images` or None, in the order train, validation, test.

    Returns:
        Hexadecimal sha256.
    """
    digest = hashlib.sha256(repr(class_names).encode())
    for images in splits:
        digest.update(b"none" if images is None else images.digest())
    return digest.hexdigest()
