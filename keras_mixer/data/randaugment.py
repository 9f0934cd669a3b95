"""RandAugment and colour jitter: Pillow's operations on batches, each image with draws of its own.

The only file that knows keras-cv, which is imported when one of its operations is traced. Its
layers draw from a generator with a state, but keep drawing and applying apart; so the draws are
made here, stateless, and keras-cv applies them. Only what agrees with Pillow is taken from it: its
equalization divides by another step than Pillow's (all pixels less those of the rarest value, not
of the brightest), its contrast turns about each channel's mean rather than about that of the gray
image, its brightness adds rather than multiplies, and its colour layer cannot be built without the
global generator.
"""

import functools
import math

import tensorflow as tf

FILL = 128.0  # what comes into view from outside of an image, as in the official code


def rand_augment(images, seed, layers, magnitude):
    """Puts each image through operations that it draws from the table below (Cubuk et al. 2019).

    These are the paper's 14 operations. The scale is that of the official code, of big_vision and
    of timm, where 10 is the strongest of AutoAugment and more goes on linearly; so the Mixer
    paper's magnitude 15 means the same here, except that nothing gets weaker as the magnitude
    grows: in the official code solarize and posterize do, and colour, contrast, brightness and
    sharpness have their zero at 5 and are only ever lowered below it and raised above it. With a
    magnitude of 0 all but auto-contrast and equalization change nothing.

    | operation                              | at magnitude m                                   |
    |----------------------------------------|--------------------------------------------------|
    | identity, auto-contrast, equalize      | always the same                                  |
    | shear x, y, about the top left corner  | ± 0.03 m pixels per pixel                        |
    | translate x, y                         | ± 0.045 m of the side, at most 0.9               |
    | rotate, about the center               | ± 3 m degrees                                    |
    | solarize                               | invert values from 256 (1 - m / 30) up           |
    | posterize                              | keep the 8 - m / 7.5 highest bits, rounded       |
    | color, contrast, brightness, sharpness | factor 1 ± 0.09 m, at least 0.1; 1: no change    |

    Bilinear; gray (128) comes into view from outside. Images of one channel have no colour, so
    there `color` changes nothing.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255; height and
            width at least 3.
        seed: int tensor `(2,)`.
        layers: int. How many operations each image undergoes, one after the other. An operation
            may come up again.
        magnitude: number from 0 to 30. Signs are drawn per image.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    shape = (layers, tf.shape(images)[0])
    chosen = tf.random.stateless_uniform(shape, seed, 0, len(OPERATIONS), tf.int32)
    positive = tf.random.stateless_uniform(shape, tf.random.fold_in(seed, 1)) < 0.5
    levels = tf.where(positive, float(magnitude), -float(magnitude))
    for layer in range(layers):
        images = _apply_each(images, chosen[layer], levels[layer])
    return images


def _apply_each(images, chosen, levels):
    """Groups the images by operation, so that each undergoes its own only."""
    places = tf.range(tf.shape(images)[0])
    groups = zip(
        OPERATIONS.values(),
        *(tf.dynamic_partition(each, chosen, len(OPERATIONS)) for each in (images, levels, places)),
        strict=True,
    )
    stitched = []
    for operation, some, their_levels, their_places in groups:
        applied = tf.cond(
            tf.size(their_places) > 0,  # a convolution of no images fails
            functools.partial(operation, some, their_levels),
            functools.partial(tf.identity, some),
        )
        stitched.append((their_places, applied))
    return tf.ensure_shape(tf.dynamic_stitch(*zip(*stitched, strict=True)), images.shape)


def jitter_color(images, seed, strength):
    """Changes brightness, then contrast, then saturation of each image.

    The three factors are drawn evenly from [max(0, 1 - strength), 1 + strength]. They mean what
    they mean in Pillow and torchvision: 1 changes nothing; 0 is black, the gray of the image's
    mean, and the image in gray. The hue stays. Images of one channel have no saturation to change.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        seed: int tensor `(2,)`.
        strength: float, at least 0. 0.4 is usual.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    shape = (3, tf.shape(images)[0], 1, 1, 1)
    factors = tf.random.stateless_uniform(shape, seed, max(0.0, 1.0 - strength), 1.0 + strength)
    images = _enhance(images, 0.0, factors[0])
    images = _enhance(images, _mean_gray(images), factors[1])
    return _enhance(images, _gray(images), factors[2])


# === Operations: (images, levels) -> images, with a signed magnitude per image, (batch,) ===


def _shear_x(images, levels):
    return _transform(images, x_by_y=0.03 * levels)


def _shear_y(images, levels):
    return _transform(images, y_by_x=0.03 * levels)


def _translate_x(images, levels):
    return _transform(images, x_shift=_share(levels) * _side(images, 2))


def _translate_y(images, levels):
    return _transform(images, y_shift=_share(levels) * _side(images, 1))


def _rotate(images, levels):
    sine, cosine = tf.sin(levels * math.pi / 60), tf.cos(levels * math.pi / 60)
    x, y = (_side(images, 2) - 1) / 2, (_side(images, 1) - 1) / 2  # the center, which stays
    return _transform(
        images,
        x_by_x=cosine, x_by_y=-sine, x_shift=x - cosine * x + sine * y,
        y_by_x=sine, y_by_y=cosine, y_shift=y - sine * x - cosine * y,
    )  # fmt: skip


def _transform(images, x_by_x=1, x_by_y=0, x_shift=0, y_by_x=0, y_by_y=1, y_shift=0):
    """Looks every pixel (x, y) up at `(x_by_x x + x_by_y y + x_shift, ...)`.

    On the raw op, since keras-cv's layers shear, shift and turn in a pass each, and shift by
    symmetrical draws only.
    """
    row = (x_by_x, x_by_y, x_shift, y_by_x, y_by_y, y_shift, 0, 0)
    count = (tf.shape(images)[0],)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([tf.broadcast_to(tf.cast(v, tf.float32), count) for v in row], axis=1),
        output_shape=tf.shape(images)[1:3],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=FILL,
    )


def _share(levels):
    return tf.clip_by_value(0.045 * levels, -0.9, 0.9)


def _side(images, axis):
    return tf.cast(tf.shape(images)[axis], tf.float32)


def _auto_contrast(images, levels):
    return _keras_cv("AutoContrast").augment_images(images)


def _solarize(images, levels):
    thresholds = 256 * (1 - tf.abs(levels) / 30)
    draws = {"thresholds": _per_image(thresholds), "additions": 0.0}
    return _keras_cv("Solarization").augment_images(images, draws)


def _sharpness(images, levels):
    away = 1 - _per_image(_factor(levels))  # from the image, towards the smoothed one
    return _keras_cv("RandomSharpness", factor=1.0).augment_images(images, away)


@functools.cache
def _keras_cv(name, **options):
    """A layer of keras-cv, of which only `augment_images` may be called: it draws nothing.

    The seed is for a generator that every layer makes and that stays untouched. Without one, the
    layer would take the global generator, which does not exist in deterministic TensorFlow.
    """
    with tf.init_scope():  # the layer outlives the graph in which it is first asked for
        from keras_cv import layers

        return getattr(layers, name)(value_range=(0, 255), seed=1, dtype="float32", **options)


def _posterize(images, levels):
    dropped = tf.round(tf.abs(levels) / 7.5)
    unit = _per_image(2.0**dropped)
    return tf.floor(tf.round(images) / unit) * unit


def _equalize(images, levels):
    """Spreads the values of each channel evenly, as Pillow does, integer by integer."""
    values = tf.cast(tf.round(images), tf.int32)
    shape = tf.shape(values)
    channels = tf.reshape(tf.transpose(values, (0, 3, 1, 2)), (-1, shape[1] * shape[2]))
    counts = tf.math.bincount(channels, minlength=256, maxlength=256, axis=-1)
    brightest = tf.gather(counts, tf.reduce_max(channels, axis=1), batch_dims=1)
    step = ((shape[1] * shape[2] - brightest) // 255)[:, None]
    below = tf.cumsum(counts, axis=1, exclusive=True)  # pixels darker than each value
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, table, tf.range(256))
    channels = tf.reshape(tf.gather(table, channels, batch_dims=1), tf.gather(shape, (0, 3, 1, 2)))
    return tf.cast(tf.transpose(channels, (0, 2, 3, 1)), tf.float32)


def _color(images, levels):
    return _enhance(images, _gray(images), _per_image(_factor(levels)))


def _contrast(images, levels):
    return _enhance(images, _mean_gray(images), _per_image(_factor(levels)))


def _brightness(images, levels):
    return _enhance(images, 0.0, _per_image(_factor(levels)))


OPERATIONS = {
    "identity": lambda images, levels: images,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}


# === What several of them need ===


def _factor(levels):
    return tf.maximum(0.1, 1 + 0.09 * levels)


def _per_image(values):
    return values[:, None, None, None]


def _enhance(images, without, factors):
    """Moves images towards (factor 0) or away from (above 1) themselves without something."""
    return tf.clip_by_value(images + (factors - 1) * (images - without), 0.0, 255.0)


def _gray(images):
    return tf.image.rgb_to_grayscale(images) if images.shape[-1] == 3 else images


def _mean_gray(images):
    """One value per image, rounded as in Pillow; a sum of integers has no order to depend on."""
    values = tf.cast(tf.round(_gray(images)), tf.int64)
    total = tf.cast(tf.reduce_sum(values, axis=(1, 2, 3), keepdims=True), tf.float64)
    pixels = tf.cast(tf.shape(images)[1] * tf.shape(images)[2], tf.float64)
    return tf.cast(tf.floor(total / pixels + 0.5), tf.float32)
