"""Augmentation of training images: flip, crops, color jitter, random erasing, MixUp, CutMix.

Random numbers depend only on (seed, step, index in the batch), so that a resumed run sees the same
images as an uninterrupted one. Unless stated otherwise, `images` are
`(batch, height, width, channels)` with values from 0 to 255 and 1 or 3 channels, and `seed` is an
int tensor `(2,)`: the run's seed and the step. `part` is the part of a batch that they are.
"""

import math

import tensorflow as tf

from keras_mixer.preprocessing.randaugment import jitter_color, rand_augment
from keras_mixer.preprocessing.random_numbers import sample, sample_pixels
from keras_mixer.preprocessing.resize import resize_images

_KINDS = "flip crop randaugment jitter erase inception mixup cutmix either"
_SALTS = {kind: salt for salt, kind in enumerate(_KINDS.split(), start=1)}


def augment(
    images,
    seed,
    *,
    flip=False,
    crop_padding=0,
    randaugment=None,
    color_jitter=0.0,
    random_erasing=0.0,
    part=None,
):
    """Augments a batch of training images, in the order of the arguments.

    Args:
        images: tensor `(batch, height, width, channels)`.
        seed: int tensor `(2,)`: the run's seed and the step.
        flip: bool. See `random_flip`.
        crop_padding: int, in pixels. See `random_padded_crop`.
        randaugment: None or (layers, magnitude). See `randaugment.rand_augment`.
        color_jitter: float, at least 0. See `randaugment.jitter_color`.
        random_erasing: float in [0, 1], a probability. See `random_erase`.
        part: `random_numbers.BatchPart`; None for a whole batch.

    Returns:
        A tensor of the same shape; float32, but of the same type after flips and crops alone.
    """
    if flip:
        images = random_flip(images, _salted(seed, "flip"), part)
    if crop_padding:
        images = random_padded_crop(images, _salted(seed, "crop"), crop_padding, part)
    if randaugment:
        images = rand_augment(images, _salted(seed, "randaugment"), *randaugment, part)
    if color_jitter:
        images = jitter_color(images, _salted(seed, "jitter"), color_jitter, part)
    if random_erasing:
        images = random_erase(images, _salted(seed, "erase"), random_erasing, part)
    return images


def _salted(seed, kind):
    """Derives a seed for one kind of augmentation."""
    return tf.random.fold_in(seed, _SALTS[kind])


# === Flips and crops ===


def random_flip(images, seed, part=None):
    """Flips each image of a batch left to right with probability 1/2."""
    numbers = sample(lambda n: tf.random.stateless_uniform((n, 1, 1, 1), seed), images, part)
    return tf.where(numbers < 0.5, tf.reverse(images, axis=[2]), images)


def random_padded_crop(images, seed, padding, part=None):
    """Pads each side with `padding` black pixels, then crops each image at random to its size."""
    height, width = tf.shape(images)[1], tf.shape(images)[2]

    def offset(count):
        return tf.random.stateless_uniform((count, 2), seed, 0, 2 * padding + 1, tf.int32)

    offsets = sample(offset, images, part)
    padded = tf.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    down = offsets[:, :1] + tf.range(height)  # (batch, height)
    right = offsets[:, 1:] + tf.range(width)  # (batch, width)
    cropped = tf.gather(padded, down, axis=1, batch_dims=1)
    cropped = tf.gather(cropped, right, axis=2, batch_dims=1)
    return tf.ensure_shape(cropped, images.shape)


def inception_crop(image, seed, image_shape, smallest_area):
    """Random resized crop of one image, the "inception crop" of big_vision (Szegedy et al. 2014).

    Args:
        image: tensor `(height, width, channels)`, uint8 or float with the same result.
        seed: int tensor `(2,)`: the run's seed and the position of the image in the run.
        image_shape: (height, width) to resize to, in pixels.
        smallest_area: float in (0, 1]. See `inception_box`.

    Returns:
        float32 tensor `(*image_shape, channels)`.
    """
    top, left, height, width = tf.unstack(inception_box(tf.shape(image), seed, smallest_area))
    box = image[top : top + height, left : left + width]
    return resize_images(box, image_shape)


def inception_box(shape, seed, smallest_area):
    """Samples the box of `inception_crop`.

    The aspect ratio, width by height, is uniform in [3/4, 4/3]. The area is in [`smallest_area`, 1]
    of the image; the height, not the area, is uniform, as in the TensorFlow op, which the official
    code uses, too. If a hundred attempts find no box, as in a panorama, it is the whole image.

    Args:
        shape: int tensor `(3,)`: height, width and channels of the image.
        seed: int tensor `(2,)`: the run's seed and the position of the image in the run.
        smallest_area: float in (0, 1]. Share of the image's area; 0.05 in the official code.

    Returns:
        int32 tensor `(4,)`: top, left, height, width, in pixels.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((1, 0, 4)),  # no objects to keep
        _salted(seed, "inception"),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(smallest_area, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], axis=0)


# === Random erasing ===

ERASED_AREA = (0.02, 1 / 3)  # of the image; the paper ends at 0.4, timm at 1/3
ERASED_ASPECT = (0.3, 1 / 0.3)  # height by width


def random_erase(images, seed, probability, part=None):
    """Replaces a random rectangle by noise (random erasing, Zhong et al. 2017).

    The area and the aspect ratio (on a log scale) are uniform in the ranges above; aspect ratios
    at which the rectangle would not fit are never sampled. Every pixel and channel gets its own
    value, uniform in [0, 255]: the paper's best filling.

    Args:
        images: tensor `(batch, height, width, channels)`.
        seed: int tensor `(2,)`.
        probability: float in [0, 1], for each image.
        part: `random_numbers.BatchPart`; None for a whole batch.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    numbers = sample(lambda n: tf.random.stateless_uniform((5, n), seed), images, part, axis=1)
    erases, *numbers = tf.unstack(numbers)
    box = _erased_box(*numbers, tf.cast(height, tf.float32), tf.cast(width, tf.float32))
    inside = _box_masks(*box, height, width) & (erases < probability)[:, None, None, None]
    noise = sample_pixels(images, tf.random.fold_in(seed, 1), 255.0, part)
    return tf.where(inside, noise, images)


def _erased_box(area, aspect, top, left, height, width):
    """Converts random numbers in [0, 1), one per image, to (top, left, height, width)."""
    area = (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])) * height * width
    lowest = tf.maximum(math.log(ERASED_ASPECT[0]), tf.math.log(area / width**2))
    highest = tf.minimum(math.log(ERASED_ASPECT[1]), tf.math.log(height**2 / area))
    aspect = tf.exp(lowest + aspect * (highest - lowest))
    box_height = tf.clip_by_value(tf.round(tf.sqrt(area * aspect)), 1.0, height)
    box_width = tf.clip_by_value(tf.round(tf.sqrt(area / aspect)), 1.0, width)
    top = tf.floor(top * (height - box_height + 1))
    left = tf.floor(left * (width - box_width + 1))
    return top, left, box_height, box_width


def _box_masks(top, left, box_height, box_width, height, width):
    """Returns a bool tensor `(batch, height, width, 1)`: the pixels inside each image's box."""

    def between(start, length, size):
        pixels, start = tf.range(size), tf.cast(start, tf.int32)[:, None]
        return (pixels >= start) & (pixels < start + tf.cast(length, tf.int32)[:, None])

    rows, columns = between(top, box_height, height), between(left, box_width, width)
    return (rows[:, :, None] & columns[:, None, :])[..., None]


# === Mixing images and labels ===


def mix(images, labels, seed, *, mixup=0.0, cutmix=0.0, part=None):
    """Applies MixUp or CutMix to each image and its predecessor in the batch (the first: the last).

    MixUp (Zhang et al. 2017) averages the two images with a weight from Beta(mixup, mixup). CutMix
    (Yun et al. 2019) pastes a box of the predecessor, whose share of the area is from
    Beta(cutmix, cutmix) before clipping at the border. Weights are sampled per image; with both on,
    each image undergoes either with probability 1/2.

    Labels are averaged with the share of pixels, for CutMix after clipping. So training accuracy
    counts a prediction as correct if it is the class with the largest share.

    Args:
        images: tensor `(batch, height, width, channels)`.
        labels: float tensor `(batch, classes)`, one-hot or smoothed.
        seed: int tensor `(2,)`: the run's seed and the step.
        mixup: float, at least 0; 0 for no MixUp.
        cutmix: float, at least 0; 0 for no CutMix.
        part: `random_numbers.BatchPart`; None for a whole batch. The first image is mixed with the
            last one given.

    Returns:
        (images, labels) of the same shapes; mixed images are float32.
    """
    if not (mixup or cutmix):
        return images, labels
    images = tf.cast(images, tf.float32)
    weights, shares = _mixing_weights(images, seed, mixup, cutmix, part)
    images = weights * images + (1 - weights) * tf.roll(images, 1, axis=0)
    shares = tf.cast(shares, labels.dtype)[:, None]
    labels = shares * labels + (1 - shares) * tf.roll(labels, 1, axis=0)
    return tf.clip_by_value(images, 0.0, 255.0), labels


def _mixing_weights(images, seed, mixup, cutmix, part):
    """Returns the weight of each image: per pixel, `(batch, ...)`, and in total, `(batch,)`."""
    if not cutmix:
        return _mixup_weights(images, _salted(seed, "mixup"), mixup, part)
    if not mixup:
        return _cutmix_weights(images, _salted(seed, "cutmix"), cutmix, part)
    either = _salted(seed, "either")
    added = sample(lambda n: tf.random.stateless_uniform((n,), either), images, part) < 0.5
    added_weights, added_shares = _mixing_weights(images, seed, mixup, 0.0, part)
    cut_weights, cut_shares = _mixing_weights(images, seed, 0.0, cutmix, part)
    weights = tf.where(added[:, None, None, None], added_weights, cut_weights)
    return weights, tf.where(added, added_shares, cut_shares)


def _mixup_weights(images, seed, alpha, part):
    shares = sample(lambda n: _beta(seed, alpha, n), images, part)
    return shares[:, None, None, None], shares


def _cutmix_weights(images, seed, alpha, part):
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    betas = sample(lambda n: _beta(seed, alpha, n), images, part)
    side = tf.sqrt(1 - betas)  # of the box, as a share of the image's
    centers_seed = tf.random.fold_in(seed, 2)
    centers = sample(
        lambda n: tf.random.stateless_uniform((2, n), centers_seed), images, part, axis=1
    )

    def span(center, size):
        size = tf.cast(size, tf.float32)
        length, center = tf.floor(side * size), tf.floor(center * size)
        return center - tf.floor(length / 2), length  # the masks clip at the border

    (top, box_height), (left, box_width) = span(centers[0], height), span(centers[1], width)
    masks = _box_masks(top, left, box_height, box_width, height, width)
    weights = 1 - tf.cast(masks, tf.float32)
    pixels = tf.cast(tf.math.count_nonzero(masks, axis=(1, 2, 3)), tf.float32)
    return weights, 1 - pixels / tf.cast(height * width, tf.float32)


def _beta(seed, alpha, count):
    """Samples `(count,)` from Beta(alpha, alpha), in float64: small alphas underflow in float32."""
    alphas = tf.constant(alpha, tf.float64)
    one, other = tf.unstack(tf.random.stateless_gamma((2, count), seed, alphas, dtype=tf.float64))
    return tf.cast(one / (one + other), tf.float32)
