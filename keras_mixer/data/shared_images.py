"""Finds images that several splits have in common, by content: their scores would be too good."""

import hashlib

import numpy as np

from keras_mixer.data.datasets import SPLITS
from keras_mixer.log import logger, track

MOST_BYTES = 1 << 30  # compared: about ten seconds from a disk
_EXAMPLES = 3


def note_shared_images(dataset):
    """Logs a warning if an image of one split is in another, too, byte for byte.

    Args:
        dataset: `Dataset`. Of image files, those are read that have the size of one in another
            split.
    """
    splits = {name: images for name in SPLITS if (images := getattr(dataset, name)) is not None}
    candidates = _same_size(splits)
    if sum(size for *_, size in candidates) > MOST_BYTES:
        logger.info("splits are not compared for identical images: they are larger than 1 GB")
        return
    if shared := _same_content(splits, candidates):
        examples = "; ".join(" = ".join(names) for names in shared[:_EXAMPLES])
        logger.warning(
            f"{len(shared):,} image{'s are' if len(shared) > 1 else ' is'} in several splits, byte "
            f"for byte, which makes scores too good: {examples}{'; …' * (len(shared) > _EXAMPLES)}"
        )


def _same_size(splits):
    """Returns (split, index, size in bytes) of the images whose size occurs in several splits."""
    sizes = {name: images.sizes() for name, images in splits.items()}
    values, counts = np.unique(
        np.concatenate([np.unique(s) for s in sizes.values()]), return_counts=True
    )
    common = values[counts > 1]
    return [
        (name, int(index), int(of_split[index]))
        for name, of_split in sizes.items()
        for index in np.flatnonzero(np.isin(of_split, common))
    ]


def _same_content(splits, candidates):
    """Returns, for each image in several splits, the names under which it occurs."""
    found = {}
    for name, index, _ in track(candidates, "comparing splits"):
        content = splits[name].content(index)
        found.setdefault(hashlib.sha256(content).digest(), []).append((name, index))
    return [
        [f"{splits[name].name_of(index)} ({name})" for name, index in found_as]
        for found_as in found.values()
        if len({name for name, _ in found_as}) > 1
    ]
