"""From decoded images to what a model takes: resized, then scaled to [-1, 1].

Training, evaluation, prediction and the exported model all call `preprocess` or, where augmentation
comes in between, its two halves; so an image means the same to each of them.
"""

import tensorflow as tf


def preprocess(images, spec):
    """Prepares decoded images as a model's spec says.

    Args:
        images: tensor `(height, width, channels)` or `(batch, height, width, channels)` of any
            height and width, with values from 0 to 255.
        spec: `ModelSpec`.

    Returns:
        float32 tensor `(..., *image_shape, channels)` with values in [-1, 1].
    """
    return to_model_range(fit_images(images, spec))


def fit_images(images, spec):
    """Resizes images as a model's spec says: `preprocess` before scaling."""
    return resize_images(images, spec.architecture.image_shape, spec.preprocessing.eval_crop)


def resize_images(images, image_shape, eval_crop=0.0):
    """Resizes to exactly this height and width, bilinear and antialiased.

    Without `eval_crop`, the aspect ratio is not kept, as in the official fine-tuning code
    (vit_jax). Images that have the shape already are returned as they are, bit for bit.

    With it, they are scaled with their aspect ratio kept, so that they just cover
    `image_shape / eval_crop`, and the center is cut out: as in the paper's evaluation
    (big_vision, `resize_small(256)|central_crop(224)`: 0.875), but for its "area" filter. The
    scaled sides are rounded to the nearest pixel; an odd rest is cut off at the bottom and right.

    Args:
        images: tensor `(height, width, channels)` or `(batch, height, width, channels)` with
            values from 0 to 255.
        image_shape: (height, width), in pixels.
        eval_crop: float in [0, 1]. Share of the scaled image that is kept, along the side that
            fits more tightly; 0 for no crop.

    Returns:
        float32 tensor `(..., *image_shape, channels)` with values from 0 to 255.
    """
    images = tf.cast(images, tf.float32)
    if eval_crop:
        shape = _covering_shape(images, image_shape, eval_crop)
        scaled = tf.image.resize(images, shape, antialias=True)
        resized = _center(scaled, shape, image_shape)
    else:
        resized = tf.image.resize(images, image_shape, antialias=True)
    return tf.clip_by_value(resized, 0.0, 255.0)


def _covering_shape(images, image_shape, eval_crop):
    sides = tf.cast(tf.shape(images)[-3:-1], tf.float64)
    scale = tf.reduce_max(tf.constant(image_shape, tf.float64) / eval_crop / sides)
    return tf.maximum(tf.cast(tf.round(sides * scale), tf.int32), image_shape)


def _center(images, shape, image_shape):
    height, width = image_shape
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    center = images[..., top : top + height, left : left + width, :]
    center.set_shape((*images.shape[:-3], height, width, images.shape[-1]))
    return center


def to_model_range(images):
    """Scales pixel values from [0, 255] to [-1, 1], as the official code does.

    Args:
        images: tensor of any shape and number type.

    Returns:
        float32 tensor of the same shape.
    """
    return (tf.cast(images, tf.float32) - 127.5) / 127.5
