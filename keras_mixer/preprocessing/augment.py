"""Augmentation of training images: every draw is a pure function of (seed, step, place in batch).

Stateless draws are what make a resumed run see the very images that the uninterrupted one saw.
Everything takes pixel values from 0 to 255 and returns such, for 1 or 3 channels.
"""

import math

import tensorflow as tf

from keras_mixer.preprocessing.randaugment import jitter_color, rand_augment
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
):
    """Augments a batch of training images, in the order of the arguments.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        seed: int tensor `(2,)`: the run's seed and the number of the step.
        flip: bool. Mirror each image left to right with probability 1/2.
        crop_padding: int, in pixels. Pad every side with black and cut the original size out at a
            random place.
        randaugment: None or (int, number from 0 to 30): how many operations each image undergoes,
            and their magnitude. See `randaugment.rand_augment`.
        color_jitter: float, at least 0. See `randaugment.jitter_color`.
        random_erasing: float in [0, 1]. Probability that a part of an image becomes noise. See
            `random_erase`.

    Returns:
        A tensor of the same shape; of the same type, too, if there is only flipping and cropping,
        which move pixels and never change them, else float32.
    """
    if flip:
        images = random_flip(images, _salted(seed, "flip"))
    if crop_padding:
        images = random_padded_crop(images, _salted(seed, "crop"), crop_padding)
    if randaugment:
        images = rand_augment(images, _salted(seed, "randaugment"), *randaugment)
    if color_jitter:
        images = jitter_color(images, _salted(seed, "jitter"), color_jitter)
    if random_erasing:
        images = random_erase(images, _salted(seed, "erase"), random_erasing)
    return images


def _salted(seed, kind):
    """Gives each kind of augmentation draws of its own from the one seed."""
    return tf.random.fold_in(seed, _SALTS[kind])


# === Moving pixels ===


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


def inception_crop(image, seed, image_shape, smallest_area):
    """Cuts a random box out of one image and resizes it: the crop of Szegedy et al. 2014.

    Args:
        image: tensor `(height, width, channels)` of any size, pixel values from 0 to 255.
        seed: int tensor `(2,)`: the run's seed and the position of the image in the run.
        image_shape: (height, width) to resize to, in pixels.
        smallest_area: float in (0, 1]. See `inception_box`.

    Returns:
        float32 tensor `(*image_shape, channels)`, the same for uint8 and float images.
    """
    top, left, height, width = tf.unstack(inception_box(tf.shape(image), seed, smallest_area))
    box = image[top : top + height, left : left + width]
    return resize_images(box, image_shape)


def inception_box(shape, seed, smallest_area):
    """Draws the box of `inception_crop`.

    Its aspect ratio, width by height, is drawn evenly from 3/4 to 4/3, and it covers from
    `smallest_area` of the image to all of it; within that its height, not its area, is drawn
    evenly, as the TensorFlow op does that the official code uses, too. Where no such box fits in a
    hundred attempts, as in a panorama of which all is wanted, it is the whole image.

    Args:
        shape: int tensor `(3,)`: height, width and channels of the image.
        seed: int tensor `(2,)`: the run's seed and the position of the image in the run.
        smallest_area: float in (0, 1]. Share of the image's area. The official code takes 0.05.

    Returns:
        int32 tensor `(4,)`: top, left, height, width, in pixels.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((1, 0, 4)),  # no objects to keep in view
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


def random_erase(images, seed, probability):
    """Replaces a random rectangle of some images by noise (Zhong et al. 2017).

    Area and aspect ratio (evenly on a log scale) come from the ranges above. An aspect ratio at
    which the rectangle would not fit into the image is never drawn. Every pixel and channel of
    the rectangle gets a value of its own, evenly from 0 to 255: the paper's best filling.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        seed: int tensor `(2,)`.
        probability: float in [0, 1], of each image to lose a rectangle.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    batch, height, width = (tf.shape(images)[axis] for axis in range(3))
    erases, *draws = tf.unstack(tf.random.stateless_uniform((5, batch), seed))
    box = _erased_box(*draws, tf.cast(height, tf.float32), tf.cast(width, tf.float32))
    inside = _box_masks(*box, height, width) & (erases < probability)[:, None, None, None]
    noise = tf.random.stateless_uniform(tf.shape(images), tf.random.fold_in(seed, 1), 0.0, 255.0)
    return tf.where(inside, noise, images)


def _erased_box(area, aspect, top, left, height, width):
    """Turns draws from [0, 1), one per image, into boxes (top, left, height, width)."""
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
    """Bool tensor `(batch, height, width, 1)`: the pixels within each image's box."""

    def between(start, length, size):
        places, start = tf.range(size), tf.cast(start, tf.int32)[:, None]
        return (places >= start) & (places < start + tf.cast(length, tf.int32)[:, None])

    rows, columns = between(top, box_height, height), between(left, box_width, width)
    return (rows[:, :, None] & columns[:, None, :])[..., None]


# === Mixing images and labels ===


def mix(images, labels, seed, *, mixup=0.0, cutmix=0.0):
    """Mixes every image and its label with its predecessor in the batch, the first with the last.

    MixUp (Zhang et al. 2017) adds the two images up, weighted by a share from Beta(mixup, mixup).
    CutMix (Yun et al. 2019) puts a box of the predecessor in, the share of whose area is from
    Beta(cutmix, cutmix) before what sticks out of the image is cut off. Each image draws its own
    share. With both on, each image undergoes one of them, with probability 1/2.

    A label becomes the mean of the two, weighted by the share of the pixels (CutMix: as they are
    in the end). So a training accuracy that compares the greatest entries counts a prediction as
    right when it is the class with the largest share in the mixed label.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        labels: float tensor `(batch, classes)`, one-hot or smoothed.
        seed: int tensor `(2,)`: the run's seed and the number of the step.
        mixup: float, at least 0; 0 for no MixUp.
        cutmix: float, at least 0; 0 for no CutMix.

    Returns:
        (images, labels) of the same shapes. Images are float32 if anything was mixed.
    """
    if not (mixup or cutmix):
        return images, labels
    images = tf.cast(images, tf.float32)
    weights, shares = _mixing_weights(images, seed, mixup, cutmix)
    images = weights * images + (1 - weights) * tf.roll(images, 1, axis=0)
    shares = tf.cast(shares, labels.dtype)[:, None]
    labels = shares * labels + (1 - shares) * tf.roll(labels, 1, axis=0)
    return tf.clip_by_value(images, 0.0, 255.0), labels


def _mixing_weights(images, seed, mixup, cutmix):
    """What each image keeps of itself: per pixel `(batch, ...)`, and in all `(batch,)`."""
    if not cutmix:
        return _mixup_weights(images, _salted(seed, "mixup"), mixup)
    if not mixup:
        return _cutmix_weights(images, _salted(seed, "cutmix"), cutmix)
    added = tf.random.stateless_uniform((tf.shape(images)[0],), _salted(seed, "either")) < 0.5
    added_weights, added_shares = _mixing_weights(images, seed, mixup, 0.0)
    cut_weights, cut_shares = _mixing_weights(images, seed, 0.0, cutmix)
    weights = tf.where(added[:, None, None, None], added_weights, cut_weights)
    return weights, tf.where(added, added_shares, cut_shares)


def _mixup_weights(images, seed, alpha):
    shares = _beta(seed, alpha, tf.shape(images)[0])
    return shares[:, None, None, None], shares


def _cutmix_weights(images, seed, alpha):
    batch, height, width = (tf.shape(images)[axis] for axis in range(3))
    side = tf.sqrt(1 - _beta(seed, alpha, batch))  # of the box, as a share of the image's
    draws = tf.random.stateless_uniform((2, batch), tf.random.fold_in(seed, 2))

    def cut(center, size):
        size = tf.cast(size, tf.float32)
        length, center = tf.floor(side * size), tf.floor(center * size)
        return center - tf.floor(length / 2), length  # the masks have no pixels outside

    (top, box_height), (left, box_width) = cut(draws[0], height), cut(draws[1], width)
    masks = _box_masks(top, left, box_height, box_width, height, width)
    weights = 1 - tf.cast(masks, tf.float32)
    pixels = tf.cast(tf.math.count_nonzero(masks, axis=(1, 2, 3)), tf.float32)
    return weights, 1 - pixels / tf.cast(height * width, tf.float32)


def _beta(seed, alpha, count):
    """Draws `(count,)` from Beta(alpha, alpha).

    In float64, since small alphas mean gamma draws too small for float32, whose ratio is lost.
    """
    alphas = tf.constant(alpha, tf.float64)
    one, other = tf.unstack(tf.random.stateless_gamma((2, count), seed, alphas, dtype=tf.float64))
    return tf.cast(one / (one + other), tf.float32)
