"""From a split to tf.data batches whose order is a pure function of (seed, epoch, index).

A training pipeline can therefore start at any step and yield what an uninterrupted one would.
"""

import contextlib

import tensorflow as tf

from keras_mixer import console
from keras_mixer.data.augment import augment
from keras_mixer.data.folders import refuse_files
from keras_mixer.data.images import (
    decode_image,
    find_undecodable,
    resize_images,
    to_model_range,
)

ORDER_SALT = 0x4D49  # keeps the seeds of the order apart from those of augmentation


def training_batches(
    split,
    *,
    image_shape,
    channels,
    num_classes,
    batch_size,
    seed,
    first_step=0,
    label_smoothing=0.0,
    flip=False,
    crop_padding=0,
):
    """Endless batches of augmented training images, from a given step on.

    Each epoch is a permutation of its own of all images; the remainder that does not fill a batch
    is dropped, so every batch has the same size and an epoch has `len(split) // batch_size` steps.

    Args:
        split: `splits.Split`.
        image_shape: (height, width) of the images to yield, in pixels.
        channels: int. Colour channels of the images to yield.
        num_classes: int. Width of the one-hot labels.
        batch_size: int. Images per batch, at most `len(split)`.
        seed: int. With the epoch it determines the order, with the step the augmentation.
        first_step: int. Number of steps that were taken before.
        label_smoothing: float in [0, 1). Share of every label spread evenly over all classes.
        flip: bool. See `augment.augment`.
        crop_padding: int, in pixels. See `augment.augment`.

    Returns:
        A `tf.data.Dataset` of infinite cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], float32 labels `(batch, num_classes)`).
    """

    positions = tf.data.Dataset.counter(first_step * batch_size)  # counted over the whole run

    def index_of(position):
        return shuffled_index(position, seed=seed, count=len(split), batch_size=batch_size)

    def finish(position, images, labels):
        step_seed = tf.stack([tf.constant(seed, tf.int64), position[0] // batch_size])
        images = augment(images, step_seed, flip=flip, crop_padding=crop_padding)
        labels = tf.one_hot(labels, num_classes)
        labels = labels * (1 - label_smoothing) + label_smoothing / num_classes
        return to_model_range(images), labels

    read = _reader_of(split)
    batches = read(positions, index_of, split, image_shape, channels, batch_size, True)
    return batches.map(finish, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split, *, image_shape, channels, num_classes, batch_size):
    """Every image of a split exactly once, in order; the last batch may be smaller.

    Args:
        split: `splits.Split`.
        image_shape: (height, width) of the images to yield, in pixels.
        channels: int. Colour channels of the images to yield.
        num_classes: int. Width of the one-hot labels.
        batch_size: int. Images per batch.

    Returns:
        A `tf.data.Dataset` of known cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], float32 labels `(batch, num_classes)`).
    """
    positions = tf.data.Dataset.range(len(split))

    def finish(position, images, labels):
        return to_model_range(images), tf.one_hot(labels, num_classes)

    read = _reader_of(split)
    batches = read(positions, tf.identity, split, image_shape, channels, batch_size, False)
    return batches.map(finish, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


def shuffled_index(position, *, seed, count, batch_size):
    """Index of the training image at a position of the run.

    ```
    epoch, place = divmod(position, count // batch_size * batch_size)
    index = permutation(seed, epoch)[place]
    ```

    Args:
        position: int64 tensor `()` or `(n,)`: images drawn before, over the whole run. Several
            positions must be of one epoch, as those of a batch are.
        seed: int.
        count: int. Images in the split.
        batch_size: int.

    Returns:
        int64 tensor of the same shape, with indices below `count`.
    """
    images_per_epoch = count // batch_size * batch_size
    epoch = tf.reduce_min(position) // images_per_epoch
    order_seed = tf.stack([tf.constant(seed ^ ORDER_SALT, tf.int64), epoch])
    place = position % images_per_epoch
    return tf.random.experimental.index_shuffle(place, order_seed, max_index=count - 1)


_IN_ORDER = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}


def _gather(positions, index_of, split, image_shape, channels, batch_size, drop_remainder):
    """Batches (positions, images, labels) out of arrays in memory."""
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    resized = split.images.shape[1:3] != tuple(image_shape)

    def gather(position):
        index = index_of(position)
        batch = tf.gather(images, index)
        batch = resize_images(batch, image_shape) if resized else batch
        return position, batch, tf.gather(labels, index)

    return positions.batch(batch_size, drop_remainder=drop_remainder).map(gather, **_IN_ORDER)


def _decode(positions, index_of, split, image_shape, channels, batch_size, drop_remainder):
    """Batches (positions, images, labels) out of image files."""
    paths, labels = tf.constant(split.images), tf.constant(split.labels)

    def decode(position):
        index = index_of(position)
        image = decode_image(tf.io.read_file(paths[index]), channels)
        return position, resize_images(image, image_shape), labels[index]

    return positions.map(decode, **_IN_ORDER).batch(batch_size, drop_remainder=drop_remainder)


def _decode_records(positions, index_of, split, image_shape, channels, batch_size, drop_remainder):
    """Batches (positions, images, labels) out of records, which are read a batch at a time."""

    def load(position):
        return position, *split.images.load(index_of(position))

    def decode(position, content, label):
        return position, resize_images(decode_image(content, channels), image_shape), label

    contents = positions.batch(batch_size, drop_remainder=drop_remainder).map(load, **_IN_ORDER)
    batches = contents.unbatch().map(decode, **_IN_ORDER).batch(batch_size, drop_remainder)
    count = positions.batch(batch_size, drop_remainder=drop_remainder).cardinality()
    return batches.apply(tf.data.experimental.assert_cardinality(count))


def _reader_of(split):
    if split.in_records:
        return _decode_records
    return _gather if split.in_memory else _decode


@contextlib.contextmanager
def broken_images_named(*splits):
    """Turns TensorFlow's failure to read an image, which may name no file, into one that does.

    Headers and ends of files are checked before a run; what happens to them later shows only here.

    Args:
        *splits: The `splits.Split`s that are read within the block; None is allowed.

    Raises:
        InputError: Names the files that cannot be decoded.
    """
    try:
        yield
    except (
        tf.errors.InvalidArgumentError,
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
    ):
        there = [split for split in splits if split is not None and not split.in_memory]
        for split in there:
            if split.in_records:
                split.images.refuse_undecodable()
        paths = [path for split in there if not split.in_records for path in split.images]
        refuse_files(find_undecodable(console.track(paths, "looking for broken images")))
        raise
