"""RandAugment and color jitter: Pillow's operations on batches, with random numbers per image.

The only file that uses keras-cv, which is imported when one of its operations is traced. Random
numbers are drawn here, since its layers draw them from a generator with a state. Only operations
that agree with Pillow are used: its equalization subtracts the pixels of the rarest value, not of
the brightest; its contrast is about each channel's mean, not that of the gray image; its brightness
adds instead of multiplying; and its color layer needs the global generator.
"""

import functools
import math

import tensorflow as tf

FILL = 128.0  # for pixels from outside of an image, as in the official code


def rand_augment(images, seed, layers, magnitude):
    """Applies RandAugment (Cubuk et al. 2019): random ones of the paper's 14 operations per image.

    Shear, translate, rotate, color, contrast, brightness and sharpness have the scale of the
    official code, big_vision and timm, where magnitude 10 is AutoAugment's strongest; so the Mixer
    paper's 15 means the same here. The last four always get stronger with the magnitude, as timm's
    "increasing" ones; in the official code they reduce below 5, do nothing at 5 and increase above.
    Solarize and posterize have a scale of their own, from 0 to 30. In the official code they get
    weaker with the magnitude, and solarize does nothing from 10 on; timm's increasing ones reach
    their strongest at 10. At magnitude 0, only auto-contrast and equalize change images.

    | operation                              | at magnitude m                                   |
    |----------------------------------------|--------------------------------------------------|
    | identity, auto-contrast, equalize      | always the same                                  |
    | shear x, y, about the top left corner  | ± 0.03 m pixels per pixel                        |
    | translate x, y                         | ± 0.045 m of the side, at most 0.9               |
    | rotate, about the center               | ± 3 m degrees                                    |
    | solarize                               | invert values from 256 (1 - m / 30) up           |
    | posterize                              | keep the 8 - m / 7.5 highest bits, rounded       |
    | color, contrast, brightness, sharpness | factor 1 ± 0.09 m, at least 0.1; 1: no change    |

    Interpolation is bilinear, with gray (128) outside. With one channel, `color` does nothing.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255; height and
            width are static and at least 3.
        seed: int tensor `(2,)`.
        layers: int. Number of operations applied to each image, drawn with replacement.
        magnitude: number from 0 to 30. Signs are random for each image.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    shape = (layers, tf.shape(images)[0])
    chosen = tf.random.stateless_uniform(shape, seed, 0, len(OPERATIONS), tf.int32)
    positive = tf.random.stateless_uniform(shape, tf.random.fold_in(seed, 1)) < 0.5
    for layer in range(layers):
        images = _apply_each(images, chosen[layer], positive[layer], magnitude)
    return images


def _apply_each(images, chosen, positive, magnitude):
    """Applies each image's operation to it, grouping the images by operation."""
    columns = (images, positive, tf.range(tf.shape(images)[0]))
    groups = (tf.dynamic_partition(column, chosen, len(OPERATIONS)) for column in columns)
    indices, results = [], []
    for operation, group, signs, index in zip(OPERATIONS.values(), *groups, strict=True):
        indices.append(index)
        results.append(tf.cond(
            tf.size(index) > 0,  # a convolution of no images fails
            functools.partial(operation, group, signs, magnitude),
            functools.partial(tf.identity, group),
        ))  # fmt: skip
    return tf.ensure_shape(tf.dynamic_stitch(indices, results), images.shape)


def jitter_color(images, seed, strength):
    """Changes brightness, then contrast, then saturation of each image.

    The factors are uniform in [max(0, 1 - strength), 1 + strength] and those of Pillow and
    torchvision: 1 is the image; 0 is black, the mean gray or the gray image. The hue does not
    change, nor does the saturation of images with one channel.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        seed: int tensor `(2,)`.
        strength: float, at least 0; usually 0.4.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    shape = (3, tf.shape(images)[0], 1, 1, 1)
    factors = tf.random.stateless_uniform(shape, seed, max(0.0, 1.0 - strength), 1.0 + strength)
    images = _enhance(images, 0.0, factors[0])
    images = _enhance(images, _mean_gray(images), factors[1])
    return _enhance(images, _gray(images), factors[2])


# === Geometric operations ===
#
# Every operation takes (images, positive, magnitude): positive is bool `(batch,)`, the sign of each
# image. The magnitude is a Python number, so what depends on it is computed in Python for either
# sign, with the same bits in every graph, however it is optimized.


def _moving(coefficients):
    """Makes an operation that takes pixel (x, y) from `(a x + b y + c, d x + e y + f)`.

    It uses the raw op, since keras-cv's layers draw their own parameters. `coefficients` is a
    function of (signed magnitude, height, width) to `(a, b, c, d, e, f)`.
    """

    def operation(images, positive, magnitude):
        rows = _by_sign(lambda m: (*coefficients(m, *images.shape[1:3]), 0, 0), positive, magnitude)
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=rows,
            output_shape=images.shape[1:3],
            interpolation="BILINEAR",
            fill_mode="CONSTANT",
            fill_value=FILL,
        )

    return operation


def _by_sign(function, positive, magnitude):
    """Returns a function's values at each image's signed magnitude, `(batch, ...)`."""
    values = tf.constant([function(-magnitude), function(magnitude)], tf.float32)
    return tf.gather(values, tf.cast(positive, tf.int32))


def _rotation(m, height, width):
    sine, cosine = math.sin(math.radians(3 * m)), math.cos(math.radians(3 * m))
    x, y = (width - 1) / 2, (height - 1) / 2  # the center
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


def _translation(m):
    return math.copysign(min(0.045 * abs(m), 0.9), m)


# === Color operations ===


def _auto_contrast(images, positive, magnitude):
    return _keras_cv("AutoContrast").augment_images(images)


def _solarize(images, positive, magnitude):
    draws = {"thresholds": 256 * (1 - magnitude / 30), "additions": 0.0}
    return _keras_cv("Solarization").augment_images(images, draws)


def _sharpness(images, positive, magnitude):
    smoothing = 1 - _factors(positive, magnitude)  # 1: the smoothed image
    return _keras_cv("RandomSharpness", factor=1.0).augment_images(images, smoothing)


@functools.cache
def _keras_cv(name, **options):
    """Returns a layer of keras-cv, of which only `augment_images` may be called: it is not random.

    Without a seed, though it is not used, the layer would need the global generator, which does
    not exist in deterministic TensorFlow.
    """
    with tf.init_scope():  # the layer outlives the graph it is first used in
        from keras_cv import layers

        return getattr(layers, name)(value_range=(0, 255), seed=1, dtype="float32", **options)


def _posterize(images, positive, magnitude):
    dropped = round(magnitude / 7.5)
    values = tf.bitwise.right_shift(tf.cast(tf.round(images), tf.int32), dropped)
    return tf.cast(tf.bitwise.left_shift(values, dropped), tf.float32)


def _equalize(images, positive, magnitude):
    """Equalizes the histogram of each channel, with the integer arithmetic of Pillow."""
    shape = tf.shape(images)
    values = tf.transpose(tf.round(images), (0, 3, 1, 2))
    channels = tf.reshape(tf.cast(values, tf.int32), (-1, shape[1] * shape[2]))
    counts = tf.math.bincount(channels, minlength=256, maxlength=256, axis=-1)
    brightest = tf.gather(counts, tf.reduce_max(channels, axis=1), batch_dims=1)
    step = ((shape[1] * shape[2] - brightest) // 255)[:, None]
    below = tf.cumsum(counts, axis=1, exclusive=True)  # pixels darker than each value
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, table, tf.range(256))
    values = tf.cast(tf.gather(table, channels, batch_dims=1), tf.float32)
    values = tf.reshape(values, tf.gather(shape, (0, 3, 1, 2)))
    return tf.transpose(values, (0, 2, 3, 1))


def _color(images, positive, magnitude):
    return _enhance(images, _gray(images), _factors(positive, magnitude))


def _contrast(images, positive, magnitude):
    return _enhance(images, _mean_gray(images), _factors(positive, magnitude))


def _brightness(images, positive, magnitude):
    return _enhance(images, 0.0, _factors(positive, magnitude))


OPERATIONS = {
    "identity": lambda images, positive, magnitude: images,
    "shear_x": _moving(lambda m, height, width: (1, 0.03 * m, 0, 0, 1, 0)),
    "shear_y": _moving(lambda m, height, width: (1, 0, 0, 0.03 * m, 1, 0)),
    "translate_x": _moving(lambda m, height, width: (1, 0, _translation(m) * width, 0, 1, 0)),
    "translate_y": _moving(lambda m, height, width: (1, 0, 0, 0, 1, _translation(m) * height)),
    "rotate": _moving(_rotation),
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}


def _factors(positive, magnitude):
    factors = _by_sign(lambda m: max(0.1, 1 + 0.09 * m), positive, magnitude)
    return factors[:, None, None, None]


def _enhance(images, degenerate, factors):
    """Blends images with degenerate ones (factor 0), as Pillow's `ImageEnhance`."""
    return tf.clip_by_value(images + (factors - 1) * (images - degenerate), 0.0, 255.0)


def _gray(images):
    return tf.image.rgb_to_grayscale(images) if images.shape[-1] == 3 else images


def _mean_gray(images):
    """Returns the mean of each image in gray, rounded as in Pillow; integer sums are exact."""
    values = tf.cast(tf.round(_gray(images)), tf.int64)
    total = tf.cast(tf.reduce_sum(values, axis=(1, 2, 3), keepdims=True), tf.float64)
    pixels = tf.cast(tf.shape(images)[1] * tf.shape(images)[2], tf.float64)
    return tf.cast(tf.floor(total / pixels + 0.5), tf.float32)
