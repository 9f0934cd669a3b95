"""From a split to tf.data batches whose order is a pure function of (seed, epoch, index).

A training pipeline can therefore start at any step and yield what an uninterrupted one would.
"""

import contextlib

import tensorflow as tf

from keras_mixer import console
from keras_mixer.data.augment import augment, mix
from keras_mixer.data.augment import inception_crop as random_crop
from keras_mixer.data.decode import decode_image
from keras_mixer.data.images import find_undecodable, resize_images, to_model_range
from keras_mixer.data.verdicts import refuse_files

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
    class_weights=None,
    eval_crop=0.0,
    inception_crop=0.0,
    mixup=0.0,
    cutmix=0.0,
    **augmentation,
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
        class_weights: float array `(num_classes,)`, or None. A mixed image weighs what its classes
            do, by their shares.
        eval_crop: float in [0, 1]. How an image is fitted where `inception_crop` does not do it;
            see `images.resize_images`.
        inception_crop: float in [0, 1]. Smallest share of an image's area that a random crop
            keeps; 0 for none. See `augment.inception_crop`.
        mixup: float. See `augment.mix`.
        cutmix: float. See `augment.mix`.
        **augmentation: See `augment.augment`.

    Returns:
        A `tf.data.Dataset` of infinite cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], float32 labels `(batch, num_classes)`), and
        as a third part float32 weights `(batch,)` if there are class weights.
    """
    positions = tf.data.Dataset.counter(first_step * batch_size)  # counted over the whole run

    def index_of(position):
        return shuffled_index(position, seed=seed, count=len(split), batch_size=batch_size)

    def fit(image, position):
        if not inception_crop:
            return resize_images(image, image_shape, eval_crop)
        image_seed = tf.stack([tf.constant(seed, tf.int64), position])
        return random_crop(image, image_seed, image_shape, inception_crop)

    def finish(position, images, labels):
        step_seed = tf.stack([tf.constant(seed, tf.int64), position[0] // batch_size])
        images = augment(images, step_seed, **augmentation)
        labels = tf.one_hot(labels, num_classes)
        images, labels = mix(images, labels, step_seed, mixup=mixup, cutmix=cutmix)
        smoothed = labels * (1 - label_smoothing) + label_smoothing / num_classes
        if class_weights is None:
            return to_model_range(images), smoothed
        return to_model_range(images), smoothed, tf.linalg.matvec(labels, class_weights)

    read = _reader_of(split, at_once=not inception_crop)
    batches = read(positions, index_of, fit, split, channels, batch_size, True)
    return batches.map(finish, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split, *, image_shape, channels, num_classes, batch_size, eval_crop=0.0):
    """Every image of a split exactly once, in order; the last batch may be smaller.

    Args:
        split: `splits.Split`.
        image_shape: (height, width) of the images to yield, in pixels.
        channels: int. Colour channels of the images to yield.
        num_classes: int. Width of the one-hot labels.
        batch_size: int. Images per batch.
        eval_crop: float in [0, 1]. See `images.resize_images`.

    Returns:
        A `tf.data.Dataset` of known cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], float32 labels `(batch, num_classes)`).
    """
    positions = tf.data.Dataset.range(len(split))

    def fit(image, position):
        return resize_images(image, image_shape, eval_crop)

    def finish(position, images, labels):
        return to_model_range(images), tf.one_hot(labels, num_classes)

    read = _reader_of(split, at_once=True)
    batches = read(positions, tf.identity, fit, split, channels, batch_size, False)
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


def _gather(positions, index_of, fit, split, channels, batch_size, drop_remainder):
    """Batches (positions, images, labels) out of arrays in memory, a whole batch at a time."""
    images, labels = tf.constant(split.images), tf.constant(split.labels)

    def gather(position):
        index = index_of(position)
        return position, fit(tf.gather(images, index), position), tf.gather(labels, index)

    return positions.batch(batch_size, drop_remainder=drop_remainder).map(gather, **_IN_ORDER)


def _read(positions, index_of, fit, split, channels, batch_size, drop_remainder):
    """Batches (positions, images, labels) out of images that are read one by one."""
    images, labels = tf.constant(split.images), tf.constant(split.labels)

    def read(position):
        index = index_of(position)
        image = images[index]
        if not split.in_memory:
            image = decode_image(tf.io.read_file(image), channels)
        return position, fit(image, position), labels[index]

    return positions.map(read, **_IN_ORDER).batch(batch_size, drop_remainder=drop_remainder)


def _read_records(positions, index_of, fit, split, channels, batch_size, drop_remainder):
    """Batches (positions, images, labels) out of records.

    They are read a batch at a time, which was measured seven times faster than one by one.
    """

    def load(position):
        return position, *split.images.load(index_of(position))

    def decode(position, content, label):
        return position, fit(decode_image(content, channels), position), label

    in_batches = positions.batch(batch_size, drop_remainder=drop_remainder)
    one_by_one = in_batches.map(load, **_IN_ORDER).unbatch().map(decode, **_IN_ORDER)
    batches = one_by_one.batch(batch_size, drop_remainder=drop_remainder)
    return batches.apply(tf.data.experimental.assert_cardinality(in_batches.cardinality()))


def _reader_of(split, at_once):
    """Returns what makes batches of a split; `at_once` if its images may be fitted together."""
    if split.in_records:
        return _read_records
    return _gather if split.in_memory and at_once else _read


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
