"""Tests `keras_mixer/preprocessing/decode.py` against Pillow, the reference decoder."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import SMALL, randomize
from PIL import Image, ImageOps

from keras_mixer.data.image_checks import check_image_file
from keras_mixer.data.image_listing import list_images
from keras_mixer.data.splits import FileImages
from keras_mixer.inference import predict
from keras_mixer.inference.export.formats import export
from keras_mixer.inference.predict import classify
from keras_mixer.model.architecture import ModelSpec, Preprocessing
from keras_mixer.model.mixer import build_mixer
from keras_mixer.preprocessing import decode as decode_module
from keras_mixer.preprocessing.decode import decode_image, decoding_problem
from keras_mixer.preprocessing.input_pipeline import evaluation_batches, training_batches
from keras_mixer.preprocessing.resize import preprocess
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import model_weights

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (9, 11, 3), np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(23) * 11, np.arange(17) * 15), -1)[..., [0, 1, 0]]
PHOTO = Image.fromarray(SMOOTH.astype(np.uint8))
NOISE = Image.fromarray(PIXELS)
VEILED = NOISE.convert("RGBA")
VEILED.putalpha(Image.fromarray(PIXELS[..., 0]))

in_graph = {
    channels: tf.function(lambda content, channels=channels: decode_image(content, channels))
    for channels in (1, 3)
}


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(content, channels):
    image = Image.open(io.BytesIO(content))
    image = ImageOps.exif_transpose(image) if image.format in ("JPEG", "MPO") else image
    if image.format == "GIF":  # of which TensorFlow leaves black what is transparent
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("RGBA" if image.mode in ("P", "LA") else "RGB").convert("RGB")
    return np.asarray(image.convert("L"))[..., None] if channels == 1 else np.asarray(image)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows, depth, color, extra=b"", pixels_per_byte=1):
    """A PNG of any depth and color type, out of its rows of bytes, each `(width, values)`."""
    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width * pixels_per_byte, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def bmp(bits, pixels, *, palette=b"", height=9, compression=0):
    offset = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, 11, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return (
        b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + palette + pixels
    )


def random_bytes(count):
    return RANDOM.integers(0, 256, count, np.uint8).tobytes()


FRAMES = [Image.fromarray(np.roll(PIXELS, k, 0)) for k in range(3)]
MANY = {"save_all": True, "append_images": FRAMES[1:]}
COLORED = NOISE.convert("P")
ADOBE_CMYK = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95, subsampling=0)
_TRANSFORM = ADOBE_CMYK.index(b"Adobe") + 11  # 0: CMYK, 2: YCCK

FILES = {
    **{f"png {m}": encoded(NOISE.convert(m), "PNG") for m in ("1", "L", "LA", "P", "RGB", "RGBA")},
    **{f"png palette of {b} bits": encoded(NOISE.quantize(2**b), "PNG", bits=b) for b in (1, 2, 4)},
    "png half transparent": encoded(VEILED, "PNG"),
    "png palette with tRNS": encoded(COLORED, "PNG", transparency=bytes(range(0, 256))),
    "png one color transparent": encoded(NOISE, "PNG", transparency=tuple(map(int, PIXELS[0, 0]))),
    "png gray of 2 bits": png(PIXELS[..., :1], 2, 0, pixels_per_byte=4),
    "png with gamma": png(PIXELS, 8, 2, chunk(b"gAMA", struct.pack(">I", 10000))),
    "png with something appended": encoded(NOISE, "PNG") + bytes(1000),
    **{f"bmp {mode}": encoded(NOISE.convert(mode), "BMP") for mode in ("L", "P", "RGB", "RGBA")},
    "bmp palette downwards": bmp(8, random_bytes(108), palette=random_bytes(1024), height=-9),
    "bmp of 24 bits downwards": bmp(24, random_bytes(36 * 9), height=-9),
    "gif gray": encoded(NOISE.convert("L"), "GIF"),
    "gif palette": encoded(COLORED, "GIF"),
    "gif transparent": encoded(COLORED, "GIF", transparency=int(np.asarray(COLORED)[0, 0])),
    "gif interlaced": encoded(COLORED, "GIF", interlace=1),
    "gif animated": encoded(FRAMES[0], "GIF", **MANY),
    "webp lossless": encoded(NOISE, "WEBP", lossless=True),
    "webp lossless, half transparent": encoded(VEILED, "WEBP", lossless=True, exact=True),
    "webp lossy": encoded(PHOTO, "WEBP"),
    "webp lossy, half transparent": encoded(VEILED, "WEBP"),
    "webp with a profile": encoded(NOISE, "WEBP", lossless=True, icc_profile=b"profile"),
    "jpeg gray": encoded(PHOTO.convert("L"), "JPEG"),
    "jpeg color": encoded(PHOTO, "JPEG"),
    "jpeg progressive": encoded(PHOTO, "JPEG", progressive=True, quality=95),
    "jpeg rgb": encoded(PHOTO, "JPEG", keep_rgb=True),
    "jpeg with comment": encoded(PHOTO, "JPEG", comment=b"Exif\0\0" * 9),
    "jpeg with several pictures": encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
    "jpeg cmyk": ADOBE_CMYK,
    "jpeg ycck": ADOBE_CMYK[:_TRANSFORM] + b"\2" + ADOBE_CMYK[_TRANSFORM + 1 :],
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_decodes_as_pillow_does(name, channels, tmp_path):
    """Exactly, but JPEGs may differ by 2 levels, where Pillow brings another libjpeg."""
    content, tolerance = FILES[name], 2 if name.startswith("jpeg") else 0
    expected = by_pillow(content, channels).astype(int)
    assert expected.std() > 9
    path = tmp_path / "image.jpg"  # the content counts, not the name
    path.write_bytes(content)
    assert check_image_file(path) is None
    for decode in (in_graph[channels], lambda content: decode_image(content, channels)):
        decoded = decode(tf.constant(content)).numpy()
        assert decoded.dtype == np.uint8
        assert decoded.shape == expected.shape
        assert np.abs(decoded - expected).max() <= tolerance


@pytest.mark.parametrize("color, values", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_the_high_byte_of_sixteen_bits_stays(color, values):
    """Gray, RGB, gray and RGB with transparency, which is dropped."""
    wide = RANDOM.integers(0, 65536, (5, 7, values), np.uint16)
    expected = (wide >> 8)[..., : 1 if values < 3 else 3].astype(np.uint8)
    content = png(wide.astype(">u2"), 16, color)
    np.testing.assert_array_equal(decode_image(content, 3), np.broadcast_to(expected, (5, 7, 3)))
    if values < 3:
        np.testing.assert_array_equal(decode_image(content, 1), expected)


def test_cmyk_without_an_adobe_marker_is_taken_as_it_is():
    """Pillow alone takes it as inverted; libjpeg leaves it to the marker."""
    start = ADOBE_CMYK.index(b"Adobe") - 4
    content = ADOBE_CMYK[:start] + ADOBE_CMYK[start + 16 :]
    inverted = np.asarray(Image.open(io.BytesIO(content)).convert("CMYK"))
    c, m, y, k = np.moveaxis(inverted.astype(int), -1, 0)
    expected = np.stack([c * k, m * k, y * k], -1) / 255
    assert np.abs(decode_image(content, 3) - expected).max() <= 2


# === EXIF orientation ===

BARE = encoded(PHOTO, "JPEG", quality=95)
ENDIANS = {"<": b"II*\0", ">": b"MM\0*"}


def exif(orientation, endian="<", *, before=0, kind=3, at=8, count=None):
    """EXIF data with the orientation behind so many other entries."""
    entries = [struct.pack(endian + "HHII", 0x9000 + i, 4, 1, 7) for i in range(before)]
    entries += [struct.pack(endian + "HHIHH", 0x0112, kind, 1, orientation, 0)]
    head = ENDIANS[endian] + struct.pack(endian + "I", at) + bytes(at - 8)
    count = len(entries) if count is None else count
    return head + struct.pack(endian + "H", count) + b"".join(entries) + bytes(4)


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_exif(tiff, *, jfif=True, between=b""):
    assert BARE[2:4] == b"\xff\xe0"
    head, rest = (BARE[:20], BARE[20:]) if jfif else (BARE[:2], BARE[20:])
    return head + between + segment(0xE1, b"Exif\0\0" + tiff) + rest


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("jfif", [False, True])
@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_set_upright_as_pillow_does(orientation, endian, jfif, channels):
    content = with_exif(exif(orientation, endian, before=3), jfif=jfif)
    expected = by_pillow(content, channels).astype(int)
    assert expected.shape[:2] == ((17, 23) if orientation < 5 else (23, 17))
    decoded = in_graph[channels](tf.constant(content))
    assert np.abs(decoded - expected).max() <= 2


@pytest.mark.parametrize(
    "content",
    [
        with_exif(exif(6, at=200)),
        with_exif(exif(6, before=200)),
        with_exif(exif(6), between=segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")),
        with_exif(exif(6), between=segment(0xE2, bytes(65000)) + segment(0xE2, bytes(65000))),
        with_exif(exif(6), between=segment(0xFE, b"Exif\0\0 in a comment")),
        with_exif(exif(6), jfif=False, between=segment(0xEE, bytes(12))),
        encoded(PHOTO, "JPEG", exif=b"Exif\0\0" + exif(6)),
        with_exif(exif(6) + bytes(60000)),
    ],
)
def test_the_orientation_is_found_wherever_it_may_be(content):
    expected = by_pillow(content, 3).astype(int)
    assert expected.shape == (23, 17, 3)
    assert np.abs(in_graph[3](tf.constant(content)) - expected).max() <= 2


@pytest.mark.parametrize(
    "tiff",
    [
        b"", b"II*\0", b"XX*\0" + exif(6)[4:], exif(6)[:14], exif(0), exif(9), exif(65535),
        exif(6, at=9)[:9], exif(6, count=0), exif(6, kind=2), exif(6)[:4] + b"\xff" * 8,
        b"MM\0*" + exif(6)[4:], exif(6, count=65535)[:12],
    ],
)  # fmt: skip
def test_damaged_exif_data_count_as_none(tiff):
    content = with_exif(tiff)
    np.testing.assert_array_equal(in_graph[3](tf.constant(content)), decode_image(BARE, 3))


def test_hostile_exif_data_never_raise():
    """300 mutations: the picture comes out in one of its two shapes."""
    content = with_exif(exif(6, before=2))
    start, seen = content.index(b"Exif") - 4, set()
    for _ in range(300):
        mutated = bytearray(content)
        for place in RANDOM.integers(start + 10, start + 60, RANDOM.integers(1, 6)):
            mutated[place] = RANDOM.integers(0, 256)
        seen.add(tuple(in_graph[3](tf.constant(bytes(mutated))).shape))
    assert seen == {(17, 23, 3), (23, 17, 3)}


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_data_of_other_formats_are_ignored(kind, options):
    content = encoded(PHOTO, kind, exif=b"Exif\0\0" + exif(6), **options)
    assert b"II*\0" in content
    np.testing.assert_array_equal(decode_image(content, 3), np.asarray(PHOTO))


# === Wherever it is used ===


def test_damaged_files_raise_and_static_shapes_are_known():
    whole = ("png with something appended", "gif animated", "jpeg with several pictures")
    halves = [c[: len(c) // 2] for name, c in FILES.items() if name not in whole]
    starts = [b"", b"x", b"BM", b"RIFF1234WEBPVP8X", b"GIF8", b"\xff\xd8", b"\xff\xd8\xff\xe1"]
    for decode in (in_graph[3], lambda content: decode_image(content, 3)):
        for content in halves + starts:
            with pytest.raises(tf.errors.InvalidArgumentError):
                decode(tf.constant(content))
    for channels in (1, 3):
        graph = in_graph[channels].get_concrete_function(tf.TensorSpec((), tf.string))
        assert graph.output_shapes.as_list() == [None, None, channels]


def test_an_animated_webp_never_reaches_the_op_that_overflows():
    """Asked for as many channels as there are, it would write beyond the end of the memory."""
    content = encoded(FRAMES[0], "WEBP", lossless=True, **MANY)
    assert content[12:16] == b"VP8X"
    with pytest.raises(tf.errors.InvalidArgumentError):
        in_graph[3](tf.constant(content))


def test_reasons_come_without_tensorflows_internals():
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        decode_image(b"", 3)
    assert decoding_problem(caught.value) == "Input is empty."


SAME = ["jpeg color", "jpeg cmyk", "png P", "png half transparent", "bmp P", "gif palette",
        "gif animated", "webp lossless", "webp lossless, half transparent"]  # fmt: skip


@pytest.mark.parametrize("channels, eval_crop", [(1, 0.0), (3, 0.75)])
def test_training_evaluation_prediction_and_export_see_the_same(
    tmp_path, monkeypatch, channels, eval_crop
):
    contents = [FILES[name] for name in SAME] + [with_exif(exif(o)) for o in (1, 3, 6, 8)]
    for index, content in enumerate(contents):
        (tmp_path / f"{index:02}.jpg").write_bytes(content)
    images = FileImages(list_images(tmp_path)[0], np.zeros(len(contents), int), channels)
    architecture = SMALL.replace(depth=1, channels=channels)
    spec = ModelSpec(architecture, preprocessing=Preprocessing(eval_crop))
    ((evaluated, _),) = evaluation_batches(images, spec)
    for image, content in zip(evaluated, contents, strict=True):
        expected = preprocess(by_pillow(content, channels), spec)
        assert np.abs(image - expected).max() <= 2 / 127.5

    trained, _ = next(iter(training_batches(images, spec, batch_size=len(images), seed=0)))
    one, other = (sorted(x.tobytes() for x in batch.numpy()) for batch in (trained, evaluated))
    assert one == other

    model, predicted = randomize(build_mixer(**vars(architecture))), []
    expected = model(evaluated).numpy()
    model.spec = spec
    model.predict_on_batch = lambda batch: predicted.append(batch) or expected
    monkeypatch.setattr(predict, "fast_inference", lambda model, batch_size: model)
    list(classify(model, images.paths))
    np.testing.assert_array_equal(predicted, [evaluated])

    model_folder.write(tmp_path / "model", spec, model_weights(model))
    exported = export(tmp_path / "model", export_dir=tmp_path, name="exported")
    serve = tf.saved_model.load(str(exported)).signatures
    by_bytes = serve["serve_bytes"](image_bytes=tf.constant(contents))
    by_pixels = serve["serving_default"](images=decode_image(contents[0], channels)[None])
    np.testing.assert_allclose(by_bytes["logits"], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(by_pixels["logits"], expected[:1], rtol=0, atol=1e-4)


# === Files that would take much memory or time ===


@pytest.mark.parametrize("segments", [290, 20_000])
def test_thousands_of_segments_are_not_walked(segments):
    """Each takes a millisecond; no camera writes so many before the orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(PHOTO, "JPEG", exif=exif)
    image = decode_image(content[:2] + b"\xff\xe1\x00\x02" * segments + content[2:], 3)
    upright = (PHOTO.width, PHOTO.height, 3)
    assert image.shape == (upright if segments < 300 else (PHOTO.height, PHOTO.width, 3))


KINDS = {"JPEG": {}, "PNG": {}, "GIF": {}, "BMP": {}, "WEBP": {}, "lossless": {"lossless": True},
         "extended": {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_counted_by_the_header(monkeypatch, kind):
    options = KINDS[kind]
    content = encoded(Image.new("RGB", (13, 7)), "WEBP" if options else kind, **options)
    monkeypatch.setattr(decode_module, "MOST_PIXELS", 91)
    assert decode_module.refuse_large(content) == content
    monkeypatch.setattr(decode_module, "MOST_PIXELS", 90)
    with pytest.raises(tf.errors.InvalidArgumentError, match="an image of more than 90 pixels"):
        decode_module.refuse_large(content)
