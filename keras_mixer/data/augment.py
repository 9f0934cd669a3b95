"""Augmentation of training batches: every draw is a pure function of (seed, step, place in batch).

Stateless draws are what make a resumed run see the very images that the uninterrupted one saw.
"""

import tensorflow as tf


def augment(images, seed, *, flip=False, crop_padding=0):
    """Augments a batch of training images.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        seed: int tensor `(2,)`: the run's seed and the number of the step.
        flip: bool. Mirror each image left to right with probability 1/2.
        crop_padding: int, in pixels. Pad every side with black and cut the original size out at a
            random place.

    Returns:
        A tensor of the same shape and type.
    """
    if flip:
        images = random_flip(images, _salted(seed, 1))
    if crop_padding:
        images = random_padded_crop(images, _salted(seed, 2), crop_padding)
    return images


def _salted(seed, salt):
    """Gives each kind of augmentation draws of its own from the one seed."""
    return tf.random.fold_in(seed, salt)


def random_flip(images, seed):
    """Mirrors each image left to right with probability 1/2.

    Args:
        images: tensor `(batch, height, width, channels)`.
        seed: int tensor `(2,)`.
    """
    draws = tf.random.stateless_uniform((tf.shape(images)[0], 1, 1, 1), seed)
    return tf.where(draws < 0.5, tf.reverse(images, axis=[2]), images)


def random_padded_crop(images, seed, padding):
    """Pads every side with black and cuts the original size out at a random place per image.

    Args:
        images: tensor `(batch, height, width, channels)`.
        seed: int tensor `(2,)`.
        padding: int, in pixels.
    """
    batch, height, width = (tf.shape(images)[axis] for axis in range(3))
    offsets = tf.random.stateless_uniform((batch, 2), seed, 0, 2 * padding + 1, tf.int32)
    padded = tf.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = offsets[:, :1] + tf.range(height)  # (batch, height)
    columns = offsets[:, 1:] + tf.range(width)  # (batch, width)
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
    cropped = tf.gather(cropped, columns, axis=2, batch_dims=1)
    return tf.ensure_shape(cropped, images.shape)
