"""Tests `preprocessing/augment.py` and `randaugment.py`: eagerly, as graphs, inside tf.data.

The references are Pillow, NumPy, and properties of what comes out.
"""

import functools
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from PIL import Image, ImageEnhance, ImageOps

from keras_mixer.preprocessing.augment import (
    ERASED_AREA,
    ERASED_ASPECT,
    augment,
    inception_box,
    inception_crop,
    mix,
    random_erase,
    random_flip,
    random_padded_crop,
)
from keras_mixer.preprocessing.randaugment import FILL, OPERATIONS, jitter_color, rand_augment

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), np.uint8)


def all_ways(function, *inputs):
    """Runs a function eagerly, twice, as a graph and inside tf.data; returns the one result."""
    inputs = [tf.constant(each) for each in (inputs or (IMAGES,))]
    eager = function(*inputs)
    dataset = tf.data.Dataset.from_tensors(tuple(inputs)).map(function)
    others = (function(*inputs), tf.function(function)(*inputs), next(iter(dataset)))
    for other in others:
        tf.nest.map_structure(np.testing.assert_array_equal, other, eager)
    assert tf.nest.map_structure(lambda spec: spec.shape, dataset.element_spec) == (
        tf.nest.map_structure(lambda tensor: tensor.shape, eager)
    ), "a static shape was lost"
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), eager)


def test_flip_gives_each_image_or_its_mirror():
    flipped = all_ways(lambda images: random_flip(images, (3, 7)))
    is_same = (flipped == IMAGES).all(axis=(1, 2, 3))
    is_mirror = (flipped == IMAGES[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (is_same | is_mirror).all()
    assert 16 < is_mirror.sum() < 48  # of 64; 4 standard deviations are 16


def test_padded_crop_is_a_window_of_the_padded_image():
    padding = 2
    cropped = all_ways(lambda images: random_padded_crop(images, (3, 7), padding))
    padded = np.pad(IMAGES, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    places = set()
    for image, result in zip(padded, cropped, strict=True):
        fitting = [
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if np.array_equal(image[y : y + 6, x : x + 5], result)
        ]
        assert len(fitting) == 1
        places.update(fitting)
    assert {y for y, _ in places} == {x for _, x in places} == set(range(5))


EVERYTHING = {
    "flip": True, "crop_padding": 2, "randaugment": (2, 9), "color_jitter": 0.4,
    "random_erasing": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("options", [{name: value} for name, value in EVERYTHING.items()])
def test_draws_follow_the_seed_and_the_step(options):
    def once(seed):
        return augment(tf.constant(IMAGES), tf.constant(seed, tf.int64), **options).numpy()

    np.testing.assert_array_equal(once((1, 5)), once((1, 5)))
    assert (once((1, 5)) != once((1, 6))).any()
    assert (once((1, 5)) != once((2, 5))).any()


def test_nothing_asked_for_changes_nothing():
    np.testing.assert_array_equal(augment(tf.constant(IMAGES), (0, 0)), IMAGES)


def test_only_what_changes_values_changes_the_type():
    moved = augment(tf.constant(IMAGES), (1, 5), flip=True, crop_padding=2)
    assert moved.dtype == tf.uint8
    changed = augment(tf.constant(IMAGES), (1, 5), **EVERYTHING).numpy()
    assert changed.dtype == np.float32
    assert changed.min() >= 0 and changed.max() <= 255
    as_floats = augment(tf.constant(IMAGES, tf.float32), (1, 5), **EVERYTHING)
    np.testing.assert_array_equal(as_floats, changed)


def test_everything_together_is_each_in_turn():
    """In the documented order: the one before decides what the next one sees."""
    images = tf.constant(IMAGES)
    for name, value in EVERYTHING.items():
        images = augment(images, (1, 5), **{name: value})
    np.testing.assert_array_equal(augment(tf.constant(IMAGES), (1, 5), **EVERYTHING), images)


def test_flip_and_crop_draw_apart():
    """With one seed for both, flipped images would always be cropped at the same places."""
    seed = tf.constant((1, 5), tf.int64)
    both = augment(tf.constant(IMAGES), seed, flip=True, crop_padding=2).numpy()
    flipped = augment(tf.constant(IMAGES), seed, flip=True).numpy()
    padded = np.pad(flipped, ((0, 0), (2, 2), (2, 2), (0, 0)))
    is_mirror = (flipped != IMAGES).any(axis=(1, 2, 3))
    columns = np.array([
        next(x for y in range(5) for x in range(5) if np.array_equal(p[y : y + 6, x : x + 5], r))
        for p, r in zip(padded, both, strict=True)
    ])  # fmt: skip
    assert len(set(columns[is_mirror])) == len(set(columns[~is_mirror])) == 5


# === Inception crop ===


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_crop_is_pillows_crop_and_resize_of_the_box(channels):
    image = np.random.default_rng(1).integers(0, 256, (120, 200, channels), np.uint8)
    pillow = Image.fromarray(image if channels == 3 else image[..., 0])
    for step in range(4):
        crop = inception_crop(tf.constant(image), (3, step), (24, 32), 0.05).numpy()
        top, left, height, width = inception_box(image.shape, (3, step), 0.05).numpy()
        box = pillow.crop((left, top, left + width, top + height))
        expected = np.asarray(box.resize((32, 24), Image.Resampling.BILINEAR)).reshape(crop.shape)
        np.testing.assert_allclose(crop, expected, atol=1.01)  # Pillow rounds after each pass


def test_inception_crop_is_the_same_everywhere_and_for_every_type():
    image = np.random.default_rng(1).integers(0, 256, (60, 50, 3), np.uint8)

    def crop(image):
        return inception_crop(image, (3, 7), (24, 32), 0.05)

    np.testing.assert_array_equal(all_ways(crop, image), all_ways(crop, image.astype(np.float32)))
    unknown = tf.function(crop, input_signature=[tf.TensorSpec((None, None, 3), tf.uint8)])
    assert unknown.get_concrete_function().output_shapes == (24, 32, 3)
    np.testing.assert_array_equal(unknown(image), crop(image))


def test_inception_boxes_are_in_range_and_everywhere():
    seeds = np.stack([np.full(1000, 3), np.arange(1000)], axis=1)
    boxes = tf.data.Dataset.from_tensor_slices(seeds).map(
        lambda seed: inception_box((120, 200, 3), seed, 0.1)
    )
    top, left, height, width = np.stack(list(boxes.as_numpy_iterator())).T
    assert (top >= 0).all() and (top + height <= 120).all()
    assert (left >= 0).all() and (left + width <= 200).all()
    aspect, share = width / height, height * width / (120 * 200)
    assert aspect.min() > 3 / 4 * 0.98 and aspect.max() < 4 / 3 * 1.02  # whole pixels
    assert abs(aspect.mean() - 25 / 24) < 0.02 and aspect.min() < 0.77 and aspect.max() > 1.3
    assert 0.1 <= share.min() < 0.12 and 0.7 < share.max() <= 0.8  # 160 x 120 is the largest
    for start, length, size in ((top, height, 120), (left, width, 200)):
        place = (start / (size - length).clip(1))[length < size]
        assert abs(place.mean() - 0.5) < 0.04 and place.min() < 0.02 and place.max() > 0.98


def test_inception_crop_of_all_of_a_panorama_is_all_of_it():
    assert inception_box((40, 200, 3), (3, 7), 1.0).numpy().tolist() == [0, 0, 40, 200]


# === RandAugment ===


def enhanced(enhancement):
    return lambda image, m: enhancement(image).enhance(max(0.1, 1 + 0.09 * m))


VALUE_REFERENCES = {  # operation -> (Pillow's, bound of the deviation at a magnitude)
    "identity": (lambda image, m: image, 0),
    "auto_contrast": (lambda image, m: ImageOps.autocontrast(image), 1),  # Pillow truncates
    "equalize": (lambda image, m: ImageOps.equalize(image), 0),
    "solarize": (lambda image, m: ImageOps.solarize(image, 256 - 256 * abs(m) / 30), 0),
    "posterize": (lambda image, m: ImageOps.posterize(image, 8 - round(abs(m) / 7.5)), 0),
    # Pillow rounds the image without (color, sharpness, ...), times which the factor goes
    "color": (enhanced(ImageEnhance.Color), lambda m: 1 + 0.09 * abs(m) * 0.6),
    "contrast": (enhanced(ImageEnhance.Contrast), 1),
    "brightness": (enhanced(ImageEnhance.Brightness), 1),
    "sharpness": (enhanced(ImageEnhance.Sharpness), lambda m: 1 + 0.09 * abs(m) * 0.6),
}
PLACES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
MAGNITUDES = (4, 10, 30)


def photo(channels, height=32, width=40):
    """Smooth, of few and not all values, none of them at the ends."""
    coarse = np.random.default_rng(2).integers(0, 256, (6, 7, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = Image.fromarray((np.asarray(image) // 2 + 40).astype(np.uint8))
    return image if channels == 3 else image.convert("L")


def apply(name, image, magnitude):
    """An operation on copies of a Pillow image: (sign, result) for both signs."""
    pixels = np.asarray(image, np.float32).reshape(1, image.height, image.width, -1)
    pixels = tf.repeat(pixels, 5, axis=0)  # enough for a vector of numbers and some left over
    for sign in (1, -1):
        results = OPERATIONS[name](pixels, sign * magnitude).numpy()
        np.testing.assert_array_equal(results[1:], results[:-1])
        yield sign, results[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", VALUE_REFERENCES)
def test_operation_on_values_is_pillows(name, magnitude, channels):
    reference, bound = VALUE_REFERENCES[name]
    image = photo(channels)
    if name == "color" and channels == 1:
        reference = VALUE_REFERENCES["identity"][0]
    for sign, result in apply(name, image, magnitude):
        m = sign * magnitude
        expected = np.asarray(reference(image, m), np.float32).reshape(result.shape)
        atol = bound(m) if callable(bound) else bound
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol + 1e-3, err_msg=f"{m=}")


def affine_coefficients(name, m, width, height):
    """Where (x, y) looks: (a, b, c, d, e, f) of `(a x + b y + c, d x + e y + f)`."""
    sine, cosine = np.sin(np.radians(3 * m)), np.cos(np.radians(3 * m))
    x, y = (width - 1) / 2, (height - 1) / 2
    share = np.clip(0.045 * m, -0.9, 0.9)
    return {
        "shear_x": (1, 0.03 * m, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.03 * m, 1, 0),
        "translate_x": (1, 0, share * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, share * height),
        "rotate": (
            *(cosine, -sine, x - cosine * x + sine * y),
            *(sine, cosine, y - sine * x - cosine * y),
        ),
    }[name]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", PLACES)
def test_operation_on_places_is_pillows(name, magnitude, channels):
    image = photo(channels)
    for sign, result in apply(name, image, magnitude):
        m = sign * magnitude
        a, b, c, d, e, f = affine_coefficients(name, m, image.width, image.height)
        # Pillow's pixels have their centers at halves
        halves = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
        halves = (*halves[:2], halves[2], *halves[3:5], halves[5])
        pillow = image.transform(
            image.size, Image.Transform.AFFINE, halves, Image.Resampling.BILINEAR
        )
        expected = np.asarray(pillow, np.float32).reshape(result.shape)
        y, x = np.mgrid[: image.height, : image.width]
        x, y = a * x + b * y + c, d * x + e * y + f
        margin = 1e-3
        within = (x > -margin) & (x < image.width - 1 + margin)
        within &= (y > -margin) & (y < image.height - 1 + margin)
        outside = (x < -1) | (x > image.width) | (y < -1) | (y > image.height)
        assert within.any() or abs(m) == 30
        np.testing.assert_allclose(result[within], expected[within], atol=1.01, err_msg=f"{m=}")
        assert (result[outside] == FILL).all()


def slowly_placed(name, images, m):
    height, width = images.shape[1:3]
    row = (*affine_coefficients(name, m, width, height), 0, 0)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images, transforms=[row], output_shape=(height, width),
        interpolation="BILINEAR", fill_mode="CONSTANT", fill_value=FILL,
    )  # fmt: skip


def stretched(images):
    low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
    return 255 * (images - low) / (high - low)


def equalized(images):
    channels = images.round().astype(np.uint8).transpose(0, 3, 1, 2)
    flat = channels.reshape(-1, *channels.shape[2:])
    results = np.stack([ImageOps.equalize(Image.fromarray(each)) for each in flat])
    return results.reshape(channels.shape).transpose(0, 2, 3, 1)


def without_color(images):
    if images.shape[-1] == 1:
        return images
    return (images * (0.2989, 0.587, 0.114)).sum(axis=3, keepdims=True)


def mean_gray(images):
    means = without_color(images).round().mean(axis=(1, 2, 3), keepdims=True)
    return np.floor(means + 0.5)


def smoothed(images):
    results, (height, width) = images.copy(), images.shape[1:3]
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            total = images[:, y - 1 : y + 2, x - 1 : x + 2].sum(axis=(1, 2))
            results[:, y, x] = (total + 4 * images[:, y, x]) / 13
    return results


def blended(degenerate):
    """Color, contrast, brightness, sharpness: from what has none of it (factor 0) to the image."""
    return lambda images, m: degenerate(images) * (1 - (f := max(0.1, 1 + 0.09 * m))) + images * f


SLOW = {  # operation -> the same, of NumPy arrays of float64
    "identity": lambda images, m: images,
    "auto_contrast": lambda images, m: stretched(images),
    "equalize": lambda images, m: equalized(images),
    "solarize": lambda images, m: np.where(images < 256 * (1 - abs(m) / 30), images, 255 - images),
    "posterize": lambda images, m: images.round() // (k := 2 ** round(abs(m) / 7.5)) * k,
    "color": blended(without_color),
    "contrast": blended(mean_gray),
    "brightness": blended(np.zeros_like),
    "sharpness": blended(smoothed),
}


def test_every_operation_is_compared():
    assert {*PLACES, *SLOW} == set(OPERATIONS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(3, 3), (17, 24), (1000, 5)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_on_fractions_is_the_slow_one(name, size, channels):
    """For images that differ, of values between the whole numbers, as crops have them."""
    images = np.random.default_rng(3).uniform(2, 250, (3, *size, channels)).astype(np.float32)
    for m in (0, 5, -10, 30, -30):
        result = OPERATIONS[name](tf.constant(images), m).numpy()
        if name in PLACES:
            expected, atol = slowly_placed(name, images, m), 0.01
        else:
            expected = np.clip(SLOW[name](images.astype(np.float64), m), 0, 255)
            atol = 0 if name in ("identity", "equalize", "posterize") else 1e-3
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol, err_msg=f"{m=}")


@pytest.mark.parametrize("channels", [1, 3])
def test_operation_takes_batches_of_any_number(channels):
    """As groups of images are, of sizes that the graph does not know."""
    images = np.random.default_rng(3).uniform(0, 255, (7, 17, 24, channels)).astype(np.float32)
    for name, operation in OPERATIONS.items():
        spec = tf.TensorSpec((None, 17, 24, channels))
        graph = tf.function(functools.partial(operation, m=-9), input_signature=[spec])
        together = graph(images)
        assert together.shape == images.shape
        for image, result in zip(images, together, strict=True):
            np.testing.assert_allclose(graph(image[None])[0], result, atol=1e-4, err_msg=name)


def test_the_strongest_rotation_is_a_quarter_of_a_turn():
    image = photo(3, 31, 31)
    for sign, result in apply("rotate", image, 30):
        np.testing.assert_allclose(result, np.rot90(np.asarray(image), sign), atol=0.01)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize"}))
def test_a_magnitude_of_zero_changes_nothing(name):
    for _, result in apply(name, photo(3), 0):
        np.testing.assert_array_equal(result, np.asarray(photo(3)))


@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
def test_plain_images_stay(name, value):
    """Without a contrast there is nothing to divide by."""
    for _, result in apply(name, Image.new("RGB", (20, 30), (value,) * 3), 9):
        assert (result == value).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_gives_each_image_one_operation_of_its_own(channels):
    image = photo(channels)
    pixels = np.asarray(image, np.uint8).reshape(1, 32, 40, channels)
    scale = np.linspace(0.5, 1, 256)[:, None, None, None]  # so no image may take another's place
    pixels = (pixels * scale).astype(np.uint8)
    results = rand_augment(tf.constant(pixels), (3, 7), 1, 9).numpy()
    fitting = np.array([
        np.isclose(operation(tf.constant(pixels, tf.float32), m), results).all(axis=(1, 2, 3))
        for operation in OPERATIONS.values()
        for m in (9, -9)
    ])  # fmt: skip
    assert fitting.any(axis=0).all()
    drawn = fitting.reshape(14, 2, 256).sum(axis=2)  # both signs where they do not matter
    if channels == 3:
        assert drawn.sum(axis=1).min() >= 5  # 18 expected; 4.1 is a standard deviation
        signed = [tuple(OPERATIONS).index(name) for name in ("rotate", "shear_x", "contrast")]
        assert (drawn[signed] >= 1).all()


def test_rand_augment_does_what_it_draws():
    """The draws are part of what a seed means: runs are repeated by them."""
    images = np.random.default_rng(3).uniform(0, 255, (128, 8, 9, 3)).astype(np.float32)
    results = rand_augment(tf.constant(images), (3, 7), 1, 9)
    chosen = tf.random.stateless_uniform((1, 128), (3, 7), 0, 14, tf.int32)[0]
    positive = tf.random.stateless_uniform((1, 128), tf.random.fold_in((3, 7), 1))[0] < 0.5
    for image, kind, is_positive, result in zip(images, chosen, positive, results, strict=True):
        name = list(OPERATIONS)[kind]
        expected = OPERATIONS[name](tf.constant(image[None]), 9 if is_positive else -9)[0]
        np.testing.assert_allclose(result, expected, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_the_same_everywhere(channels):
    images = np.repeat(np.asarray(photo(channels)).reshape(1, 32, 40, channels), 128, axis=0)
    all_ways(lambda images: rand_augment(images, (3, 7), 2, 15), images)


def test_two_layers_are_two_operations():
    """Each image is what some pair of operations makes of it, and not one pair for all."""
    image = photo(3, 8, 8)
    pixels = tf.constant(np.asarray(image, np.float32)[None])

    def all_of(pixels):
        return tf.concat([op(pixels, m) for op in OPERATIONS.values() for m in (9, -9)], axis=0)

    results = rand_augment(tf.repeat(pixels, 32, axis=0), (3, 7), 2, 9).numpy()
    twice = all_of(all_of(pixels)).numpy()
    close = np.abs(results[:, None] - twice[None]).max(axis=(2, 3, 4)) < 1e-2
    assert close.any(axis=1).all()
    assert len(np.unique(results.round(1), axis=0)) > 24


def test_keras_cv_is_imported_when_asked_for_and_makes_no_state():
    """Deterministic TensorFlow has no global generator; here the layers are first made in a map."""
    code = """
import sys
import numpy as np
import tensorflow as tf, keras
from keras_mixer.preprocessing.augment import augment, inception_crop, mix
tf.config.experimental.enable_op_determinism()
keras.mixed_precision.set_global_policy("mixed_bfloat16")
images = tf.constant(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8))
images = augment(images, (1, 2), flip=True, crop_padding=1, color_jitter=0.4, random_erasing=1.0)
mix(images, tf.eye(64), (1, 2), mixup=1.0, cutmix=1.0)
inception_crop(images[0], (1, 2), (4, 4), 0.1)
assert not any(name.startswith("keras_cv") for name in sys.modules)
def augmented(images):
    return augment(images, (1, 2), randaugment=(1, 9))
first, second = tf.data.Dataset.from_tensors(images).repeat(2).map(augmented)
assert "keras_cv" in sys.modules
for other in (second, augmented(images)):
    np.testing.assert_array_equal(first, other)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "done", done.stderr


# === Color jitter ===


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_pillows_enhancements_in_turn(channels):
    image, count = photo(channels), 8
    pixels = np.asarray(image, np.uint8).reshape(1, 32, 40, channels)
    results = all_ways(
        lambda images: jitter_color(images, (3, 7), 0.5), np.repeat(pixels, count, axis=0)
    )
    factors = tf.random.stateless_uniform((3, count, 1, 1, 1), (3, 7), 0.5, 1.5).numpy()
    assert factors.std() > 0.2 and results.std(axis=0).max() > 10
    enhancements = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color][
        : channels + 1
    ]
    for result, drawn in zip(results, factors.reshape(3, count).T, strict=True):
        expected = image
        for enhancement, factor in zip(enhancements[: 2 + channels // 3], drawn, strict=False):
            expected = enhancement(expected).enhance(float(factor))
        expected = np.asarray(expected, np.float32).reshape(result.shape)
        np.testing.assert_allclose(result, expected, atol=4)  # thrice truncated


def test_color_jitter_above_one_never_inverts():
    results = jitter_color(tf.constant(IMAGES), (3, 7), 1.5).numpy()
    assert results.min() >= 0 and results.max() <= 255
    brighter = jitter_color(tf.fill((1000, 4, 4, 3), 50.0), (3, 7), 1.5).numpy()
    assert 58 < brighter.mean() < 67  # factors from 0 to 2.5, not from -0.5


# === Random erasing ===


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (24, 60)])
def test_erasing_changes_exactly_one_rectangle(size, channels):
    height, width = size
    images = np.full((400, height, width, channels), 300, np.float32)  # no noise is 300
    erased = all_ways(lambda images: random_erase(images, (3, 7), 0.75), images)
    changed = (erased != 300).any(axis=3)
    assert (changed == (erased != 300).all(axis=3)).all()
    boxes = []
    for mask in changed[changed.any(axis=(1, 2))]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((rows[0], columns[0], len(rows), len(columns)))
        assert mask.sum() == len(rows) * len(columns)
        assert np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)
    assert abs(len(boxes) / 400 - 0.75) < 0.09  # 4 standard deviations
    top, left, box_height, box_width = np.array(boxes).T
    area = box_height * box_width / (height * width)
    assert area.min() > ERASED_AREA[0] * 0.7 and area.max() < ERASED_AREA[1] * 1.06  # whole pixels
    assert abs(area.mean() - np.mean(ERASED_AREA)) < 0.025 and area.std() > 0.07
    aspect = box_height / box_width
    assert aspect.min() > ERASED_ASPECT[0] * 0.7 and aspect.max() < ERASED_ASPECT[1] * 1.4
    assert aspect.min() < 0.5 and aspect.max() > 1.5 and abs(np.log(aspect).mean()) < 0.45
    assert top.min() == 0 and (top + box_height).max() == height
    assert left.min() == 0 and (left + box_width).max() == width
    noise = erased[erased != 300]
    assert abs(noise.mean() - 127.5) < 1 and abs(noise.std() - 255 / 12**0.5) < 1


def test_erasing_with_probability_zero_and_one():
    images = tf.constant(IMAGES)
    np.testing.assert_array_equal(random_erase(images, (3, 7), 0.0), IMAGES)
    erased = random_erase(images, (3, 7), 1.0).numpy()
    assert (erased != IMAGES).any(axis=(1, 2, 3)).all()


# === MixUp and CutMix ===

LABELS = np.eye(64, dtype=np.float32) * 0.9 + 0.1 / 64  # smoothed


def kept(labels):
    """What each image kept of itself, as its label tells."""
    return (np.diag(labels) - 0.1 / 64) / 0.9


def mixing(**options):
    return lambda images, labels: mix(images, labels, (3, 7), **options)


def test_mixup_weighs_images_as_labels():
    images, labels = all_ways(mixing(mixup=1.0), IMAGES, LABELS)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
    share = kept(labels)[:, None]
    others = np.roll(LABELS, 1, axis=0)
    np.testing.assert_allclose(labels, share * LABELS + (1 - share) * others, atol=1e-5)
    share = share[..., None, None]
    expected = share * IMAGES + (1 - share) * np.roll(IMAGES, 1, axis=0)
    np.testing.assert_allclose(images, expected, atol=1e-3)
    assert len(np.unique(share)) == 64


def test_cutmix_shares_are_counted_pixels():
    images, labels = all_ways(mixing(cutmix=1.0), IMAGES, LABELS)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
    partners = np.roll(IMAGES, 1, axis=0)
    is_own, is_other = (images == IMAGES).all(axis=3), (images == partners).all(axis=3)
    assert (is_own | is_other).all()
    np.testing.assert_allclose(is_own.mean(axis=(1, 2)), kept(labels), atol=1e-5)
    for mask in ~is_own:
        assert (mask == mask.any(axis=1)[:, None] & mask.any(axis=0)).all()  # a rectangle


def shares(alpha, kind, size=64, count=2000):
    """What `count` images keep of themselves; their labels have one entry per parity."""
    parity = tf.one_hot(tf.range(count) % 2, 2)
    _, labels = mix(tf.zeros((count, size, size, 1)), parity, (3, 7), **{kind: alpha})
    return tf.reduce_sum(labels * parity, axis=1).numpy()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_are_beta_distributed(alpha):
    drawn = shares(alpha, "mixup", 1)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert abs(drawn.mean() - 0.5) < 4 * (variance / 2000) ** 0.5
    assert abs(drawn.var() / variance - 1) < 0.13


def test_a_tiny_alpha_mixes_next_to_nothing():
    """float32 would lose both gamma draws of every sixth pair, and mix those half and half."""
    drawn = shares(0.01, "mixup", 1)
    assert np.isfinite(drawn).all()
    assert ((drawn > 0.01) & (drawn < 0.99)).mean() < 0.07


def test_cutmix_boxes_have_the_drawn_area_where_they_fit():
    """A center drawn evenly over the image loses some of the box: 7/36 of the image on average."""
    drawn = 1 - shares(1.0, "cutmix")
    rng = np.random.default_rng(0)
    area, center = rng.random(100_000), rng.random((2, 100_000))
    sides = np.minimum(1, center + area**0.5 / 2) - np.maximum(0, center - area**0.5 / 2)
    expected = sides.prod(axis=0)
    assert abs(drawn.mean() - expected.mean()) < 0.03
    np.testing.assert_allclose(
        np.quantile(drawn, [0.2, 0.5, 0.8]), np.quantile(expected, [0.2, 0.5, 0.8]), atol=0.05
    )


def test_with_both_on_each_image_is_mixed_in_one_way():
    images, labels = all_ways(mixing(mixup=1.0, cutmix=1.0), IMAGES, LABELS)
    added, added_labels = all_ways(mixing(mixup=1.0), IMAGES, LABELS)
    cut, cut_labels = all_ways(mixing(cutmix=1.0), IMAGES, LABELS)
    is_added = (images == added).all(axis=(1, 2, 3))
    is_cut = (images == cut).all(axis=(1, 2, 3))
    assert (is_added | is_cut).all() and 16 < is_added.sum() < 48
    np.testing.assert_array_equal(labels[is_added], added_labels[is_added])
    np.testing.assert_array_equal(labels[is_cut], cut_labels[is_cut])


def test_mixing_follows_the_seed_and_leaves_alone_what_is_not_asked_for():
    images, labels = mix(IMAGES, LABELS, (3, 7))
    assert images is IMAGES and labels is LABELS
    for options in ({"mixup": 1.0}, {"cutmix": 1.0}):
        one, other = (mix(IMAGES, LABELS, (3, step), **options)[1].numpy() for step in (7, 8))
        assert (one != other).any()
