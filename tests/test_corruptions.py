"""Tests `keras_mixer/preprocessing/corruptions.py` and its constants."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from keras_mixer.preprocessing import corruptions as module
from keras_mixer.preprocessing.corruption_constants import (
    CIFAR,
    CORRUPTIONS,
    IMAGENET,
    SEVERITIES,
    constants_of,
)
from keras_mixer.preprocessing.corruptions import corrupt, disk, plasma

SHAPES = [(8, 8, 1), (8, 8, 3), (28, 28, 1), (33, 21, 3), (64, 80, 3)]
NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
# Those that change more with every severity. Of the others, directions that are drawn or a veil
# that also darkens count as much as a step, so the ends are compared. Elastic transformations are
# published as strong and smooth at first, weaker and rougher then: not in order by this measure.
MONOTONE = {*NOISE, "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
ORDERED = [corruption for corruption in CORRUPTIONS if corruption != "elastic_transform"]


@pytest.fixture(scope="module")
def cuts(photos):
    """Cut-outs of photographs, by side: of 224 and of 32 pixels, the latter reduced."""
    large = [photo[100:324, 200:424] for photo in photos]
    small = [np.asarray(Image.fromarray(cut).resize((32, 32))) for cut in large]
    return {224: large, 32: small}


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def rounded(x):
    """Values from 0 to 1, and beyond, as the bytes that `corrupt` makes of them."""
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def assert_within_rounding(found, expected):
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert np.mean(found != expected) < 1e-3


# === All of them ===


def test_all_have_five_severities_of_the_same_kind():
    assert len(CORRUPTIONS) == 15
    assert list(CIFAR) == list(IMAGENET) == list(module._FUNCTIONS) == list(CORRUPTIONS)
    for table in (CIFAR, IMAGENET):
        for constants in table.values():
            assert len(constants) == len(SEVERITIES)
            assert len({np.shape(constant) for constant in constants}) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_shape_type_and_determinism(corruption, shape):
    image = noise(shape)
    kept = image.copy()
    for severity in (1, 5):
        result = corrupt(image, corruption, severity, index=7, seed=3)
        assert result.shape == shape and result.dtype == np.uint8
        np.testing.assert_array_equal(corrupt(image, corruption, severity, 7, 3), result)
    np.testing.assert_array_equal(image, kept)


# Those that draw random numbers.
DRAWN = {
    *NOISE, "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform",
}  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_random_numbers_depend_on_image_and_seed(corruption, cuts):
    image = cuts[32][0]
    first = corrupt(image, corruption, 5, index=0, seed=0)
    for index, seed in ((1, 0), (0, 1)):
        differs = not np.array_equal(corrupt(image, corruption, 5, index, seed), first)
        assert differs == (corruption in DRAWN)


def test_random_numbers_of_severities_and_corruptions_are_others(monkeypatch):
    drawn = {}
    for name in CORRUPTIONS:
        monkeypatch.setitem(
            module._FUNCTIONS, name, lambda x, c, generator: generator.random((1, 4, 1))
        )
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            drawn[corrupt(noise((8, 8, 1)), name, severity, 0).tobytes()] = (name, severity)
    assert len(drawn) == 75


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("corruption", ORDERED)
def test_higher_severities_change_more(corruption, side, cuts):
    severities = SEVERITIES if corruption in MONOTONE else (SEVERITIES[0], SEVERITIES[-1])
    changes = [
        np.mean([
            np.abs(corrupt(image, corruption, severity, index).astype(float) - image).mean()
            for index, image in enumerate(cuts[side])
        ])
        for severity in severities
    ]  # fmt: skip
    assert changes == sorted(changes) and changes[0] < changes[-1], changes
    assert changes[-1] < 150


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_gray_image_is_corrupted_as_in_color(corruption, cuts):
    """With one channel, what a color image of equal channels would be, where nothing is drawn."""
    gray = cuts[32][0][..., :1]
    one = corrupt(gray, corruption, 3, index=0)
    assert one.shape == (32, 32, 1)
    if corruption not in (*NOISE, "frost", "jpeg_compression"):
        color = corrupt(gray.repeat(3, axis=-1), corruption, 3, index=0)
        np.testing.assert_allclose(color.astype(int), one.repeat(3, axis=-1), atol=1)


def test_constants_go_by_the_smaller_side():
    assert constants_of("contrast", 1, (63, 400)) == CIFAR["contrast"][0]
    assert constants_of("contrast", 5, (64, 64)) == IMAGENET["contrast"][4]
    image = noise((63, 64, 3))
    low = corrupt(image, "contrast", 5, 0).astype(float).std() / image.std()
    assert low == pytest.approx(0.15, rel=0.01)


# === Each against its formula ===


def test_gaussian_noise_has_its_deviation():
    image = np.full((200, 200, 3), 128, np.uint8)
    for severity, scale in zip(SEVERITIES, IMAGENET["gaussian_noise"], strict=True):
        change = corrupt(image, "gaussian_noise", severity, 0) / 255 - 128 / 255
        clipped = np.clip(
            np.random.default_rng(1).normal(size=10**6) * scale, -128 / 255, 127 / 255
        )
        assert change.std() == pytest.approx(clipped.std(), rel=0.01)
        assert abs(change.mean()) < 0.005
        assert abs(np.corrcoef(change[..., 0].ravel(), change[..., 1].ravel())[0, 1]) < 0.02


def test_shot_noise_is_a_count_of_photons():
    image = np.full((200, 200, 3), 51, np.uint8)  # 0.2
    for severity, photons in zip(SEVERITIES, IMAGENET["shot_noise"], strict=True):
        values = corrupt(image, "shot_noise", severity, 0) / 255
        levels = values * photons
        below = values < 1
        assert np.abs(levels - np.rint(levels))[below].max() < 0.51 / 255 * photons
        assert values.mean() == pytest.approx(0.2, abs=0.01)
        assert values.std() == pytest.approx(math.sqrt(0.2 / photons), rel=0.04)
    assert corrupt(np.zeros((9, 9, 1), np.uint8), "shot_noise", 5, 0).max() == 0


def test_impulse_noise_sets_its_share_of_values_to_black_or_white():
    image = np.full((200, 200, 3), 100, np.uint8)
    for severity, amount in zip(SEVERITIES, IMAGENET["impulse_noise"], strict=True):
        values = corrupt(image, "impulse_noise", severity, 0)
        assert set(np.unique(values)) == {0, 100, 255}
        assert np.mean(values != 100) == pytest.approx(amount, rel=0.05)
        assert np.mean(values == 0) == pytest.approx(amount / 2, rel=0.07)


@pytest.mark.parametrize("severity", [3, 5])
def test_defocus_blur_is_a_convolution_with_a_disk(severity, cuts):
    for image in (cuts[32][0], cuts[224][0][:70, :66]):
        kernel = disk(*constants_of("defocus_blur", severity, image.shape[:2]))
        reach = len(kernel) // 2
        (height, width), total = image.shape[:2], 0
        mirror = [np.abs(np.arange(-reach, n + reach)) for n in (height, width)]
        rows, columns = (
            np.where(m >= n, 2 * (n - 1) - m, m)
            for m, n in zip(mirror, (height, width), strict=True)
        )
        padded = image[rows][:, columns] / 255
        for down in range(len(kernel)):
            for right in range(len(kernel)):
                moved = padded[down : down + height, right : right + width]
                total = total + kernel[down, right] * moved
        assert_within_rounding(corrupt(image, "defocus_blur", severity, 0), rounded(total))


def test_a_disk_is_round_and_has_its_radius():
    for radius, blur, side in ((3, 0.1, 17), (10, 0.5, 21), (0.3, 0.4, 17)):
        kernel = disk(radius, blur)
        assert kernel.shape == (side, side)
        assert kernel.sum() == pytest.approx(1, abs=0.011), "see the docstring"
        np.testing.assert_allclose(kernel, kernel.T, atol=1e-15)
        np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-15)
        inside = np.hypot(*np.indices((side, side)) - side // 2) <= radius
        blurred = ndimage.gaussian_filter(
            inside / inside.sum(), blur, mode="mirror", radius=1 if radius <= 8 else 2
        )
        np.testing.assert_allclose(kernel, blurred, atol=1e-15)
    assert (disk(3, 0.1) > 1e-9).sum() == 29, "points of the grid within 3 of the center"
    center = np.exp(-np.array([1, 0, 1]) / (2 * 0.4**2))
    expected = np.outer(center, center) / center.sum() ** 2
    np.testing.assert_allclose(disk(0.3, 0.4)[7:10, 7:10], expected)


def test_glass_blur_moves_pixels_no_further_than_its_reach():
    """Without the blur, every pixel is one from nearby; a border is not the start of a move."""
    rows, columns = np.indices((40, 50))
    x = np.stack([rows, columns], axis=-1).astype(float)
    moved = module._scatter_pixels(x, 2, 1, np.random.default_rng(0))
    distances = np.abs(moved - x)
    assert distances.max() > 1 and np.mean(distances.max(axis=-1) > 0) > 0.7
    assert (distances[:3] == 0).all() and (distances[:, :3] == 0).all()
    # A neighbor may have been replaced before, by one from further down or right.
    assert (x - moved)[..., 0].max() == 2
    one = module._scatter_pixels(np.arange(9.0).reshape(3, 3, 1), 1, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(one.ravel()[:8], np.arange(8))
    assert one[2, 2, 0] in (4, 5, 7, 8)


def smeared(x, radius, sigma, angle):
    """Motion blur pixel by pixel."""
    result, total = np.zeros_like(x), 0.0
    height, width = x.shape[:2]
    for step in range(2 * radius + 1):
        weight = math.exp(-(step**2) / (2 * sigma**2))
        total += weight
        down = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        for row in range(height):
            for column in range(width):
                source = min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)
                result[row, column] += weight * x[source]
    return result / total


@pytest.mark.parametrize("angle", [-45.0, -10.0, 0.0, 30.0, 90.0])
def test_motion_blur_pixel_by_pixel(angle):
    x = noise((9, 14, 3)) / 255
    np.testing.assert_allclose(module._smear(x, 6, 2.0, angle), smeared(x, 6, 2.0, angle))


@pytest.mark.parametrize("shape", [(20, 30, 3), (8, 8, 1), (64, 70, 3)], ids=str)
def test_zoom_blur_is_the_mean_of_enlarged_centers(shape):
    image, (stop, step) = noise(shape), constants_of("zoom_blur", 5, shape[:2])
    factors = np.arange(1, stop, step)
    zoomed = [enlarged(image / 255, factor) for factor in factors]
    expected = (image / 255 + sum(zoomed)) / (len(factors) + 1)
    assert_within_rounding(corrupt(image, "zoom_blur", 5, 0), rounded(expected))


@pytest.mark.parametrize("factor", [1, 1.13, 2, 4.5])
def test_enlarging_is_scipys(factor):
    for shape in ((9, 14, 3), (8, 8, 1), (3, 2, 1)):
        x = noise(shape) / 255
        np.testing.assert_allclose(module._zoomed(x, factor), enlarged(x, factor), atol=1e-12)


def enlarged(x, factor):
    """The center of an image, enlarged as the original does, along both sides."""
    (height, width), parts = x.shape[:2], [math.ceil(side / factor) for side in x.shape[:2]]
    top, left = (height - parts[0]) // 2, (width - parts[1]) // 2
    center = x[top : top + parts[0], left : left + parts[1]]
    large = ndimage.zoom(center, (factor, factor, 1), order=1)
    top, left = ((large.shape[axis] - x.shape[axis]) // 2 for axis in (0, 1))
    return large[top : top + height, left : left + width]


def test_fog_is_a_veil_that_keeps_the_brightest_value(monkeypatch):
    image = noise((16, 16, 3))
    monkeypatch.setattr(module, "plasma", lambda shape, decay, generator: np.ones((16, 16, 1)))
    thickness = CIFAR["fog"][4][0]
    x = image / 255
    expected = (x + thickness) * x.max() / (x.max() + thickness)
    np.testing.assert_array_equal(corrupt(image, "fog", 5, 0), rounded(expected))


def test_plasma_spans_zero_to_one_and_is_rougher_with_less_decay():
    fields = {d: plasma((100, 70, 3), d, np.random.default_rng(0)) for d in (1.4, 3.0)}
    roughness = {}
    for decay, field in fields.items():
        assert field.shape == (100, 70, 1)
        assert field.min() >= 0 and field.max() <= 1 and np.ptp(field) > 0.5
        roughness[decay] = np.abs(np.diff(field, axis=0)).mean()
    assert roughness[1.4] > 2 * roughness[3.0]
    whole = plasma((64, 64), 2.0, np.random.default_rng(1))
    assert (whole.min(), whole.max()) == (0, 1)


def test_plasma_is_the_midpoint_displacement_of_the_original():
    """Without random changes, every filled point is the mean of its four neighbors."""

    class Still:
        def uniform(self, low, high, shape):
            return np.zeros(shape)

    tile = np.zeros((4, 4))
    tile[0, 0] = 8
    module._fill_centers(tile, 4, 1.0, Still())
    assert tile[2, 2] == 8, "of the corner, four times: the tile is periodic"
    assert tile[0, 2] == tile[2, 0] == (8 + 8 + 8 + 8) / 4
    tile[0, 2] = 0
    module._fill_centers(tile, 2, 1.0, Still())
    assert tile[1, 1] == (8 + 0 + 8 + 8) / 4
    assert tile[0, 1] == (8 + 0 + tile[1, 1] + tile[3, 1]) / 4


def test_frost_is_a_bluish_layer_with_crystals():
    black = np.zeros((224, 224, 3), np.uint8)
    layers = [corrupt(black, "frost", 1, index) / 255 / 0.4 for index in range(4)]
    for layer in layers:
        red, green, blue = layer.mean(axis=(0, 1))
        assert 0.5 < red < green < blue < 0.8
        assert 0.08 < layer[..., 0].std() < 0.15
    assert abs(np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1]) < 0.6


def test_snow_only_brightens():
    image = noise((64, 64, 3))
    for severity in SEVERITIES:
        snowy = corrupt(image, "snow", severity, 0).astype(int)
        assert (snowy >= image).all()
        assert (snowy - image).mean() > 5


def test_brightness_is_that_of_hsv():
    from colorsys import hsv_to_rgb, rgb_to_hsv

    image = np.concatenate([noise((9, 10, 3)), np.zeros((1, 10, 3), np.uint8)])
    result = corrupt(image, "brightness", 3, 0)
    for row, column in np.ndindex(10, 10):
        hue, saturation, value = rgb_to_hsv(*(image[row, column] / 255))
        expected = hsv_to_rgb(hue, saturation, min(value + 0.15, 1))
        np.testing.assert_allclose(result[row, column], np.array(expected) * 255, atol=0.51)


def test_contrast_shrinks_to_the_mean_of_each_channel():
    image = noise((64, 64, 3)) // 4 * np.array([1, 2, 3], np.uint8)
    mean = image.reshape(-1, 3).mean(axis=0)
    expected = rounded((mean + 0.2 * (image - mean)) / 255)
    assert_within_rounding(corrupt(image, "contrast", 3, 0), expected)


def test_elastic_transform_without_moves_is_the_identity(monkeypatch):
    for shape in ((8, 8, 1), (40, 64, 3)):
        image = noise(shape)
        monkeypatch.setitem(CIFAR, "elastic_transform", ((0.0, 0.1, 0.0),) * 5)
        np.testing.assert_array_equal(corrupt(image, "elastic_transform", 1, 0), image)


def test_elastic_transform_moves_three_points_to_where_it_says():
    """Positions of the moved points, in OpenCV's (x, y), are those of the points."""
    jitter, seed = 3.0, 11
    positions = module._affine_positions((60, 90), jitter, np.random.default_rng(seed))
    moves = np.random.default_rng(seed).uniform(-jitter, jitter, (3, 2))
    points = np.array([45, 30]) + 20 * np.array([[1, 1], [1, -1], [-1, -1]])
    steps = positions[:, 1, 0] - positions[:, 0, 0], positions[:, 0, 1] - positions[:, 0, 0]
    for point, move in zip(points, moves, strict=True):
        right, down = point + move
        found = positions[:, 0, 0] + down * steps[0] + right * steps[1]
        np.testing.assert_allclose(found, point[::-1], atol=1e-9)


@pytest.mark.parametrize("shape", [(33, 21, 3), (28, 28, 1), (70, 66, 3)], ids=str)
def test_pixelate_is_pillows(shape):
    image = noise(shape)
    for severity in SEVERITIES:
        share = constants_of("pixelate", severity, shape[:2])
        picture = Image.fromarray(image.squeeze())
        small = picture.resize((int(shape[1] * share), int(shape[0] * share)), Image.BOX)
        expected = np.asarray(small.resize(shape[1::-1], Image.BOX)).reshape(shape)
        np.testing.assert_array_equal(corrupt(image, "pixelate", severity, 0), expected)


@pytest.mark.parametrize("shape", [(33, 21, 3), (28, 28, 1), (70, 66, 3)], ids=str)
def test_jpeg_compression_is_pillows(shape):
    image = noise(shape)
    for severity in SEVERITIES:
        file = io.BytesIO()
        quality = constants_of("jpeg_compression", severity, shape[:2])
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).reshape(shape)
        np.testing.assert_array_equal(corrupt(image, "jpeg_compression", severity, 0), expected)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_constant_images_stay_in_range(corruption):
    for value in (0, 255):
        for shape in ((8, 8, 1), (64, 64, 3)):
            image = np.full(shape, value, np.uint8)
            result = corrupt(image, corruption, 5, 0)
            assert result.dtype == np.uint8
            if corruption not in ("snow", "frost", "fog", "brightness", *NOISE):
                np.testing.assert_allclose(result.astype(int), image, atol=1)
