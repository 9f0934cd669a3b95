"""Decodes image files with TensorFlow ops, for training, prediction and the exported model alike.

The reference is Pillow: `ImageOps.exif_transpose` for the EXIF orientation that cameras write into
JPEGs, then `convert("RGB")` or `convert("L")`.
"""

import functools

import tensorflow as tf

from keras_mixer.data.image_checks import MOST_PIXELS
from keras_mixer.errors import without_internals

# Weights of ITU-R 601 in 65536ths, as in Pillow's convert("L"), which rounds to nearest, too.
_LUMA = (19595, 38470, 7471)

# How to make the EXIF orientations 1 to 8 upright: whether to transpose, then the axes to reverse
# (0: rows, 1: columns); the table of CIPA DC-008 (EXIF 3.0), 4.6.5.1.6.
_UPRIGHT = (
    (False, []),
    (False, [1]),
    (False, [0, 1]),
    (False, [0]),
    (True, []),
    (True, [1]),
    (True, [0, 1]),
    (True, [0]),
)
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_MOST_SEGMENTS = 300  # before EXIF data, which should be the first; a color profile has up to 255


def decode_image(content, channels):
    """Decodes a JPEG, PNG, BMP or WebP, or the first frame of a GIF, by its content.

    - Transparency is dropped: the color below it shows, or black in a GIF.
    - Palettes are looked up; 16-bit values keep their high byte.
    - Color becomes gray as the luma of ITU-R 601, gray becomes color by repetition.
    - CMYK and YCCK become RGB; they count as inverted if there is an Adobe marker, as libjpeg
      advises (for Pillow, all are inverted).
    - JPEGs are rotated and flipped by their EXIF orientation. Damaged EXIF data are ignored, as
      are EXIF data in other formats, and gamma and color profiles in all.

    The pixels are those of Pillow, except for rounding in JPEGs where Pillow uses another libjpeg.
    Files that `image_checks.check_image_file` rejects raise errors here or, in rare kinds of BMP
    and GIF, are decoded wrongly.

    Args:
        content: scalar string tensor, the bytes of the file.
        channels: int, 1 or 3.

    Returns:
        uint8 tensor `(height, width, channels)`; the rank and `channels` are static.

    Raises:
        tf.errors.InvalidArgumentError: If the bytes are damaged or in another format.
    """
    content = tf.convert_to_tensor(content)
    image = tf.cond(
        _is_plain(content), lambda: _decode_at_once(content), lambda: _decode_with_care(content)
    )
    image = tf.ensure_shape(image, (None, None, 3))
    return image if channels == 3 else _luma(image)


# How PNGs start, and JPEGs without EXIF data, whose tables directly follow a JFIF segment of the
# usual size; 0: any byte.
_PLAIN = (
    b"\x89PNG\r\n\x1a\n" + bytes(14),
    b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(10) + b"\xff\xdb",
)


def _is_plain(content):
    """Returns whether one op can decode the file, as in most published datasets."""
    head = tf.io.decode_raw(tf.strings.substr(content, 0, 22), tf.uint8, fixed_length=22)
    starts = tf.constant([list(start) for start in _PLAIN], tf.uint8)
    return tf.reduce_any(tf.reduce_all((head == starts) | (starts == 0), axis=1))


def _decode_at_once(content):
    # The op reads PNG, too. The accurate inverse DCT is that of Pillow, and so of most training
    # code; TensorFlow's default is faster but off by up to 5 levels.
    return tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")


def _luma(image):
    weighted = tf.cast(image, tf.int32) * tf.constant(_LUMA)
    total = tf.reduce_sum(weighted, axis=-1, keepdims=True)
    return tf.cast((total + 32768) // 65536, tf.uint8)


def _decode_with_care(content):
    if tf.executing_eagerly():
        return _decode_by_magic(content)  # with clearer errors
    return _decode_by_call()(content)


@functools.cache
def _decode_by_call():
    """Returns `_decode_by_magic` as a function that is not inlined in the graph.

    Its 150 ops, though not executed, would make plain files of 32x32 pixels a third slower.
    """
    signature = [tf.TensorSpec((), tf.string)]
    options = {"autograph": False, "experimental_attributes": {"_noinline": True}}
    return tf.function(_decode_by_magic, input_signature=signature, **options)


def _decode_by_magic(content):
    head = tf.strings.substr(content, 0, 12)
    is_jpeg = tf.strings.substr(content, 0, 2) == b"\xff\xd8"
    cases = [(is_jpeg, functools.partial(_decode_jpeg, content))]
    for pattern, decode in _DECODERS.items():
        is_format = tf.strings.regex_full_match(head, pattern)
        cases.append((is_format, functools.partial(decode, content)))
    return tf.case(cases, default=functools.partial(_decode_at_once, content))


def _decode_gif(content):
    image = tf.io.decode_image(content, channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def _decode_bmp(content):
    """Looks up the palette of 256 colors, if there is one, which TensorFlow does not.

    It follows the header, whose size is in its first field; an entry is B, G, R, unused.
    """
    pixels = tf.io.decode_bmp(content)
    header_size = _number(_bytes_at(content, 14, 4), little_endian=True)
    palette = tf.reshape(_bytes_at(content, 14 + header_size, 1024), (256, 4))
    return tf.cond(
        tf.shape(pixels)[-1] == 1,
        lambda: tf.gather(tf.gather(palette, [2, 1, 0], axis=1), tf.cast(pixels[..., 0], tf.int32)),
        lambda: pixels[..., :3],
    )


def _decode_webp(content):
    """Decodes with the channels of the file (0: TensorFlow finds them), but animations with 4.

    With 0, TensorFlow 2.21 allocates 3 channels for an opaque animation and writes 4, beyond the
    end of the memory. The VP8X chunk's second flag marks animations (RFC 9649, 2.7).
    """
    extended = tf.strings.substr(content, 12, 4) == b"VP8X"
    animated = extended & (_bytes_at(content, 20, 1)[0] // 2 % 2 == 1)

    def decode(channels):
        image = tf.io.decode_image(content, channels=channels, expand_animations=False)
        return tf.ensure_shape(image, (None, None, None))[..., :3]

    return tf.cond(animated, lambda: decode(4), lambda: decode(0))


_DECODERS = {  # by the first 12 bytes; \C: any byte
    r"BM\C*": _decode_bmp,
    r"GIF8\C*": _decode_gif,
    r"RIFF\C{4}WEBP": _decode_webp,
}


# === JPEG and its EXIF orientation ===


def _decode_jpeg(content):
    image = _decode_at_once(content)
    offset, segment = _last_application_segment(content)
    return tf.cond(
        _is_exif(segment),
        lambda: _upright(image, _orientation(tf.strings.substr(content, offset + 10, 65535))),
        lambda: image,
    )


def _last_application_segment(content):
    """Finds the EXIF segment, or else the first one that is no application data or comment.

    Only other application segments (JFIF, XMP, profiles) precede EXIF data. A segment is FF,
    marker, length (2 bytes, itself included), data.
    """

    def is_other(offset, segment):
        marker = segment[1]
        skippable = (marker // 16 == 0xE) | (marker == 0xFE)
        return (segment[0] == 0xFF) & skippable & ~_is_exif(segment)

    def skip(offset, segment):
        offset += 2 + _number(segment[2:4], little_endian=False)
        return offset, _bytes_at(content, offset, 10)

    first = tf.constant(2, tf.int64)
    state = first, _bytes_at(content, first, 10)
    return tf.while_loop(is_other, skip, state, maximum_iterations=_MOST_SEGMENTS)


def _is_exif(segment):
    start = tf.constant(list(b"\xff\xe1Exif\0\0"), tf.uint8)
    return tf.reduce_all(tf.concat([segment[:2], segment[4:]], axis=0) == start)


def _orientation(tiff):
    """Reads the orientation, 1 to 8, from EXIF data; 1 if it is missing or invalid.

    They are a TIFF file: byte order, 42, offset of the first directory; there, a count and entries
    of 12 bytes: tag (2), type (2), count (4), value (4, from the left).
    """
    little_endian = tf.strings.substr(tiff, 0, 4) == b"II*\0"
    big_endian = tf.strings.substr(tiff, 0, 4) == b"MM\0*"
    number = functools.partial(_number, little_endian=little_endian)

    directory = number(_bytes_at(tiff, 4, 4))
    count = number(_bytes_at(tiff, directory, 2))
    entries = _bytes_at(tiff, directory + 2, 12 * tf.maximum(count, 1))
    entries = tf.reshape(entries, (-1, 12))[:count]
    matches = (number(entries[:, :2]) == _ORIENTATION_TAG) & (number(entries[:, 2:4]) == _SHORT)
    values = tf.boolean_mask(number(entries[:, 8:10]), matches)
    orientation = tf.concat([[1], values], axis=0)[-1]
    valid = (little_endian | big_endian) & (orientation >= 1) & (orientation <= 8)
    return tf.where(valid, orientation, 1)


def _upright(image, orientation):
    def turn(transpose, axes):
        turned = tf.transpose(image, (1, 0, 2)) if transpose else image
        return tf.reverse(turned, axes) if axes else turned

    branches = [functools.partial(turn, *how) for how in _UPRIGHT]
    return tf.switch_case(tf.cast(orientation - 1, tf.int32), branches)


def _bytes_at(content, offset, count):
    """Returns `count` bytes as uint8 `(count,)`, padded with 0 beyond the end of the content."""
    length = tf.cast(tf.strings.length(content), tf.int64)
    start = tf.minimum(tf.cast(offset, tf.int64), length)
    piece = tf.strings.substr(content, start, tf.cast(count, tf.int64))
    return tf.io.decode_raw(piece, tf.uint8, fixed_length=tf.cast(count, tf.int32))


def _number(data, little_endian):
    """Converts bytes `(..., width)` to unsigned numbers, int64 `(...)`."""
    weights = [256**exponent for exponent in range(data.shape[-1])]
    weights = tf.where(little_endian, tf.constant(weights, tf.int64), weights[::-1])
    return tf.reduce_sum(tf.cast(data, tf.int64) * weights, axis=-1)


# === Images that must not or cannot be decoded ===


def refuse_large(content):
    """Returns the bytes of an image file, if its header has at most `MOST_PIXELS` pixels.

    A few kilobytes of PNG can be gigabytes of pixels. Files of a data set are checked before a run
    (`image_checks.check_image_file`), records and the requests of an exported model by this.

    Args:
        content: scalar string tensor.

    Raises:
        tf.errors.InvalidArgumentError: If there are more.
    """
    pixels = _pixels_by_header(content)
    message = f"an image of more than {MOST_PIXELS} pixels"
    small = tf.debugging.Assert(pixels <= MOST_PIXELS, [message, pixels])
    with tf.control_dependencies([small]):
        return tf.identity(content)


def _pixels_by_header(content):
    """Returns the number of pixels, int64; 0 in formats that cannot be decoded."""
    head = _bytes_at(content, 0, 30)

    def number(start, stop, little_endian=True):
        return _number(head[start:stop], little_endian)

    def jpeg():
        return tf.reduce_prod(tf.cast(tf.io.extract_jpeg_shape(content)[:2], tf.int64))

    def bmp():
        height = number(22, 26)  # negative from the top down
        return number(18, 22) * tf.minimum(height, 2**32 - height)

    def lossless_webp():
        sides = number(21, 25)
        return (1 + sides % 2**14) * (1 + sides // 2**14 % 2**14)

    sizes = {
        r"\CPNG\C*": lambda: number(16, 20, False) * number(20, 24, False),
        r"GIF8\C*": lambda: number(6, 8) * number(8, 10),
        r"BM\C*": bmp,
        r"RIFF\C{4}WEBPVP8 ": lambda: number(26, 28) % 2**14 * (number(28, 30) % 2**14),
        r"RIFF\C{4}WEBPVP8L": lossless_webp,
        r"RIFF\C{4}WEBPVP8X": lambda: (1 + number(24, 27)) * (1 + number(27, 30)),
    }
    start = tf.strings.substr(content, 0, 16)
    cases = [(tf.strings.regex_full_match(start, p), size) for p, size in sizes.items()]
    is_jpeg = tf.strings.substr(content, 0, 2) == b"\xff\xd8"  # RE2 has no bytes above 127
    return tf.case([(is_jpeg, jpeg), *cases], default=lambda: tf.constant(0, tf.int64))


def decoding_problem(error):
    """Returns an eager `decode_image` error in short, without TensorFlow's internals."""
    return without_internals(error)[:120]
