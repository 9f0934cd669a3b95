"""tf.data pipelines for training and evaluation.

The order of training images is a function of (seed, epoch, index), so that a pipeline can start at
any step and yield what an uninterrupted one would.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_mixer.data.splits import ArrayImages, FileImages
from keras_mixer.data.tfrecords import RecordImages
from keras_mixer.errors import InputError
from keras_mixer.log import logger, track
from keras_mixer.preprocessing.augment import augment, inception_crop, mix
from keras_mixer.preprocessing.decode import decode_image, refuse_large
from keras_mixer.preprocessing.random_numbers import BatchPart
from keras_mixer.preprocessing.resize import fit_images, preprocess, to_model_range

ORDER_SALT = 0x4D49  # gives the order of images another seed than their augmentation
EVALUATION_BATCH_SIZE = 256
KEPT_BYTES = 2 * 10**9  # of memory, for decoded training images
# tf.random.experimental.index_shuffle has 4, with which epochs correlate (TensorFlow 2.21).
_SHUFFLE_ROUNDS = 8


class Part(NamedTuple):
    """The part of all images, or of every batch, that one of several processes reads.

    Attributes:
        index: int. Number of the process, from 0.
        count: int. Number of processes.
    """

    index: int
    count: int

    def bounds(self, size):
        """Returns the first of `size` items that is in this part, and the first after it."""
        return self.index * size // self.count, (self.index + 1) * size // self.count

    def of_batch(self, batch_size, with_predecessor):
        """Returns the `BatchPart` of a batch, beginning with the image before it if required."""
        start, stop = self.bounds(batch_size)
        return BatchPart(np.arange(start - with_predecessor, stop) % batch_size, batch_size)


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
    part=None,
    **augmentation,
):
    """Makes infinite batches of augmented training images, from a given step on.

    Every epoch is a new permutation of the images. The remainder that does not fill a batch is
    dropped, so an epoch has `len(split) // batch_size` steps.

    Args:
        split: `splits.Images`.
        spec: `ModelSpec`.
        batch_size: int, at most `len(split)`.
        seed: int, for the order of each epoch and the augmentation of each step.
        first_step: int. Number of steps to skip.
        label_smoothing: float in [0, 1). Share of every label spread evenly over all classes.
        class_weights: float array `(num_classes,)` or None. Mixed images get the weighted mean.
        inception_crop: float in [0, 1]. Smallest area of a random resized crop, as a share of the
            image's; 0 for none. See `augment.inception_crop`.
        mixup, cutmix: float. See `augment.mix`.
        part: `Part` of every batch that is read and returned; None for the whole. The parts of
            all processes, one after another, are the batch.
        **augmentation: See `augment.augment`.

    Returns:
        A `tf.data.Dataset` of infinite cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], float32 labels `(batch, num_classes)`) and,
        with class weights, float32 weights `(batch,)`.

    Raises:
        InputError: If there are fewer images than in a batch.
    """
    if batch_size > len(split):
        raise InputError(f"batch_size={batch_size}: there are only {len(split)} images")
    num_classes = spec.architecture.num_classes
    mixes = bool(mixup or cutmix)
    batch_part = part and part.of_batch(batch_size, with_predecessor=mixes)
    positions = _training_positions(first_step, batch_size, batch_part)

    def finish(position, images, labels):
        step_seed = tf.stack([tf.constant(seed, tf.int64), position[0] // batch_size])
        images = augment(images, step_seed, **augmentation, part=batch_part)
        labels = tf.one_hot(labels, num_classes)
        images, labels = mix(images, labels, step_seed, mixup=mixup, cutmix=cutmix, part=batch_part)
        if part and mixes:
            images, labels = images[1:], labels[1:]
        smoothed = labels * (1 - label_smoothing) + label_smoothing / num_classes
        inputs = to_model_range(images)
        if class_weights is None:
            return inputs, smoothed
        return inputs, smoothed, tf.linalg.matvec(labels, class_weights)

    index_of = functools.partial(shuffled_index, seed=seed, count=len(split), batch_size=batch_size)
    prepare = _random_crop(spec, seed, inception_crop) if inception_crop else _whole_image(spec)
    read = _reader_of(split, in_batches=not inception_crop)
    size = len(batch_part.indices) if batch_part else batch_size
    batches = read(positions, index_of, prepare, split, size, True)
    return batches.map(finish, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


def _training_positions(first_step, batch_size, batch_part):
    """Returns a dataset of positions in the run: the numbers of images before each.

    Dataset.counter would leave a function in memory (TensorFlow 2.21).
    """
    if batch_part is None:
        return tf.data.Dataset.range(first_step * batch_size, tf.int64.max).repeat()
    indices = tf.constant(batch_part.indices, tf.int64)
    size = len(batch_part.indices)
    counts = tf.data.Dataset.range(first_step * size, tf.int64.max).repeat()
    return counts.map(lambda count: count // size * batch_size + indices[count % size])


def evaluation_batches(split, spec, batch_size=EVALUATION_BATCH_SIZE, part=None):
    """Makes batches of every image of a split, in order; the last batch may be smaller.

    Args:
        split: `splits.Images`.
        spec: `ModelSpec`.
        batch_size: int.
        part: `Part` of the images; None for all.

    Returns:
        A `tf.data.Dataset` of known cardinality with elements (float32 images
        `(batch, height, width, channels)` in [-1, 1], int64 labels `(batch,)`).
    """
    positions = tf.data.Dataset.range(*(part.bounds(len(split)) if part else (0, len(split))))

    def prepare(image, position):
        return preprocess(image, spec)

    read = _reader_of(split, in_batches=True)
    batches = read(positions, tf.identity, prepare, split, batch_size, False)
    return batches.map(lambda _, *batch: batch, **_IN_ORDER).prefetch(tf.data.AUTOTUNE)


def shuffled_index(position, *, seed, count, batch_size):
    """Returns the index of the training image at a position of the run.

    It is `permutation(seed, epoch)[position % images_per_epoch]`.

    Args:
        position: int64 tensor `()` or `(n,)`: number of images before, over the whole run. All
            positions must be in one epoch, as in a batch.
        seed: int.
        count: int. Number of images in the split.
        batch_size: int.

    Returns:
        int64 tensor of the same shape.
    """
    images_per_epoch = count // batch_size * batch_size
    return tf.raw_ops.RandomIndexShuffle(
        index=position % images_per_epoch,
        seed=_order_key(seed, tf.reduce_min(position) // images_per_epoch),
        max_index=tf.constant(count - 1, tf.int64),
        rounds=_SHUFFLE_ROUNDS,
    )


def _order_key(seed, epoch):
    """Returns a random key `(3,)` for the order of an epoch.

    The op cuts each of the three numbers to about half of the bits of the index, but at least 8, so
    there are 16 million orders or more. Seeds and epochs are therefore hashed: as they are, orders
    would repeat after a few hundred of them.
    """
    pair = tf.stack([tf.constant(seed ^ ORDER_SALT, tf.int64), epoch])
    return tf.random.stateless_uniform([3], pair, None, None, tf.int32, alg="philox")


# === Preparing: one image, or a batch of one size, by position ===


def _whole_image(spec):
    return lambda image, position: fit_images(image, spec)


def _random_crop(spec, seed, smallest_area):
    def crop(image, position):
        image_seed = tf.stack([tf.constant(seed, tf.int64), position])
        return inception_crop(image, image_seed, spec.architecture.image_shape, smallest_area)

    return crop


# === Reading: makes batches of (positions, images, labels) ===


@dataclasses.dataclass(frozen=True, eq=False)
class _DecodedImages:
    """Decoded images of different sizes.

    Attributes:
        pixels: uint8 array, all images one after another.
        shapes: int64 array `(n, 3)`: height, width and channels of each.
        labels: int64 array `(n,)` of class indices.
    """

    pixels: np.ndarray
    shapes: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    @property
    def channels(self):
        return int(self.shapes[0, 2])

    @property
    def starts(self):
        """Index of each image's first value in `pixels`."""
        sizes = self.shapes.prod(axis=1)
        return np.cumsum(sizes) - sizes


_IN_ORDER = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}


def _gather_arrays(positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads arrays in memory a batch at a time."""
    pixels, labels = tf.constant(split.pixels), tf.constant(split.labels)

    def gather(position):
        index = index_of(position)
        return position, prepare(tf.gather(pixels, index), position), tf.gather(labels, index)

    return positions.batch(batch_size, drop_remainder=drop_remainder).map(gather, **_IN_ORDER)


def _read_one_by_one(image_getter, positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads images one by one with a function of a split that returns one from index to image."""
    image_at, labels = image_getter(split), tf.constant(split.labels)

    def read(position):
        index = index_of(position)
        return position, prepare(image_at(index), position), labels[index]

    return positions.map(read, **_IN_ORDER).batch(batch_size, drop_remainder=drop_remainder)


def _array_getter(split):
    pixels = tf.constant(split.pixels)
    return lambda index: pixels[index]


def _file_getter(split):
    paths = tf.constant(split.paths)
    return lambda index: decode_image(tf.io.read_file(paths[index]), split.channels)


def _decoded_getter(split):
    pixels, shapes, starts = map(tf.constant, (split.pixels, split.shapes, split.starts))

    def image_at(index):
        shape, start = shapes[index], starts[index]
        image = tf.reshape(pixels[start : start + tf.reduce_prod(shape)], shape)
        return tf.ensure_shape(image, (None, None, split.channels))

    return image_at


def _read_records(positions, index_of, prepare, split, batch_size, drop_remainder):
    """Reads records a batch at a time, seven times as fast as one by one."""

    def load(position):
        return position, *_load_records(split, index_of(position))

    def decode(position, content, label):
        image = decode_image(refuse_large(content), split.channels)
        return position, prepare(image, position), label

    in_batches = positions.batch(batch_size, drop_remainder=drop_remainder)
    one_by_one = in_batches.map(load, **_IN_ORDER).unbatch().map(decode, **_IN_ORDER)
    batches = one_by_one.batch(batch_size, drop_remainder=drop_remainder)
    return batches.apply(tf.data.experimental.assert_cardinality(in_batches.cardinality()))


def _load_records(split, indices):
    """Returns (encoded images `(n,)`, int64 labels `(n,)`), in one call into Python."""
    examples = tf.numpy_function(split.read, [indices], tf.string, stateful=False)
    examples.set_shape(indices.shape)
    features = {
        split.image_key: tf.io.FixedLenFeature((), tf.string),
        split.label_key: tf.io.FixedLenFeature((), tf.int64),
    }
    parsed = tf.io.parse_example(examples, features)
    label = parsed[split.label_key]
    known = tf.debugging.Assert(tf.reduce_all((label >= 0) & (label < split.num_classes)), [label])
    with tf.control_dependencies([known]):
        return parsed[split.image_key], tf.identity(label)


_READERS = {
    ArrayImages: _gather_arrays,
    FileImages: functools.partial(_read_one_by_one, _file_getter),
    RecordImages: _read_records,
    _DecodedImages: functools.partial(_read_one_by_one, _decoded_getter),
}


def _reader_of(split, in_batches):
    """Returns the reader of a split; `in_batches` if a whole batch can be prepared together."""
    if type(split) is ArrayImages and not in_batches:
        return functools.partial(_read_one_by_one, _array_getter)
    return _READERS[type(split)]


# === Keeping decoded images in memory ===


def keep_in_memory(split):
    """Returns the images of a split, decoded once and kept, if they take at most KEPT_BYTES.

    The batches of the result are the same, bit for bit.

    Args:
        split: `splits.Images`.

    Returns:
        `Images` for `training_batches`: `split` itself if it does not fit, or has arrays.
    """
    if isinstance(split, ArrayImages) or _decoded_size(split) > KEPT_BYTES:
        return split
    images, labels, size = [], [], 0
    elements = _decoded(split, tf.data.Dataset.range(len(split)))
    for _, image, label in track(elements, "decoding images", len(split)):
        images.append(image[0])
        labels.append(label[0])
        if (size := size + image.nbytes) > KEPT_BYTES:  # the sample had smaller ones
            return split
    logger.info(f"{len(images):,} images are decoded and kept in memory: {size / 1e6:,.0f} MB")
    return _as_arrays(images, np.array(labels))


def _decoded_size(split):
    """Returns the size of all images when decoded, in bytes, estimated from a few."""
    sample = np.linspace(0, len(split) - 1, min(len(split), 32)).astype(np.int64)
    elements = _decoded(split, tf.data.Dataset.from_tensor_slices(sample))
    return len(split) * np.mean([image.nbytes for _, image, _ in elements])


def _decoded(split, positions):
    """Yields (position, decoded image, label) of some images, as arrays with a batch axis of 1."""
    read = _READERS[type(split)]
    batches = read(positions, tf.identity, lambda image, _: image, split, 1, False)
    return batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def _as_arrays(images, labels):
    if len({image.shape for image in images}) == 1:
        return ArrayImages(np.stack(images), labels)
    pixels = np.concatenate([image.ravel() for image in images])
    return _DecodedImages(pixels, np.array([image.shape for image in images], np.int64), labels)
