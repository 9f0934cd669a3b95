"""Random numbers for the images of a batch, or for the part of them that one process prepares.

An image's numbers depend on the seed and its place in the whole batch, not on the part.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

_AT_ONCE = 4  # float32 numbers of a Philox counter


class Rows(NamedTuple):
    """Which images of a batch are prepared.

    Attributes:
        indices: int array `(n,)`: their places in the batch.
        batch: int. Number of images in the whole batch.
    """

    indices: np.ndarray
    batch: int


def draw(sample, images, rows=None, axis=0):
    """Draws random numbers for images.

    Args:
        sample: Function of a number of images that returns a tensor with as many along `axis`.
        images: tensor `(n, ...)`.
        rows: `Rows` of the images; None for a whole batch.
        axis: int.
    """
    if rows is None:
        return sample(tf.shape(images)[0])
    return tf.gather(sample(rows.batch), rows.indices, axis=axis)


def draw_pixels(images, seed, high, rows=None):
    """Draws a number from 0 to `high` for every value of the images, float32 of their shape.

    Other images' numbers are not drawn but skipped, as they could be gigabytes.
    """
    shape = tf.shape(images, tf.int64)
    if rows is None:
        return tf.random.stateless_uniform(shape, seed, 0.0, high)
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    size = tf.reduce_prod(shape[1:])

    def numbers(indices):
        """Returns the numbers of images that follow each other."""
        skipped = int(indices[0]) * size
        later = counter + tf.cast([skipped // _AT_ONCE, 0], tf.uint64)
        count = skipped % _AT_ONCE + len(indices) * size
        drawn = tf.raw_ops.StatelessRandomUniformV2(shape=[count], key=key, counter=later, alg=1)
        return drawn[skipped % _AT_ONCE :]

    runs = np.split(rows.indices, np.flatnonzero(np.diff(rows.indices) != 1) + 1)
    return tf.reshape(tf.concat([numbers(run) for run in runs], axis=0), shape) * high
