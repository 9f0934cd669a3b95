"""The 15 common corruptions of ImageNet-C and CIFAR-10-C, for measuring robustness.

They are made as by the paper's code, with its constants, in NumPy, SciPy and Pillow; no package
could be used: `imagecorruptions` (last released in 2020) needs what NumPy 2 and scikit-image have
removed, `imagenet-c` (2018) needs ImageMagick and OpenCV 3. What differs from the published files:

- Frost is synthetic, since the original's photographs cannot be shipped. Its numbers are not
  comparable with published ones, nor is a mean that includes it.
- Random numbers are others, and a function of (seed, image, corruption, severity) alone.
- Values are rounded to 8 bits once, at the end. The original cuts them off, there and in between;
  ImageNet-C was then saved as JPEG of quality 85.
- Images may have any size and one channel.

Reference:
    Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations, https://arxiv.org/abs/1903.12261; code: github.com/hendrycks/robustness.
"""

import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.signal import oaconvolve

from keras_mixer.preprocessing.corruption_constants import constants_of


def corrupt(image, corruption, severity, index, seed=0):
    """Corrupts an image: a pure function of its arguments.

    Args:
        image: uint8 array `(height, width, channels)` of 1 or 3 channels, of the size that the
            model takes: constants are in pixels, see corruption_constants.py.
        corruption: string, one of `corruption_constants.CORRUPTIONS`.
        severity: int from 1 to 5.
        index: int, not negative. Position of the image in its split, for random numbers.
        seed: int, not negative.

    Returns:
        uint8 array of the same shape.
    """
    constants = constants_of(corruption, severity, image.shape[:2])
    generator = np.random.default_rng([seed, index, severity, *corruption.encode()])
    return _to_uint8(_FUNCTIONS[corruption](image / 255, constants, generator))


def _to_uint8(x):
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


# Below, x is a float64 array `(height, width, channels)` from 0 to 1; results are clipped by
# `corrupt`. The second argument holds the constants, the third is a `np.random.Generator`.

# === Noise ===


def _gaussian_noise(x, scale, generator):
    return x + generator.normal(scale=scale, size=x.shape)


def _shot_noise(x, photons, generator):
    return generator.poisson(x * photons) / photons


def _impulse_noise(x, amount, generator):
    """Sets a share of all values, each channel on its own, to 0 or 1."""
    salt = generator.integers(0, 2, size=x.shape)
    return np.where(generator.random(x.shape) < amount, salt, x)


# === Blur ===


def _defocus_blur(x, constants, generator):
    return _convolve(x, disk(*constants))


def disk(radius, alias_blur):
    """Makes the kernel of a lens out of focus: a disk, slightly blurred.

    Args:
        radius: float, in pixels.
        alias_blur: float. Standard deviation of the blur, whose kernel has 3 pixels a side, or 5 if
            the radius is above 8.

    Returns:
        float array `(side, side)` with an odd side. Its sum is 1, but for a radius of 10: 1.01, as
        in the original, since the disk reaches the edges, at which the blur mirrors it.
    """
    reach, side = (8, 3) if radius <= 8 else (radius, 5)
    offsets = np.arange(-reach, reach + 1)
    inside = offsets[:, None] ** 2 + offsets**2 <= radius**2
    weights = np.exp(-((np.arange(side) - side // 2) ** 2) / (2 * alias_blur**2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    return ndimage.convolve(inside / inside.sum(), kernel, mode="mirror")


def _convolve(x, kernel):
    """Convolves the image, mirrored at its edges, with a kernel of odd side."""
    reach = len(kernel) // 2
    mirrored = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return oaconvolve(mirrored, kernel[:, :, None], mode="valid", axes=(0, 1))


def _glass_blur(x, constants, generator):
    sigma, reach, times = constants
    return _gaussian_blur(_scatter_pixels(_gaussian_blur(x, sigma), reach, times, generator), sigma)


def _gaussian_blur(x, sigma):
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _scatter_pixels(x, reach, times, generator):
    """Replaces pixels by neighbors up to `reach` away, one after another, from the bottom right.

    The original means to swap them, but its swap of two views of an array copies one.
    """
    height, width, channels = x.shape
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    pixels = (rows[:, None] * width + columns).ravel()
    source_of = list(range(height * width))
    for _ in range(times):
        down, right = generator.integers(-reach, reach, size=(2, len(pixels)))
        neighbors = pixels + down * width + right
        for pixel, neighbor in zip(pixels.tolist(), neighbors.tolist(), strict=True):
            source_of[pixel] = source_of[neighbor]
    return x.reshape(-1, channels)[source_of].reshape(x.shape)


def _motion_blur(x, constants, generator):
    return _smear(x, *constants, generator.uniform(-45, 45))


def _smear(x, radius, sigma, angle):
    """Averages the pixels along a ray, with Gaussian weights, as ImageMagick's motion blur.

    Args:
        x: Image.
        radius: int. Pixels of the ray, twice; its length is 2 radius + 1.
        sigma: float. Standard deviation of the weights, in pixels.
        angle: float. Direction of the ray, in degrees: 0 is right, 90 is down.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    (height, width), margin = x.shape[:2], len(steps)
    padded = np.pad(x, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    rays = zip(weights / weights.sum(), margin + down, margin + right, strict=True)
    return sum(w * padded[top : top + height, left : left + width] for w, top, left in rays)


def _zoom_blur(x, constants, generator):
    stop, step = constants
    factors = np.arange(1, stop, step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x, factor):
    """Enlarges the center of an image, bilinearly, to the size of the image.

    Equal to `ndimage.zoom` of the center, cut to size, which takes twice as long.
    """
    for axis, side in enumerate(x.shape[:2]):
        part = math.ceil(side / factor)
        large = round(part * factor)
        within = ((large - side) // 2 + np.arange(side)) * (part - 1) / max(1, large - 1)
        x = _interpolated(x, (side - part) // 2 + within, axis)
    return x


def _interpolated(x, positions, axis):
    """Interpolates linearly along an axis."""
    low = positions.astype(int)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    share = np.expand_dims(positions - low, [other for other in range(3) if other != axis])
    return (1 - share) * x.take(low, axis) + share * x.take(high, axis)


# === Weather ===


def _snow(x, constants, generator):
    """Whitens the image and adds flakes: noise, enlarged, cut off below, smeared downward."""
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    flakes = _zoomed(generator.normal(mean, deviation, (*x.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _smear(flakes, radius, sigma, generator.uniform(-135, -45))
    white = np.maximum(x, 1.5 * _gray(x) + 0.5)
    return kept * x + (1 - kept) * white + flakes + np.rot90(flakes, 2)


def _gray(x):
    """Returns the luma `(height, width, 1)`."""
    return x if x.shape[-1] == 1 else x @ [[0.299], [0.587], [0.114]]


# Mean color and standard deviation over the original's photographs of frost.
_FROST_COLOR, _FROST_DEVIATION = (0.57, 0.65, 0.70), 0.11


def _frost(x, constants, generator):
    kept, added = constants
    color = np.full((1, 1, 3), _FROST_COLOR)
    color = color if x.shape[-1] == 3 else _gray(color)
    return kept * x + added * np.clip(color + _crystals(x.shape, generator), 0, 1)


def _crystals(shape, generator):
    """Makes the brightness of frost about its mean: branching ridges on clouds of ice.

    Ridges are where a fractal crosses its middle, so they wind and branch as the fractal does.
    """
    ice = plasma(shape, 2.0, generator)
    for decay in (1.5, 1.3, 1.3):
        ice = ice + (1 - np.abs(2 * plasma(shape, decay, generator) - 1)) ** 6
    return _FROST_DEVIATION * (ice - ice.mean()) / max(ice.std(), 1e-9)


def _fog(x, constants, generator):
    thickness, decay = constants
    foggy = x + thickness * plasma(x.shape, decay, generator)
    return foggy * x.max() / (x.max() + thickness)


def plasma(shape, decay, generator):
    """Makes a plasma fractal by the diamond-square algorithm.

    Args:
        shape: (height, width), perhaps followed by more.
        decay: float above 1. By its square, random changes shrink from each scale to the next.
        generator: `np.random.Generator`.

    Returns:
        float array `(height, width, 1)`, cut from a square tile that spans 0 to 1.
    """
    side = 2 ** max(1, math.ceil(math.log2(max(shape[:2]))))
    tile, step, change = np.zeros((side, side)), side, 1.0
    while step >= 2:
        _fill_centers(tile, step, change, generator)
        step, change = step // 2, change / decay**2
    tile = (tile - tile.min()) / (tile.max() - tile.min())
    return tile[: shape[0], : shape[1], None]


def _fill_centers(tile, step, change, generator):
    """Fills the centers of squares of a periodic tile, then of the diamonds between them."""
    half = step // 2
    corners, centers = tile[::step, ::step], tile[half::step, half::step]
    edges = (tile[::step, half::step], tile[half::step, ::step])

    def fill(target, total):
        target[:] = total / 4 + change * generator.uniform(-1, 1, target.shape)

    pairs = corners + np.roll(corners, -1, axis=0)
    fill(centers, pairs + np.roll(pairs, -1, axis=1))
    for axis, target in enumerate(edges):
        along = corners + np.roll(corners, -1, axis=1 - axis)
        fill(target, centers + np.roll(centers, 1, axis=axis) + along)


def _brightness(x, added, generator):
    """Adds to the V of HSV, which is the largest channel; hue and saturation stay."""
    value = x.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


# === Digital ===


def _contrast(x, kept, generator):
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * kept + mean


def _elastic_transform(x, constants, generator):
    """Moves three points at random, and the image with them; then each pixel on its own."""
    side = min(x.shape[:2])
    shift, sigma, jitter = (side * share for share in constants)
    x = _sampled(x, _affine_positions(x.shape, jitter, generator), "mirror")
    noise = generator.uniform(-1, 1, (2, *x.shape[:2]))
    moves = [shift * ndimage.gaussian_filter(field, sigma, truncate=3) for field in noise]
    return _sampled(x, np.indices(x.shape[:2]) + moves[::-1], "reflect")


def _affine_positions(shape, jitter, generator):
    """Returns where pixels come from, `(2, height, width)`, if points move by up to `jitter`.

    Points are (x, y), as in OpenCV: right below, right above and left above of the center.
    """
    center, reach = np.array(shape[1::-1]) // 2, min(shape[:2]) // 3
    points = center + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + generator.uniform(-jitter, jitter, points.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points)
    y, x = np.indices(shape[:2])
    return np.moveaxis(np.stack([x, y, np.ones_like(x)], axis=-1) @ back[:, ::-1], -1, 0)


def _sampled(x, positions, mode):
    """Interpolates the image bilinearly at positions `(2, height, width)`."""
    channels = np.moveaxis(x, -1, 0)
    sampled = [ndimage.map_coordinates(c, positions, order=1, mode=mode) for c in channels]
    return np.stack(sampled, axis=-1)


def _pixelate(x, share, generator):
    picture = _as_picture(x)
    size = [max(1, int(side * share)) for side in picture.size]
    box = Image.Resampling.BOX
    return _from_picture(picture.resize(size, box).resize(picture.size, box), x.shape)


def _jpeg_compression(x, quality, generator):
    buffer = io.BytesIO()
    _as_picture(x).save(buffer, "JPEG", quality=quality)
    return _from_picture(Image.open(buffer), x.shape)


def _as_picture(x):
    pixels = _to_uint8(x)
    return Image.fromarray(pixels[..., 0] if x.shape[-1] == 1 else pixels)


def _from_picture(picture, shape):
    return np.asarray(picture).reshape(shape) / 255


_FUNCTIONS = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
