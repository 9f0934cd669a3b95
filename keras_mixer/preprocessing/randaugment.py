"""RandAugment and color jitter: Pillow's operations on batches, with random numbers per image.

The only file that uses keras-cv, which is imported when its solarization is traced. Random numbers
are sampled here, since its layers use a generator with a state. Its other layers do not fit: its
equalization subtracts the pixels of the rarest value, not of the brightest; its contrast
is about each channel's mean, not that of the gray image; its brightness adds instead of
multiplying; its color layer needs the global generator; and its auto-contrast and its sharpness
take two to six times as long on a CPU.
"""

import functools
import math

import numpy as np
import tensorflow as tf

from keras_mixer.preprocessing.random_numbers import sample

FILL = 128.0  # for pixels from outside of an image, as in the official code
GRAY = (0.2989, 0.587, 0.114)  # the weights of `tf.image.rgb_to_grayscale`


@tf.autograph.experimental.do_not_convert  # it would take a second to find nothing
def rand_augment(images, seed, layers, magnitude, part=None):
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
        layers: int. Number of operations applied to each image, sampled with replacement.
        magnitude: number from 0 to 30. Signs are random for each image.
        part: `random_numbers.BatchPart`; None for a whole batch.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)

    def choose(count):
        return tf.random.stateless_uniform((layers, count), seed, 0, len(OPERATIONS), tf.int32)

    def toss(count):
        return tf.random.stateless_uniform((layers, count), tf.random.fold_in(seed, 1)) < 0.5

    chosen, positive = (sample(each, images, part, axis=1) for each in (choose, toss))
    for layer in range(layers):
        images = _apply_each(images, chosen[layer], positive[layer], magnitude)
    return images


def _apply_each(images, chosen, positive, magnitude):
    """Applies each image's operation to it, grouping the images by operation and sign."""
    kinds = [(each, m) for each in OPERATIONS.values() for m in (-magnitude, magnitude)]
    group_of = 2 * chosen + tf.cast(positive, tf.int32)
    groups = tf.dynamic_partition(tf.range(tf.shape(images)[0]), group_of, len(kinds))
    results = [_apply(*kind, images, group) for kind, group in zip(kinds, groups, strict=True)]
    return tf.ensure_shape(tf.dynamic_stitch(groups, results), images.shape)


def _apply(operation, m, images, group):
    """Applies an operation to the images of a group; nothing is computed for an empty one."""
    return tf.cond(
        tf.size(group) > 0,
        lambda: operation(tf.gather(images, group), m),
        lambda: images[:0],
    )  # fmt: skip


def jitter_color(images, seed, strength, part=None):
    """Changes brightness, then contrast, then saturation of each image.

    The factors are uniform in [max(0, 1 - strength), 1 + strength] and those of Pillow and
    torchvision: 1 is the image; 0 is black, the mean gray or the gray image. The hue does not
    change, nor does the saturation of images with one channel.

    Args:
        images: tensor `(batch, height, width, channels)`, pixel values from 0 to 255.
        seed: int tensor `(2,)`.
        strength: float, at least 0; usually 0.4.
        part: `random_numbers.BatchPart`; None for a whole batch.

    Returns:
        float32 tensor of the same shape.
    """
    images = tf.cast(images, tf.float32)
    bounds = max(0.0, 1.0 - strength), 1.0 + strength

    def uniform(count):
        return tf.random.stateless_uniform((3, count, 1, 1, 1), seed, *bounds)

    factors = sample(uniform, images, part, axis=1)
    images = _enhance(images, 0.0, factors[0])
    images = _enhance(images, _mean_gray(images), factors[1])
    return _enhance(images, _gray(images), factors[2])


# === Geometric operations ===
#
# Every operation takes (images, m): the magnitude m has the sign of these images. It is a Python
# number, so what depends on it is computed by NumPy when a graph is made, with the same bits in
# every graph, however it is optimized.
#
# TensorFlow's ImageProjectiveTransformV3 does the same, but takes two to four times as long: it
# computes the position of every channel of every pixel, and again for every image.


def _shear_x(images, m):
    return _slide(images, 2, 0.03 * m * np.arange(images.shape[1])[:, None])


def _shear_y(images, m):
    return _slide(images, 1, 0.03 * m * np.arange(images.shape[2])[None, :])


def _translate_x(images, m):
    return _slide(images, 2, np.full((1, 1), _translation(m) * images.shape[2]))


def _translate_y(images, m):
    return _slide(images, 1, np.full((1, 1), _translation(m) * images.shape[1]))


def _translation(m):
    return math.copysign(min(0.045 * abs(m), 0.9), m)


def _slide(images, axis, shifts):
    """Takes each pixel from `shifts` pixels further along an axis, a number for each line of it.

    `shifts` has the shape (height, 1) or (1, width), or (1, 1) for all lines. The pixels of a line
    are all interpolated with one weight, which is done first: so each is looked up only once.
    """
    size, whole = images.shape[axis], np.floor(shifts).astype(int)
    near, far = _surround(images, {axis: (2, 1)}), _surround(images, {axis: (1, 2)})
    weights = _per_channel(shifts - whole, images)
    rows_and_columns = list(np.indices(images.shape[1:3]))
    moved = rows_and_columns[axis - 1] + whole
    rows_and_columns[axis - 1] = np.clip(moved, -2, size) + 2
    return _look_up(_blend(near, far, weights), *rows_and_columns)


def _rotate(images, m):
    height, width = images.shape[1:3]
    sine, cosine = math.sin(math.radians(3 * m)), math.cos(math.radians(3 * m))
    middle = np.array([height - 1, width - 1])[:, None, None] / 2
    y, x = np.indices((height, width)) - middle
    y, x = np.array([sine * x + cosine * y, cosine * x - sine * y]) + middle
    return _interpolate(images, np.clip(y, -1, height), np.clip(x, -1, width))


def _interpolate(images, y, x):
    """Returns what is at (y, x), both `(height, width)`: at most a pixel outside of the images."""
    padded = _surround(images, {1: (1, 2), 2: (1, 2)})
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    corners = (0, 1, padded.shape[2], padded.shape[2] + 1)  # as far behind the top left one
    values = [_look_up(padded, top + 1, left + 1, corner) for corner in corners]
    down, right = (_per_channel(part, images) for part in (y - top, x - left))
    return _blend(_blend(*values[:2], right), _blend(*values[2:], right), down)


def _look_up(images, rows, columns, behind=0):
    """Returns each image's pixels at (rows, columns), or a number of pixels behind those.

    `tf.gather` takes twice as long as `tf.gather_nd` for pieces as small as a pixel.
    """
    height, width, channels = images.shape[1:]
    firsts = height * width * tf.range(tf.shape(images)[0]) + behind
    indices = tf.constant(rows * width + columns, tf.int32)[..., None]
    indices += tf.reshape(firsts, (-1, 1, 1, 1))
    return tf.gather_nd(tf.reshape(images, (-1, channels)), indices)


def _blend(near, far, weights):
    return near + tf.constant(weights, tf.float32) * (far - near)


def _per_channel(weights, images):
    """Adds the axis of channels to weights; TensorFlow is slow at repeating those of columns."""
    repeats = images.shape[-1] if weights.shape[1] > 1 else 1
    return np.repeat(weights[..., None], repeats, axis=2)


def _surround(images, edges):
    """Adds gray pixels: `edges` is axis -> (how many before, how many after)."""
    edges = [edges.get(axis, (0, 0)) for axis in range(4)]
    return tf.pad(images, edges, constant_values=FILL)


# === Color operations ===


def _auto_contrast(images, m):
    """Stretches each channel to the values from 0 to 255; plain ones stay."""
    low = tf.reduce_min(tf.reduce_min(images, axis=1), axis=1)  # half the time of both at once
    high = tf.reduce_max(tf.reduce_max(images, axis=1), axis=1)
    scale = tf.where(high > low, 255.0 / (high - low), 1.0)
    offset = tf.where(high > low, -low * scale, 0.0)
    return _to_range(images * _along(scale, images) + _along(offset, images))


def _equalize(images, m):
    """Equalizes the histogram of each channel, with the integer arithmetic of Pillow."""
    pixels, channels = images.shape[1] * images.shape[2], images.shape[3]
    histograms = 256 * tf.reshape(tf.range(tf.shape(images)[0] * channels), (-1, channels))
    values = tf.cast(tf.round(images), tf.int32) + _along(histograms, images)
    size = 256 * tf.shape(images)[0] * channels
    counts = tf.math.bincount(tf.reshape(values, (-1,)), minlength=size, maxlength=size)
    table = _equalizing(tf.reshape(counts, (-1, 256)), pixels)
    return tf.gather_nd(tf.reshape(tf.cast(table, tf.float32), (-1,)), values[..., None])


def _equalizing(counts, pixels):
    """Returns what the 256 values turn into, for each histogram `(histograms, 256)`."""
    values = tf.range(256)
    brightest = tf.reduce_max(tf.where(counts > 0, values, 0), axis=1)
    step = (pixels - tf.gather(counts, brightest, batch_dims=1))[:, None] // 255
    below = tf.cumsum(counts, axis=1, exclusive=True)  # pixels darker than each value
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    return tf.where(step > 0, table, values)


def _solarize(images, m):
    values = {"thresholds": 256 * (1 - abs(m) / 30), "additions": 0.0}
    return _keras_cv("Solarization").augment_images(images, values)


@functools.cache
def _keras_cv(name):
    """Returns a layer of keras-cv, of which only `augment_images` may be called: it is not random.

    Without a seed, though it is not used, the layer would need the global generator, which does
    not exist in deterministic TensorFlow.
    """
    with tf.init_scope():  # the layer outlives the graph it is first used in
        from keras_cv import layers

        return getattr(layers, name)(value_range=(0, 255), seed=1, dtype="float32")


def _posterize(images, m):
    step = 2.0 ** round(abs(m) / 7.5)
    return tf.floor(tf.round(images) / step) * step


def _color(images, m):
    """Blends images with their gray ones, in one product with a matrix."""
    if images.shape[-1] == 1:
        return images
    gray = np.repeat(np.array(GRAY)[:, None], 3, axis=1)
    mixed = tf.constant(_factor(m) * np.eye(3) + (1 - _factor(m)) * gray, tf.float32)
    return _to_range(tf.tensordot(images, mixed, 1))


def _contrast(images, m):
    return _enhance(images, _mean_gray(images), _factor(m))


def _brightness(images, m):
    return _enhance(images, 0.0, _factor(m))


def _sharpness(images, m):
    """Blends images with smoothed ones: means of 3 x 3 pixels, of which the center counts 5.

    The pixels at the edges stay.
    """
    rows = tf.add_n([images[:, :-2], images[:, 1:-1], images[:, 2:]])
    sums = tf.add_n([rows[:, :, :-2], rows[:, :, 1:-1], rows[:, :, 2:]])
    differences = (9 * images[:, 1:-1, 1:-1] - sums) * ((_factor(m) - 1) / 13)
    return _to_range(images + tf.pad(differences, ((0, 0), (1, 1), (1, 1), (0, 0))))


OPERATIONS = {
    "identity": lambda images, m: images,
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


def _factor(m):
    return max(0.1, 1 + 0.09 * m)


def _enhance(images, degenerate, factors):
    """Blends images with degenerate ones (factor 0), as Pillow's `ImageEnhance`."""
    return _to_range(images + (factors - 1) * (images - degenerate))


def _along(values, images):
    """Repeats a number per image and channel for each column, at which TensorFlow is slow."""
    return tf.tile(values[:, None, None, :], (1, 1, images.shape[2], 1))


def _to_range(images):
    return tf.clip_by_value(images, 0.0, 255.0)


def _gray(images):
    return tf.image.rgb_to_grayscale(images) if images.shape[-1] == 3 else images


def _mean_gray(images):
    """Returns the mean of each image in gray, rounded as in Pillow; integer sums are exact."""
    values = tf.cast(tf.round(_gray(images)), tf.int64)
    total = tf.cast(tf.reduce_sum(values, axis=(1, 2, 3), keepdims=True), tf.float64)
    pixels = tf.cast(tf.shape(images)[1] * tf.shape(images)[2], tf.float64)
    return tf.cast(tf.floor(total / pixels + 0.5), tf.float32)
