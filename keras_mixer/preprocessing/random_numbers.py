"""Stateless random numbers for the images of a batch, or for the part that one process prepares.

The numbers of an image depend on the seed and its position in the whole batch, not on the part.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

_PER_COUNTER = 4  # float32 numbers for each value of a Philox counter


class BatchPart(NamedTuple):
    """The images of a batch that one process prepares.

    Attributes:
        indices: int array `(n,)`: their positions in the whole batch.
        batch_size: int. Number of images in the whole batch.
    """

    indices: np.ndarray
    batch_size: int


def sample(distribution, images, part=None, axis=0):
    """Samples random numbers for images.

    Args:
        distribution: Function of a number of images that returns a tensor with as many along
            `axis`.
        images: tensor `(n, ...)`.
        part: `BatchPart` that the images are; None for a whole batch.
        axis: int.
    """
    if part is None:
        return distribution(tf.shape(images)[0])
    return tf.gather(distribution(part.batch_size), part.indices, axis=axis)


def sample_pixels(images, seed, high, part=None):
    """Samples a number from 0 to `high` for every value of the images, float32 of their shape.

    The numbers of other images of the batch are skipped, as they could take gigabytes.
    """
    shape = tf.shape(images, tf.int64)
    if part is None:
        return tf.random.stateless_uniform(shape, seed, 0.0, high)
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    size = tf.reduce_prod(shape[1:])

    def numbers(indices):
        """Returns the numbers of images at successive positions."""
        skipped = int(indices[0]) * size
        later = counter + tf.cast([skipped // _PER_COUNTER, 0], tf.uint64)
        count = skipped % _PER_COUNTER + len(indices) * size
        sampled = tf.raw_ops.StatelessRandomUniformV2(shape=[count], key=key, counter=later, alg=1)
        return sampled[skipped % _PER_COUNTER :]

    runs = np.split(part.indices, np.flatnonzero(np.diff(part.indices) != 1) + 1)
    return tf.reshape(tf.concat([numbers(run) for run in runs], axis=0), shape) * high
