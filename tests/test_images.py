"""Tests `keras_mixer/data/images.py` against Pillow, the reference decoder."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_mixer.data.images import (
    check_image_file,
    decode_image,
    find_undecodable,
    resize_images,
    to_model_range,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)


def _bytes(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_sound_files_pass(tmp_path, kind):
    path = tmp_path / "image.jpg"  # the content counts, not the name
    path.write_bytes(_bytes(Image.fromarray(PIXELS), kind))
    assert check_image_file(path) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0.1, 0.25, 0.5, 0.75, 0.95])
def test_truncated_files_do_not_pass(tmp_path, kind, kept):
    content = _bytes(Image.fromarray(PIXELS), kind)
    path = tmp_path / "image.jpg"
    path.write_bytes(content[: int(kept * len(content))])
    assert check_image_file(path) is not None


def _png_header(width, height):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_header(*size))
    assert check_image_file(path) is not None


def test_other_formats_and_missing_files_are_named(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(_bytes(Image.fromarray(PIXELS), "GIF"))
    assert check_image_file(path) == "not a JPEG or PNG image"
    assert check_image_file(tmp_path / "missing.png") == "not a regular file"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
def test_png_of_any_mode_decodes_as_pillow_does(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    content = _bytes(image, "PNG")
    opaque = Image.open(io.BytesIO(content))
    expected = np.asarray(opaque.convert("RGBA"))[..., :3]  # transparency is dropped
    np.testing.assert_array_equal(decode_image(content, 3), expected)


def test_jpeg_decodes_as_pillow_does_up_to_rounding():
    smooth = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    content = _bytes(Image.fromarray(smooth), "JPEG", quality=95, subsampling=0)
    expected = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    assert np.abs(decode_image(content, 3).numpy().astype(int) - expected).max() <= 2


def test_sixteen_bits_are_reduced_to_eight():
    values = np.arange(0, 65536, 257 * 5, dtype=np.uint16).reshape(4, 13)
    content = _bytes(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(decode_image(content, 1)[..., 0], values // 257)


def test_gray_decodes_to_one_or_three_channels():
    gray = PIXELS[..., 0]
    content = _bytes(Image.fromarray(gray), "PNG")
    np.testing.assert_array_equal(decode_image(content, 1)[..., 0], gray)
    np.testing.assert_array_equal(decode_image(content, 3), np.stack([gray] * 3, axis=-1))


def test_resizing_to_the_same_shape_changes_no_bit():
    np.testing.assert_array_equal(resize_images(PIXELS, (9, 11)), PIXELS)
    any_size = tf.TensorSpec((None, None, 3), tf.uint8)  # as in the exported model
    resize = tf.function(lambda x: resize_images(x, (9, 11)), input_signature=[any_size])
    np.testing.assert_array_equal(resize(PIXELS), PIXELS)


@pytest.mark.parametrize("shape", [(4, 5), (18, 22), (30, 3)])
def test_resizing_is_antialiased_bilinear_as_pillow_does_it(shape):
    expected = Image.fromarray(PIXELS).resize(shape[::-1], Image.Resampling.BILINEAR)
    result = resize_images(PIXELS, shape).numpy()
    assert np.abs(result - np.asarray(expected, np.float32)).max() <= 1.01  # Pillow rounds twice


def test_model_range():
    np.testing.assert_allclose(to_model_range(np.array([0, 127.5, 255])), [-1, 0, 1])


def test_undecodable_files_are_found_among_good_ones(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    content = _bytes(Image.fromarray(PIXELS), "PNG")
    good.write_bytes(content)
    bad.write_bytes(content[:60])
    (found,) = find_undecodable([bytes(good), bytes(bad)])
    assert found[0] == bytes(bad)


def test_jpegs_as_cameras_write_them_pass(tmp_path):
    """Several pictures in one file, as phones write them; a film or notes after the end marker."""
    photo = Image.fromarray(PIXELS)
    several = tmp_path / "several.jpg"
    photo.save(several, "MPO", save_all=True, append_images=[photo])
    with Image.open(several) as image:
        assert image.format == "MPO"
    assert check_image_file(several) is None
    assert decode_image(several.read_bytes(), 3).shape == (9, 11, 3)
    film = tmp_path / "film.jpg"
    film.write_bytes(_bytes(photo, "JPEG") + bytes(5000))
    assert check_image_file(film) is None
    film.write_bytes(_bytes(photo, "JPEG")[:-2] + bytes(5000))
    assert check_image_file(film) == "truncated"


def test_damage_in_the_middle_of_a_png_is_noticed_before_a_run(tmp_path):
    path = tmp_path / "image.png"
    content = bytearray(_bytes(Image.fromarray(PIXELS), "PNG"))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in check_image_file(path) or "broken" in check_image_file(path)


def test_hostile_bytes_never_raise(tmp_path):
    """1,000 mutations of each kind: a reason or None, never an exception."""
    generator = np.random.default_rng(0)
    path = tmp_path / "image"
    for kind in ("PNG", "JPEG"):
        content = _bytes(Image.fromarray(PIXELS), kind)
        for _ in range(1000):
            mutated = bytearray(content)
            for place in generator.integers(0, len(content), generator.integers(1, 8)):
                mutated[place] = generator.integers(0, 256)
            path.write_bytes(mutated)
            reason = check_image_file(path)
            assert reason is None or isinstance(reason, str)
