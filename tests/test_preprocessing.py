"""Tests `keras_mixer/preprocessing/resize.py`: as Pillow resizes, and the same for every reader."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, SMALL
from PIL import Image

from keras_mixer.model.architecture import INTERPOLATIONS, ModelSpec, Preprocessing
from keras_mixer.preprocessing import resize as resize_module
from keras_mixer.preprocessing.resize import preprocess, resize_images, to_model_range

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("eval_crop", [0.0, 1.0])
def test_resizing_to_the_same_shape_changes_no_bit(eval_crop, interpolation):
    how = ((9, 11), eval_crop, interpolation)
    np.testing.assert_array_equal(resize_images(PIXELS, *how), PIXELS)
    any_size = tf.TensorSpec((None, None, 3), tf.uint8)  # as in the exported model
    resize = tf.function(lambda x: resize_images(x, *how), input_signature=[any_size])
    np.testing.assert_array_equal(resize(PIXELS), PIXELS)


@pytest.mark.parametrize("shape", [(4, 5), (18, 22), (30, 3)])
def test_resizing_is_antialiased_bilinear_as_pillow_does_it(shape):
    expected = Image.fromarray(PIXELS).resize(shape[::-1], Image.Resampling.BILINEAR)
    result = resize_images(PIXELS, shape).numpy()
    assert np.abs(result - np.asarray(expected, np.float32)).max() <= 1.01  # Pillow rounds twice


@pytest.mark.parametrize("shape", [(4, 5), (18, 22), (30, 3), (16, 16), (56, 100)])
def test_bicubic_resizing_is_pillows(shape):
    """With the same kernel (a = -0.5), so to a hundredth of a level in Pillow's floats.

    In bytes Pillow rounds twice, and clips after the rows, too: gray pixels overshoot nothing.
    """
    bicubic = Image.Resampling.BICUBIC
    gray = np.random.default_rng(1).integers(64, 192, (40, 70, 3), np.uint8)
    expected = np.asarray(Image.fromarray(gray).resize(shape[::-1], bicubic), np.float32)
    result = resize_images(gray, shape, interpolation="bicubic").numpy()
    assert np.abs(result.round() - expected).max() <= 1
    for channel in range(3):  # from black to white: what overshoots is clipped
        floats = Image.fromarray(PIXELS[..., channel].astype(np.float32))
        expected = np.asarray(floats.resize(shape[::-1], bicubic)).clip(0, 255)
        result = resize_images(PIXELS, shape, interpolation="bicubic")[..., channel]
        np.testing.assert_allclose(result, expected, atol=0.01)
        assert np.abs(result - resize_images(PIXELS, shape)[..., channel]).max() > 1


@pytest.mark.parametrize("interpolation, levels, largest", [
    ("bilinear", (0, 256), 1.01), ("bicubic", (64, 192), 1.3),
])  # fmt: skip
@pytest.mark.parametrize("eval_crop", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("size", [(40, 70), (70, 40), (9, 11), (32, 24)])
@pytest.mark.parametrize("shape", [(16, 16), (8, 20), (24, 18)])
def test_the_evaluation_crop_is_pillows(size, shape, eval_crop, interpolation, levels, largest):
    """Scaled to cover, then the center. It differs by a level, as Pillow rounds, twice."""
    image = Image.fromarray(np.random.default_rng(1).integers(*levels, (*size, 3), np.uint8))
    scale = max(s / eval_crop / o for s, o in zip(shape, size, strict=True))
    height, width = (round(side * scale) for side in size)
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    scaled = image.resize((width, height), Image.Resampling[interpolation.upper()])
    expected = scaled.crop((left, top, left + shape[1], top + shape[0]))
    how = (shape, eval_crop, interpolation)
    result = resize_images(np.asarray(image), *how)
    assert result.shape == (*shape, 3)
    assert np.abs(result - np.asarray(expected, np.float32)).max() <= largest
    any_size = tf.TensorSpec((None, None, None, 3), tf.uint8)
    resize = tf.function(lambda x: resize_images(x, *how), input_signature=[any_size])
    np.testing.assert_allclose(resize(np.asarray(image)[None])[0], result, atol=1e-3)
    assert resize.get_concrete_function().output_shapes.as_list() == [None, *shape, 3]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("eval_crop", [0.0, 0.1, 0.875])
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (7, 350), (700, 30), (30, 700), (40, 60)])
def test_strips_are_cropped_first_to_the_same_pixels(size, eval_crop, interpolation, monkeypatch):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    how = ((16, 20), eval_crop, interpolation)
    found = resize_images(image, *how)
    monkeypatch.setattr(resize_module, "_MOST_TIMES", 1 << 40)
    np.testing.assert_allclose(found, resize_images(image, *how), atol=0.1)  # positions of 1e5


STRIPS = """
import resource, sys, time
import numpy as np
from keras_mixer.preprocessing.resize import resize_images

def growth(*shape):
    image, before = np.full((*shape, 3), 7, np.uint8), peak()
    begin = time.process_time()
    for how in ((0.0, "bilinear"), (0.1, "bicubic"), (0.875, "bilinear"), (0.875, "bicubic")):
        assert np.ptp(resize_images(image, (224, 224), *how)) < 1e-3
    assert peak() - before < 300 and time.process_time() - begin < 5, (shape, peak() - before)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

resize_images(np.zeros((9, 9, 3), np.uint8), (224, 224), 0.1)
for length in (2000, 30_000, 65_535):
    growth(1, length), growth(length, 1), growth(150, length)
"""


def test_strips_take_little_memory():
    """Resized whole, they would be gigabytes, or more pixels than TensorFlow counts."""
    pytest.importorskip("resource")
    subprocess.run([sys.executable, "-c", STRIPS], cwd=ROOT, check=True)


def test_the_papers_evaluation_crop_keeps_the_aspect_ratio_and_the_center():
    """`resize_small(256)|central_crop(224)` of a slope: its steps are equal in both directions."""
    rows, columns = np.meshgrid(np.arange(512.0), np.arange(1024.0), indexing="ij")
    slope = np.stack([rows, columns], -1) / 4
    result = resize_images(slope, (224, 224), 0.875).numpy()
    np.testing.assert_allclose(np.diff(result[..., 0], axis=0), 0.5, atol=1e-3)
    np.testing.assert_allclose(np.diff(result[..., 1], axis=1), 0.5, atol=1e-3)
    center = result[111:113, 111:113].mean(axis=(0, 1))
    np.testing.assert_allclose(center, [511 / 8, 1023 / 8], atol=1e-3)


def test_values_are_scaled_to_the_range_of_the_model():
    np.testing.assert_allclose(to_model_range(np.array([0, 127.5, 255])), [-1, 0, 1])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("eval_crop", [0.0, 0.75])
def test_images_are_prepared_as_the_spec_says(eval_crop, interpolation):
    spec = ModelSpec(SMALL, preprocessing=Preprocessing(eval_crop, interpolation))
    expected = to_model_range(resize_images(PIXELS, SMALL.image_shape, eval_crop, interpolation))
    np.testing.assert_array_equal(preprocess(PIXELS, spec), expected)


@pytest.mark.parametrize("eval_crop", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(9, 30, 3), (24, 24, 3), (200, 90, 3)])
def test_bytes_become_floats_only_once_they_are_small(shape, eval_crop):
    """As floats, the pixels of a large photo are a gigabyte."""
    photo = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    resize = tf.function(lambda images: resize_images(images, (24, 24), eval_crop))
    assert np.array_equal(resize(photo), resize(photo.astype(np.float32)))
    traced = resize.get_concrete_function(tf.TensorSpec((None, None, 3), tf.uint8))
    assert "Cast" not in {op.type for op in traced.inputs[0].consumers()}
