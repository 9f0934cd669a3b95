"""Tests `keras_mixer/data/images.py`: what is refused and why; resizing as Pillow does it."""

import builtins
import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_mixer.preprocessing import resize
from keras_mixer.preprocessing.resize import (
    IMAGE_SUFFIXES,
    check_image_file,
    decode_image,
    decoding_problem,
    find_undecodable,
    resize_images,
    to_model_range,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)


def _bytes(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


KINDS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_pass(tmp_path, kind):
    path = tmp_path / "image.jpg"  # the content counts, not the name
    path.write_bytes(_bytes(Image.fromarray(PIXELS), kind))
    assert check_image_file(path) is None
    assert check_image_file(bytes(path)) is None


def test_every_suffix_is_known_to_pillow():
    formats = {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES}
    assert formats == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.95])
def test_truncated_files_do_not_pass(tmp_path, kind, kept):
    content = _bytes(Image.fromarray(PIXELS), kind)
    path = tmp_path / "image.jpg"
    path.write_bytes(content[: int(kept * len(content))])
    assert check_image_file(path) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_of_large_files_only_header_and_tail_are_read(tmp_path, kind, monkeypatch):
    """So that a million images are checked in minutes."""
    large = np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    path = tmp_path / "image"
    Image.fromarray(large).save(path, kind, **options)
    count = 0

    class Counted(io.FileIO):
        def readinto(self, buffer):
            nonlocal count
            count += (got := super().readinto(buffer))
            return got

    monkeypatch.setattr(builtins, "open", lambda path, mode: io.BufferedReader(Counted(path), 512))
    assert check_image_file(path) is None
    assert path.stat().st_size > 200_000
    assert 0 < count < 10_000


def _bmp(bits, *, compression=0, header_size=40, masks=b""):
    palette = bytes(4 * 2**bits) if bits <= 8 else b""
    offset = 14 + header_size + len(masks) + len(palette)
    fields = (11, 9, 1, bits, compression, 0, 0, 0, 0, 0)
    header = struct.pack("<IiiHHIIiiII", header_size, *fields)
    if header_size == 12:
        header = struct.pack("<IHHHH", 12, 11, 9, 1, bits)
    start = b"BM" + struct.pack("<IHHI", 0, 0, 0, offset)
    return start + header + masks + palette + bytes(44 * 9)


def _gif_that_is_larger_than_its_frame():
    content = bytearray(_bytes(Image.fromarray(PIXELS), "GIF"))
    content[6:10] = struct.pack("<HH", 20, 15)
    return bytes(content)


def _jpeg(frame):
    content = _bytes(Image.fromarray(PIXELS), "JPEG")
    place = content.index(b"\xff\xc0")
    return content[: place + 1] + bytes([frame]) + content[place + 2 :]


def _animation():
    frames = [Image.fromarray(np.roll(PIXELS, k, 0)) for k in range(2)]
    return _bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "content, reason",
    [
        (_jpeg(0xC3), "a lossless or hierarchical JPEG: save it as PNG"),
        (_jpeg(0xCD), "a lossless or hierarchical JPEG: save it as PNG"),
        (_animation(), "an animated WebP: save its first frame as PNG"),
        (_gif_that_is_larger_than_its_frame(), "does not fill it: save that frame as PNG"),
        (_bmp(1), "a BMP other than of plain 8, 24 or 32 bits"),
        (_bmp(4), "a BMP other than of plain 8, 24 or 32 bits"),
        (_bmp(8, compression=1), "a BMP other than of plain 8, 24 or 32 bits"),
        (_bmp(16), "a BMP other than of plain 8, 24 or 32 bits"),
        (_bmp(24, header_size=12), "a BMP other than of plain 8, 24 or 32 bits"),
        (
            _bmp(32, compression=3, masks=struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00)),
            "a BMP other than of plain 8, 24 or 32 bits",
        ),
        (b"\xff\xd8\xff" + bytes(100), "damaged header"),
        (b"BM" + bytes(100), "damaged header"),
        (b"RIFF\1\0\0\0WEBPVP9X" + bytes(100), "damaged header"),
        (bytes(100), "not a JPEG, PNG, BMP, WebP or GIF image"),
        (_bytes(Image.fromarray(PIXELS), "TIFF"), "not a JPEG, PNG, BMP, WebP or GIF image"),
        (_bytes(Image.fromarray(PIXELS), "JPEG2000"), "not a JPEG, PNG, BMP, WebP or GIF image"),
        (b"", "empty file"),
    ],
)
def test_what_tensorflow_cannot_decode_is_refused_with_advice(tmp_path, content, reason):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert reason in check_image_file(path)


@pytest.mark.parametrize("bits, compression", [(8, 0), (24, 0), (32, 0), (32, 3)])
def test_plain_bitmaps_pass(tmp_path, bits, compression):
    masks = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF) if compression else b""
    path = tmp_path / "image.bmp"
    path.write_bytes(_bmp(bits, compression=compression, masks=masks))
    assert check_image_file(path) is None


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
    assert "pixels" in check_image_file(path)


@pytest.mark.parametrize(
    "mode, lossless, kind",
    [("RGB", False, b"VP8 "), ("RGBA", True, b"VP8L"), ("RGBA", False, b"VP8X")],
)
def test_webp_bombs_are_refused_by_their_header(tmp_path, monkeypatch, mode, lossless, kind):
    """Their sizes we read ourselves, since Pillow would read the whole file."""
    path = tmp_path / "bomb.webp"
    colour = (1, 2, 3, 4)[: len(mode)]
    Image.new(mode, (300, 517), colour).save(path, lossless=lossless)
    assert path.read_bytes()[12:16] == kind
    assert check_image_file(path) is None
    monkeypatch.setattr(images_module, "MOST_PIXELS", 300 * 517 - 1)
    assert check_image_file(path) == "300x517 is more than 155099 pixels"


def test_missing_files_are_named(tmp_path):
    assert check_image_file(tmp_path / "missing.png") == "not a regular file"


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


@pytest.mark.parametrize("eval_crop", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("size", [(40, 70), (70, 40), (9, 11), (32, 24)])
@pytest.mark.parametrize("shape", [(16, 16), (8, 20), (24, 18)])
def test_the_evaluation_crop_is_pillows(size, shape, eval_crop):
    """Scaled to cover, cut from the centre. Largest difference seen: 1 level (Pillow rounds)."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    scale = max(s / eval_crop / o for s, o in zip(shape, size, strict=True))
    height, width = (round(side * scale) for side in size)
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    expected = scaled.crop((left, top, left + shape[1], top + shape[0]))
    result = resize_images(np.asarray(image), shape, eval_crop)
    assert result.shape == (*shape, 3)
    assert np.abs(result - np.asarray(expected, np.float32)).max() <= 1.01
    any_size = tf.TensorSpec((None, None, None, 3), tf.uint8)
    resize = tf.function(lambda x: resize_images(x, shape, eval_crop), input_signature=[any_size])
    np.testing.assert_allclose(resize(np.asarray(image)[None])[0], result, atol=1e-3)
    assert resize.get_concrete_function().output_shapes.as_list() == [None, *shape, 3]


def test_the_papers_evaluation_crop_keeps_the_aspect_ratio_and_the_centre():
    """`resize_small(256)|central_crop(224)` of a slope: its steps are equal in both directions."""
    rows, columns = np.meshgrid(np.arange(512.0), np.arange(1024.0), indexing="ij")
    slope = np.stack([rows, columns], -1) / 4
    result = resize_images(slope, (224, 224), 0.875).numpy()
    np.testing.assert_allclose(np.diff(result[..., 0], axis=0), 0.5, atol=1e-3)
    np.testing.assert_allclose(np.diff(result[..., 1], axis=1), 0.5, atol=1e-3)
    centre = result[111:113, 111:113].mean(axis=(0, 1))
    np.testing.assert_allclose(centre, [511 / 8, 1023 / 8], atol=1e-3)


def test_model_range():
    np.testing.assert_allclose(to_model_range(np.array([0, 127.5, 255])), [-1, 0, 1])


def test_undecodable_files_are_found_among_good_ones(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    content = _bytes(Image.fromarray(PIXELS), "PNG")
    good.write_bytes(content)
    bad.write_bytes(content[:60])
    ((path, reason),) = find_undecodable([bytes(good), bytes(bad)])
    assert path == bytes(bad)
    assert reason.startswith("Invalid PNG")


def test_tensorflows_internals_stay_out_of_what_is_said():
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        decode_image(b"", 3)
    assert decoding_problem(caught.value) == "Input is empty."


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


def test_damage_in_the_middle_of_a_png_is_found_by_decoding(tmp_path):
    path = tmp_path / "image.png"
    content = bytearray(_bytes(Image.fromarray(PIXELS), "PNG"))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert check_image_file(path) is None
    ((found, _),) = find_undecodable([bytes(path)])
    assert found == bytes(path)


def test_a_png_with_a_damaged_header_does_not_pass(tmp_path):
    path = tmp_path / "image.png"
    content = bytearray(_bytes(Image.fromarray(PIXELS), "PNG"))
    content[18] ^= 1  # in the width, whose checksum follows
    path.write_bytes(content)
    assert "damaged" in check_image_file(path)


@pytest.mark.parametrize("length", [10, 100_000])
def test_something_may_be_appended_to_a_png(tmp_path, length):
    path = tmp_path / "image.png"
    content = _bytes(Image.fromarray(PIXELS), "PNG")
    path.write_bytes(content + bytes(length))
    assert check_image_file(path) is None
    path.write_bytes(content[:-12] + bytes(length))
    assert check_image_file(path) == "truncated"


def test_hostile_bytes_never_raise(tmp_path):
    """250 mutations of each kind: a reason or None, never an exception."""
    generator = np.random.default_rng(0)
    path = tmp_path / "image"
    for kind in KINDS:
        content = _bytes(Image.fromarray(PIXELS), kind)
        for _ in range(250):
            mutated = bytearray(content)
            for place in generator.integers(0, len(content), generator.integers(1, 8)):
                mutated[place] = generator.integers(0, 256)
            path.write_bytes(mutated)
            reason = check_image_file(path)
            assert reason is None or isinstance(reason, str)
