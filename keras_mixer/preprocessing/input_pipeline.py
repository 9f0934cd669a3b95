"""From a split to tf.data batches whose order is a pure function of (seed, epoch, index).

A training pipeline can therefore start at any step and yield what an uninterrupted one would.
"""

import contextlib
import functools

import tensorflow as tf

from keras_mixer import console
from keras_mixer.data.image_checks import refuse_files
from keras_mixer.data.splits import ArrayImages, FileImages
from keras_mixer.data.tfrecords import RecordImages, refuse_records
from keras_mixer.preprocessing.augment import augment, inception_crop, mix
from keras_mixer.preprocessing.decode import decode_image, find_undecodable
from keras_mixer.preprocessing.resize import fit_images, preprocess, to_model_range

ORDER_SALT = 0x4D49  # keeps the seeds of the order apart from those of augmentation
EVALUATION_BATCH_SIZE = 256


def training_batches(
    split,
    spec,
    *,
    batch_size,
    seed,
    first_step=0,
    label_smoothing=0.0,
    class_weights=None,
    inception_crop=0.0,
    mixup=0.0,
    cutmix=0.0,
    **augmentation,
):
    """Endless batches of augmented training images, from a given step on.

    Each epoch is a permutation of its own of all images; the remainder that does not fill a batch
    is dropped, so every batch has the same size and an epoch has `len(split) // batch_size` steps.

    Args:
        split: `splits.Images`.
        spec: `ModelSpec`. How images are prepared, and the number of classes.
        batch_size: int. Images per batch, at most `len(split)`.
        seed: int. With the epoch it determines the order, with the step the augmentation.
        first_step: int. Number of steps that were taken before.
        label_smoothing: float in [0, 1). Share of every label spread evenly over all classes.
        class_weights: float array `(num_classes,)`, or None. A mixed image weighs what its classes
            do, by their shares.
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
    num_classes = spec.architecture.num_classes
    positions = tf.data.Dataset.counter(first_step * batch_size)  # counted over the whole run

    def finish(position, images, labels):
        step_seed = tf.stack([tf.constant(seed, tf.int64), position[0] // batch_size])
        images = augment(images, step_seed, **augmentation)
        labels = tf.one_hot(labels, num_classes)
        images, labels = mix(images, labels, step_seed, mixup=mixup, cutmix=cutmix)
        smoothed = labels * (1 - label_smoothing) + label_smoothing / num_classes
        if class_weights is None:
            return to_model_range(images), smoothed
        return to_model_range(images), smoothed, tf.linalg.matvec(labels, class_weights)

    index_of = functools.partial(shuffled_index, seed=seed, count=len(split), batch_size=batch_size)
    prepare = _random_crop(spec, seed, inception_crop) if inception_crop else _whole_image(spec)
    read = _reader_of(split, at_once=not inception_crop)
    batches = read(positions, index_of, prepare, split, batch_size, True)
    return batches.map(finish, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split, spec, batch_size=EVALUATION_BATCH_SIZE):
    """Every image of a split exactly once, in order; the last batch may be smaller.

    Args:
        split: `splits.Images`.
        spec: `ModelSpec`. How images are prepared.
        batch_size: int. Images per batch.

    Returns:
        A `tf.data.Dataset` of known cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], int64 labels `(batch,)`).
    """
    positions = tf.data.Dataset.range(len(split))

    def prepare(image, position):
        return preprocess(image, spec)

    read = _reader_of(split, at_once=True)
    batches = read(positions, tf.identity, prepare, split, batch_size, False)
    return batches.map(lambda _, *batch: batch, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


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


# === Preparing one image, or several of one size, at a position of the run ===


def _whole_image(spec):
    return lambda image, position: fit_images(image, spec)


def _random_crop(spec, seed, smallest_area):
    def crop(image, position):
        image_seed = tf.stack([tf.constant(seed, tf.int64), position])
        return inception_crop(image, image_seed, spec.architecture.image_shape, smallest_area)

    return crop


# === Reading: each makes batches of (positions, images, labels) ===

_IN_ORDER = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}


def _gather_arrays(positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads arrays in memory, a whole batch at a time."""
    pixels, labels = tf.constant(split.pixels), tf.constant(split.labels)

    def gather(position):
        index = index_of(position)
        return position, prepare(tf.gather(pixels, index), position), tf.gather(labels, index)

    return positions.batch(batch_size, drop_remainder=drop_remainder).map(gather, **_IN_ORDER)


def _read_arrays(positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads arrays in memory one by one, as a random crop of each needs it."""
    pixels, labels = tf.constant(split.pixels), tf.constant(split.labels)

    def read(position):
        index = index_of(position)
        return position, prepare(pixels[index], position), labels[index]

    return positions.map(read, **_IN_ORDER).batch(batch_size, drop_remainder=drop_remainder)


def _read_files(positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads image files one by one."""
    paths, labels = tf.constant(split.paths), tf.constant(split.labels)

    def read(position):
        index = index_of(position)
        image = decode_image(tf.io.read_file(paths[index]), split.channels)
        return position, prepare(image, position), labels[index]

    return positions.map(read, **_IN_ORDER).batch(batch_size, drop_remainder=drop_remainder)


def _read_records(positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads records a batch at a time, which was measured seven times faster than one by one."""

    def load(position):
        return position, *_load_records(split, index_of(position))

    def decode(position, content, label):
        return position, prepare(decode_image(content, split.channels), position), label

    in_batches = positions.batch(batch_size, drop_remainder=drop_remainder)
    one_by_one = in_batches.map(load, **_IN_ORDER).unbatch().map(decode, **_IN_ORDER)
    batches = one_by_one.batch(batch_size, drop_remainder=drop_remainder)
    return batches.apply(tf.data.experimental.assert_cardinality(in_batches.cardinality()))


def _load_records(split, indices):
    """Returns (encoded images `(n,)`, int64 labels `(n,)`): one call into Python for all."""
    examples = tf.numpy_function(split.read, [indices], tf.string, stateful=False)
    examples.set_shape(indices.shape)
    features = {
        split.image_key: tf.io.FixedLenFeature((), tf.string),
        split.label_key: tf.io.FixedLenFeature((), tf.int64),
    }
    parsed = tf.io.parse_example(examples, features)
    return parsed[split.image_key], parsed[split.label_key]


_READERS = {ArrayImages: _gather_arrays, FileImages: _read_files, RecordImages: _read_records}


def _reader_of(split, at_once):
    """Returns what makes batches of a split; `at_once` if its images may be prepared together."""
    return _READERS[type(split)] if at_once or type(split) is not ArrayImages else _read_arrays


# === Naming broken images ===


@contextlib.contextmanager
def broken_images_named(*splits):
    """Turns TensorFlow's failure to read an image, which may name no file, into one that does.

    Headers and ends of files are checked before a run; what happens to them later shows only here.

    Args:
        *splits: The `splits.Images` that are read within the block; None is allowed.

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
        for split in splits:
            if refuse := _REFUSALS.get(type(split)):
                refuse(split)
        raise


def _refuse_files(split):
    paths = console.track(split.paths, "looking for broken images")
    refuse_files(find_undecodable((p, functools.partial(tf.io.read_file, p)) for p in paths))


def _refuse_records(split):
    indices = console.track(range(len(split)), "looking for broken images")
    contents = ((split.place(index), split.image(index)) for index in indices)
    refuse_records(find_undecodable(contents, split.channels))


_REFUSALS = {FileImages: _refuse_files, RecordImages: _refuse_records}
