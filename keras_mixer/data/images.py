"""One image: is the file sound, and how is it resized and scaled.

Training, evaluation, prediction and the exported model all use `decode.decode_image` and the two
functions at the end, so an image means the same to each of them. TensorFlow is imported only when
they are called: the checks above them run before it starts.
"""

import os
import re
import struct
import warnings

from keras_mixer.data.decode import decode_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")  # whatever is inside
MOST_PIXELS = 89_478_485  # Pillow's limit against decompression bombs

_TAIL = 64  # bytes in which the end of a file is looked for first


def check_image_file(path):
    """Says what is wrong with an image file, from its header and its end alone.

    The header must announce a JPEG, PNG, BMP, WebP or GIF of bearable size and of a kind that
    `decode_image` decodes, and the file must reach its end. Of what lies between nothing is read,
    but in the rare JPEG or PNG that something is appended to. So damage there shows only when
    the image is decoded.

    Args:
        path: string or bytes. The suffix does not matter.

    Returns:
        None for a sound file, else a reason such as `"truncated"`.
    """
    from PIL import Image

    if not os.path.isfile(path):  # a pipe or a device is never opened: it could hang
        return "not a regular file"
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            return _problem(file, Image)
    except Image.DecompressionBombError:
        return f"more than {MOST_PIXELS} pixels"
    except OSError as error:
        return error.strerror or "damaged header"
    except Exception as error:  # Pillow's parsers raise many kinds on hostile bytes
        return f"damaged header ({error})"


def _problem(file, image_module):
    size = os.fstat(file.fileno()).st_size
    head = file.read(32)
    if not head:
        return "empty file"
    kind = next((kind for kind, magic in _MAGIC.items() if re.match(magic, head, re.DOTALL)), None)
    if kind is None:
        return "not a JPEG, PNG, BMP, WebP or GIF image"
    if kind == "WEBP":  # of which Pillow reads the whole file when it opens it
        return _webp_problem(head, size)
    file.seek(0)
    with image_module.open(file, formats=(kind,)) as image:
        return _size_problem(*image.size) or _PROBLEMS[kind](file, size, image)


def _size_problem(width, height):
    if width * height > MOST_PIXELS:
        return f"{width}x{height} is more than {MOST_PIXELS} pixels"
    return None


_MAGIC = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "WEBP": rb"RIFF....WEBP",
}


def _read_at(file, offset, count):
    file.seek(max(0, offset))
    return file.read(count)


# === JPEG ===

_END_OF_IMAGE = b"\xff\xd9"
_SCAN = 0xDA
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # the others are lossless or hierarchical


def _jpeg_problem(file, size, image):
    segments = dict(_jpeg_segments(file))
    if _SCAN not in segments:
        return "truncated"
    if not segments.keys() & _DECODED_FRAMES:
        return "a lossless or hierarchical JPEG: save it as PNG"
    # The end marker is at the end, or else (cameras append films) anywhere after the header.
    scan = segments[_SCAN]
    if _END_OF_IMAGE in _read_at(file, max(scan, size - _TAIL), _TAIL):
        return None
    return None if _END_OF_IMAGE in _read_at(file, scan, -1) else "truncated"


def _jpeg_segments(file):
    """Yields (marker, offset) of the segments (FF, marker, length in 2 bytes, data) to the scan."""
    offset, marker = 2, None
    while marker != _SCAN and len(head := _read_at(file, offset, 4)) == 4:
        marker, length = struct.unpack(">xBH", head)
        yield marker, offset
        offset += 1 if marker == 0xFF else 2 + length  # FF may be repeated


# === PNG ===

_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"


def _png_problem(file, size, image):
    if _END_OF_PNG in _read_at(file, size - _TAIL, _TAIL):
        return None
    offset = 8  # something is appended: look at the head of every chunk
    while len(chunk := _read_at(file, offset, 8)) == 8:
        length, name = struct.unpack(">I4s", chunk)
        if name == b"IEND":
            return None
        offset += 12 + length
    return "truncated"


# === GIF ===


def _gif_problem(file, size, image):
    if image.tile[0][1] != (0, 0, *image.size):
        return "a GIF whose first frame does not fill it: save that frame as PNG"
    tail = _read_at(file, size - _TAIL, _TAIL)
    return None if tail.rstrip(b"\0").endswith(b";") else "truncated"


# === BMP ===

_CODINGS = {  # (bits per pixel, compression) -> Pillow's names for the order of the channels
    (8, 0): ("P", "L", "1"),
    (24, 0): ("BGR",),
    (32, 0): ("BGRX", "BGRA"),
    (32, 3): ("BGRX", "BGRA"),
}


def _bmp_problem(file, size, image):
    pixels, header_size = struct.unpack("<II", _read_at(file, 10, 8))
    bits, compression = struct.unpack("<HI", _read_at(file, 28, 6))
    if header_size < 40 or image.tile[0][3][0] not in _CODINGS.get((bits, compression), ()):
        return "a BMP other than of plain 8, 24 or 32 bits per pixel: save it as PNG"
    width, height = image.size
    row = (width * bits + 31) // 32 * 4
    return "truncated" if size < pixels + row * height else None


# === WebP ===


def _webp_problem(head, size):
    """The layouts of the three kinds are in RFC 9649, 2.5 to 2.7."""
    riff_size, kind = struct.unpack_from("<4xI4x4s", head)
    flags = head[20]
    if size < riff_size + 8:
        return "truncated"
    if kind == b"VP8X" and flags & 2:
        return "an animated WebP: save its first frame as PNG"
    if kind not in _WEBP_SIZES:
        return "damaged header"
    return _size_problem(*_WEBP_SIZES[kind](head))


def _bits(data, first, count):
    return (int.from_bytes(data, "little") >> first) % 2**count


_WEBP_SIZES = {
    b"VP8 ": lambda head: (_bits(head[26:28], 0, 14), _bits(head[28:30], 0, 14)),
    b"VP8L": lambda head: (1 + _bits(head[21:25], 0, 14), 1 + _bits(head[21:25], 14, 14)),
    b"VP8X": lambda head: (1 + _bits(head[24:27], 0, 24), 1 + _bits(head[27:30], 0, 24)),
}

_PROBLEMS = {
    "JPEG": _jpeg_problem,
    "PNG": _png_problem,
    "GIF": _gif_problem,
    "BMP": _bmp_problem,
}


# === Decoding found wanting ===


def find_undecodable(paths):
    """Decodes every file in full and returns those that fail, as (path, reason).

    For use after TensorFlow met an image it could not decode, because its error names no file.
    """
    import tensorflow as tf

    problems = []
    for path in paths:
        try:
            decode_image(tf.io.read_file(path), channels=3)
        except (tf.errors.OpError, ValueError) as error:
            problems.append((path, decoding_problem(error)))
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


# === Resizing and scaling ===


def resize_images(images, image_shape, eval_crop=0.0):
    """Resizes to exactly this height and width, bilinear and antialiased.

    Without `eval_crop`, the aspect ratio is not kept, as in the official fine-tuning code
    (vit_jax). Images that have the shape already are returned as they are, bit for bit.

    With it, they are scaled with their aspect ratio kept, so that they just cover
    `image_shape / eval_crop`, and the centre is cut out: as in the paper's evaluation
    (big_vision, `resize_small(256)|central_crop(224)`: 0.875), but for its "area" filter. The
    scaled sides are rounded to the nearest pixel; an odd rest is cut off at the bottom and right.

    Args:
        images: tensor `(height, width, channels)` or `(batch, height, width, channels)` with
            values from 0 to 255.
        image_shape: (height, width), in pixels.
        eval_crop: float in [0, 1]. Share of the scaled image that is kept, along the side that
            fits more tightly; 0 for no crop.

    Returns:
        float32 tensor `(..., *image_shape, channels)` with values from 0 to 255.
    """
    import tensorflow as tf

    images = tf.cast(images, tf.float32)
    if eval_crop:
        shape = _covering_shape(images, image_shape, eval_crop)
        scaled = tf.image.resize(images, shape, antialias=True)
        resized = _centre(scaled, shape, image_shape)
    else:
        resized = tf.image.resize(images, image_shape, antialias=True)
    return tf.clip_by_value(resized, 0.0, 255.0)


def _covering_shape(images, image_shape, eval_crop):
    import tensorflow as tf

    sides = tf.cast(tf.shape(images)[-3:-1], tf.float64)
    scale = tf.reduce_max(tf.constant(image_shape, tf.float64) / eval_crop / sides)
    return tf.maximum(tf.cast(tf.round(sides * scale), tf.int32), image_shape)


def _centre(images, shape, image_shape):
    height, width = image_shape
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    centre = images[..., top : top + height, left : left + width, :]
    centre.set_shape((*images.shape[:-3], height, width, images.shape[-1]))
    return centre


def to_model_range(images):
    """Scales pixel values from [0, 255] to [-1, 1], as the official code does.

    Args:
        images: tensor of any shape and number type.

    Returns:
        float32 tensor of the same shape.
    """
    import tensorflow as tf

    return (tf.cast(images, tf.float32) - 127.5) / 127.5
