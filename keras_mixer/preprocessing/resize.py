"""Preprocesses decoded images for a model: resizes them, then scales them to [-1, 1].

Training, evaluation, prediction and the exported model all call `preprocess` or, with augmentation
in between, its two halves.
"""

import functools
import math

import numpy as np
import tensorflow as tf

_MOST_TIMES = 16  # the size of the result that an image in between may have
_KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic"}  # as in tf.image.resize


def preprocess(images, spec):
    """Resizes decoded images and scales them to [-1, 1].

    Args:
        images: tensor `([batch,] height, width, channels)` with values from 0 to 255.
        spec: `ModelSpec`, for the image shape, the evaluation crop and the interpolation.

    Returns:
        float32 tensor `([batch,] *image_shape, channels)`.
    """
    return to_model_range(fit_images(images, spec))


def fit_images(images, spec):
    """Resizes decoded images: the first half of `preprocess`."""
    how = spec.preprocessing
    return resize_images(images, spec.architecture.image_shape, how.eval_crop, how.interpolation)


def resize_images(images, image_shape, eval_crop=0.0, interpolation="bilinear"):
    """Resizes images to a height and width, antialiased as in Pillow.

    Without `eval_crop`, the aspect ratio is not kept, as in the official fine-tuning code
    (vit_jax). Images that already have the shape do not change by a bit.

    With `eval_crop`, they are scaled, keeping the aspect ratio, to just cover
    `image_shape / eval_crop`, and the center is cropped: the paper's evaluation (big_vision,
    `resize_small(256)|central_crop(224)`: 0.875) but for its "area" filter. The scaled sides are
    rounded to the nearest pixel; an odd remainder is cut off at the bottom and right.

    Args:
        images: tensor `([batch,] height, width, channels)` with values from 0 to 255.
        image_shape: (height, width), in pixels.
        eval_crop: float in [0, 1]. Share kept of the scaled image's tighter side; 0 for no crop.
        interpolation: string, one of `architecture.INTERPOLATIONS`. Where bicubic overshoots 0 or
            255, values are clipped.

    Returns:
        float32 tensor `([batch,] *image_shape, channels)` with values from 0 to 255.
    """
    images = tf.convert_to_tensor(images)
    if eval_crop:
        shape = _covering_shape(images, image_shape, eval_crop)
        resized = _fit_center(images, shape, image_shape, interpolation)
    else:
        resized = _fit_whole(images, image_shape, interpolation)
    resized = tf.ensure_shape(resized, (*images.shape[:-3], *image_shape, images.shape[-1]))
    return tf.clip_by_value(resized, 0.0, 255.0)


def _fit_whole(images, image_shape, interpolation):
    """Resizes; columns first if there are few rows: the op would first enlarge them to all rows."""
    height, width = tf.shape(images)[-3], tf.shape(images)[-2]
    is_strip = (height < image_shape[0]) & (width > _MOST_TIMES * image_shape[1])

    def narrowed():
        rows = _resize(images, tf.stack([height, image_shape[1]]), interpolation)
        return _resize(rows, image_shape, interpolation)

    return tf.cond(is_strip, narrowed, lambda: _resize(images, image_shape, interpolation))


def _fit_center(images, shape, image_shape, interpolation):
    """Resizes and crops; crops first where the whole image, resized, would be too large."""

    def at_last():
        small = tf.cast(shape, tf.int32)
        return _center(_resize(images, small, interpolation), small, image_shape)

    too_large = tf.reduce_prod(shape) > _MOST_TIMES * math.prod(image_shape)
    return tf.cond(
        too_large, lambda: _resize_center(images, shape, image_shape, interpolation), at_last
    )


def _resize_center(images, shape, image_shape, interpolation):
    """Resizes to a shape, but computes only its center, from the pixels within its reach.

    The pixels are those of the whole image, resized, but for rounding.
    """
    sides = tf.cast(tf.shape(images)[-3:-1], tf.float64)
    scale = tf.cast(shape, tf.float64) / sides
    start = tf.cast((shape - image_shape) // 2, tf.float64)  # in the resized image
    reach = 3 * tf.maximum(1 / scale, 1)  # of the kernels: two pixels of the coarser image
    first = tf.maximum(tf.floor(start / scale - reach), 0)
    last = tf.minimum(tf.math.ceil((start + image_shape) / scale + reach), sides)
    (top, left), (bottom, right) = tf.unstack(first), tf.unstack(last)
    source = _crop(images, *(tf.cast(x, tf.int32) for x in (top, left, bottom, right)))
    batch = source if source.shape.rank == 4 else source[None]
    resized = tf.raw_ops.ScaleAndTranslate(
        images=batch,
        size=image_shape,
        scale=tf.cast(scale, tf.float32),
        translation=tf.cast(first * scale - start, tf.float32),
        kernel_type=_KERNELS[interpolation],
        antialias=True,
    )
    return resized if source.shape.rank == 4 else resized[0]


def _resize(images, shape, interpolation):
    """Resizes antialiased. Bilinear enlarging needs no antialiasing: an op five times as fast.

    The ops read bytes as they are; a photo of 80 million pixels would be 1 GB as floats.
    """

    def resize(method=interpolation, antialias=True):
        return tf.cast(tf.image.resize(images, shape, method, antialias=antialias), tf.float32)

    enlarge = functools.partial(resize, "bilinear", antialias=False)
    if interpolation != "bilinear":
        return resize()
    height, width = images.shape[-3:-1]
    if None not in (height, width) and not tf.is_tensor(shape):
        return enlarge() if height <= shape[0] and width <= shape[1] else resize()
    return tf.cond(tf.reduce_all(tf.shape(images)[-3:-1] <= shape), enlarge, resize)


def _covering_shape(images, image_shape, eval_crop):
    sides = tf.cast(tf.shape(images)[-3:-1], tf.float64)
    scale = tf.reduce_max(tf.constant(image_shape, tf.float64) / eval_crop / sides)
    return tf.maximum(tf.cast(tf.round(sides * scale), tf.int64), image_shape)


def _center(images, shape, image_shape):
    height, width = image_shape
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return _crop(images, top, left, top + height, left + width)


def _crop(images, top, left, bottom, right):
    return images[..., top:bottom, left:right, :]


def to_model_range(images):
    """Scales pixel values of any type from [0, 255] to [-1, 1] in float32, as the official code."""
    return (tf.cast(images, tf.float32) - 127.5) / 127.5


def to_pixels(images):
    """Converts images in [-1, 1] back to pixel values: a uint8 array of the same shape."""
    return np.clip(np.rint(np.asarray(images) * 127.5 + 127.5), 0, 255).astype(np.uint8)
