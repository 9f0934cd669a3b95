"""From the bytes of an image file to its pixels, in TensorFlow ops alone.

So training, evaluation, prediction and the exported model see the same pixels, upright ones: the
orientation that a camera wrote into the EXIF part of a JPEG is read in the graph, too. The
reference is Pillow: `ImageOps.exif_transpose`, then `convert("RGB")` or `convert("L")`.
"""

import functools
import re

import tensorflow as tf

# Of ITU-R 601, in 65536ths, and rounded to nearest: what Pillow's convert("L") computes.
_LUMA = (19595, 38470, 7471)

# How each EXIF orientation, from 1 on, is set upright: (transposed?, then reversed along), as in
# the table of CIPA DC-008 (EXIF 3.0), 4.6.5.1.6. Axis 0 goes down the image, axis 1 to the right.
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


def decode_image(content, channels):
    """Decodes a JPEG, PNG, BMP or WebP, or the first frame of a GIF; the bytes tell which it is.

    - Transparency is dropped: the color below it shows, but in a GIF, where it becomes black.
    - Palettes are looked up.
    - Of 16-bit values the high byte stays.
    - Color becomes gray as the luma of ITU-R 601, gray becomes color by repetition.
    - CMYK and YCCK become RGB; they are taken as inverted where an Adobe marker says who wrote
      them, as libjpeg advises (Pillow takes all as inverted).
    - JPEGs are set upright by their EXIF orientation. Damaged EXIF data count as none, and EXIF
      data in other formats are ignored, as are gamma and color profiles everywhere.

    All formats but JPEG agree with Pillow to the bit; so does JPEG where both use the same
    libjpeg, else up to rounding. Files that `image_checks.check_image_file` refuses fail here with
    an error or, in rare kinds of BMP and GIF, are decoded wrongly.

    Args:
        content: scalar string tensor, the bytes of the file.
        channels: int, 1 or 3.

    Returns:
        uint8 tensor `(height, width, channels)`; the rank and `channels` are static.

    Raises:
        tf.errors.InvalidArgumentError: If the bytes are damaged or of another format.
    """
    content = tf.convert_to_tensor(content)
    image = tf.cond(
        _is_plain(content), lambda: _decode_at_once(content), lambda: _decode_with_care(content)
    )
    image = tf.ensure_shape(image, (None, None, 3))
    return image if channels == 3 else _luma(image)


# Starts of PNGs, and of JPEGs whose tables follow at once upon a JFIF segment of the usual size,
# so that they have no EXIF data; 0 stands for any byte.
_PLAIN = (
    b"\x89PNG\r\n\x1a\n" + bytes(14),
    b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(10) + b"\xff\xdb",
)


def _is_plain(content):
    """Whether one op decodes it. Most published data sets hold only such files, and small ones."""
    head = tf.io.decode_raw(tf.strings.substr(content, 0, 22), tf.uint8, fixed_length=22)
    starts = tf.constant([list(start) for start in _PLAIN], tf.uint8)
    return tf.reduce_any(tf.reduce_all((head == starts) | (starts == 0), axis=1))


def _decode_at_once(content):
    # The op reads PNG, too. The accurate inverse DCT is what Pillow, and so most training code,
    # uses; TensorFlow's default is a faster one that is off by up to 5 levels.
    return tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")


def _luma(image):
    weighted = tf.cast(image, tf.int32) * tf.constant(_LUMA)
    total = tf.reduce_sum(weighted, axis=-1, keepdims=True)
    return tf.cast((total + 32768) // 65536, tf.uint8)


def _decode_with_care(content):
    if tf.executing_eagerly():
        return _decode_by_magic(content)  # whose errors say more at once
    return _decode_by_call()(content)


@functools.cache
def _decode_by_call():
    """Returns `_decode_by_magic` as a function that stays a call in the graph.

    Inlined, its 150 ops would cost plain files of 32x32 pixels a third more time, though none of
    them is executed.
    """
    signature = [tf.TensorSpec((), tf.string)]
    options = {"autograph": False, "experimental_attributes": {"_noinline": True}}
    return tf.function(_decode_by_magic, input_signature=signature, **options)


def _decode_by_magic(content):
    head = tf.strings.substr(content, 0, 12)
    is_jpeg = tf.strings.substr(content, 0, 2) == b"\xff\xd8"
    cases = [(is_jpeg, functools.partial(_decode_jpeg, content))]
    for pattern, decode in _DECODERS.items():
        is_it = tf.strings.regex_full_match(head, pattern)
        cases.append((is_it, functools.partial(decode, content)))
    return tf.case(cases, default=functools.partial(_decode_at_once, content))


def _decode_gif(content):
    image = tf.io.decode_image(content, channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def _decode_bmp(content):
    """TensorFlow gives the indices where there is a palette of 256 colours: it lacks this look-up.

    The palette follows the header, whose size is in its first field; an entry is B, G, R, unused.
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
    """The number of channels must be that of the file, which TensorFlow finds if it is given as 0.

    But not for an animation: there, TensorFlow 2.21 allocates 3 channels and writes 4 if none is
    transparent, beyond the end of the memory. Asked for 4 it writes 4, or refuses. Animations are
    told by the VP8X chunk's second flag (RFC 9649, 2.7).
    """
    extended = tf.strings.substr(content, 12, 4) == b"VP8X"
    animated = extended & (_bytes_at(content, 20, 1)[0] // 2 % 2 == 1)

    def decode(channels):
        image = tf.io.decode_image(content, channels=channels, expand_animations=False)
        return tf.ensure_shape(image, (None, None, None))[..., :3]

    return tf.cond(animated, lambda: decode(4), lambda: decode(0))


_DECODERS = {  # by the first 12 bytes; \C is any byte
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

    EXIF data come at the start, at most after other application segments (JFIF, XMP, profiles);
    the search ends where the tables of the JPEG begin. A segment is FF, marker, length (2 bytes,
    itself included), data.
    """

    def goes_on(offset, segment):
        marker = segment[1]
        skippable = (marker // 16 == 0xE) | (marker == 0xFE)
        return (segment[0] == 0xFF) & skippable & ~_is_exif(segment)

    def skip(offset, segment):
        offset += 2 + _number(segment[2:4], little_endian=False)
        return offset, _bytes_at(content, offset, 10)

    first = tf.constant(2, tf.int64)
    return tf.while_loop(goes_on, skip, (first, _bytes_at(content, first, 10)))


def _is_exif(segment):
    start = tf.constant(list(b"\xff\xe1Exif\0\0"), tf.uint8)
    return tf.reduce_all(tf.concat([segment[:2], segment[4:]], axis=0) == start)


def _orientation(tiff):
    """Reads the orientation, 1 to 8, out of EXIF data; 1 where it is missing or makes no sense.

    They are a TIFF file: byte order, 42, where the first directory is; there, a count and entries
    of 12 bytes: tag (2), type (2), count (4), value (4, from the left).
    """
    little_endian = tf.strings.substr(tiff, 0, 4) == b"II*\0"
    big_endian = tf.strings.substr(tiff, 0, 4) == b"MM\0*"
    number = functools.partial(_number, little_endian=little_endian)

    directory = number(_bytes_at(tiff, 4, 4))
    count = number(_bytes_at(tiff, directory, 2))
    entries = _bytes_at(tiff, directory + 2, 12 * tf.maximum(count, 1))
    entries = tf.reshape(entries, (-1, 12))[:count]
    found = (number(entries[:, :2]) == _ORIENTATION_TAG) & (number(entries[:, 2:4]) == _SHORT)
    values = tf.boolean_mask(number(entries[:, 8:10]), found)
    orientation = tf.concat([[1], values], axis=0)[-1]
    sensible = (little_endian | big_endian) & (orientation >= 1) & (orientation <= 8)
    return tf.where(sensible, orientation, 1)


def _upright(image, orientation):
    def turn(transposed, axes):
        turned = tf.transpose(image, (1, 0, 2)) if transposed else image
        return tf.reverse(turned, axes) if axes else turned

    branches = [functools.partial(turn, *row) for row in _UPRIGHT]
    return tf.switch_case(tf.cast(orientation - 1, tf.int32), branches)


def _bytes_at(content, offset, count):
    """Returns `count` bytes as uint8 `(count,)`; those beyond the end of the content are 0."""
    length = tf.cast(tf.strings.length(content), tf.int64)
    start = tf.minimum(tf.cast(offset, tf.int64), length)
    piece = tf.strings.substr(content, start, tf.cast(count, tf.int64))
    return tf.io.decode_raw(piece, tf.uint8, fixed_length=tf.cast(count, tf.int32))


def _number(data, little_endian):
    """Reads unsigned numbers, int64 `(...)`, out of bytes `(..., width)`."""
    weights = [256**place for place in range(data.shape[-1])]
    weights = tf.where(little_endian, tf.constant(weights, tf.int64), weights[::-1])
    return tf.reduce_sum(tf.cast(data, tf.int64) * weights, axis=-1)


# === Images that cannot be decoded ===


def find_undecodable(contents, channels=3):
    """Decodes images in full and returns those that fail, as (name, reason).

    For use after TensorFlow met an image it could not decode, because its error names no file.

    Args:
        contents: Pairs of a name and the bytes of a file, as a tensor or a function that reads it.
        channels: int, 1 or 3.
    """
    problems = []
    for name, content in contents:
        try:
            decode_image(content() if callable(content) else content, channels)
        except (tf.errors.OpError, ValueError) as error:
            problems.append((name, decoding_problem(error)))
    return problems


def decoding_problem(error):
    """Returns what TensorFlow says of an image that it could not decode, without its internals.

    Args:
        error: The exception that `decode_image` raised, called eagerly.

    Returns:
        string, a line of at most 120 characters.
    """
    said = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error).splitlines()[0])
    return said.strip()[:120]
