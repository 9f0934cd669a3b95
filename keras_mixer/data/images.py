"""One image: is the file sound, how is it decoded, resized and scaled.

Training, evaluation, prediction and the exported model all use the three functions at the end, so
an image means the same to each of them. TensorFlow is imported only when they are called: the
checks above them run before it starts.
"""

import os
import warnings

MOST_PIXELS = 89_478_485  # Pillow's limit against decompression bombs

_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG"}  # MPO: several JPEGs in one file
_JPEG_END = b"\xff\xd9"


def check_image_file(path):
    """Says what is wrong with an image file, without decoding it.

    The header must announce a JPEG or PNG of bearable size; the checksums of a PNG must be right,
    and a JPEG must have its end marker.

    Args:
        path: string or bytes.

    Returns:
        None for a sound file, else a reason such as `"truncated"`.
    """
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):  # a pipe or a device is never opened: it could hang
        return "not a regular file"
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            return _problem(file, Image)
    except Image.DecompressionBombError:
        return f"more than {MOST_PIXELS} pixels"
    except UnidentifiedImageError:
        return "not a JPEG or PNG image"
    except OSError as error:
        return error.strerror or f"damaged ({error})"
    except Exception as error:  # Pillow's parsers raise many kinds on hostile bytes
        return f"damaged ({error})"


def _problem(file, image_module):
    size = os.fstat(file.fileno()).st_size
    if not size:
        return "empty file"
    with image_module.open(file, formats=("JPEG", "PNG")) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            return f"{width}x{height} is more than {MOST_PIXELS} pixels"
        if _FORMATS[image.format] == "PNG":
            image.verify()  # reads all of it, and raises where a checksum is wrong
            return None
        return None if _has_jpeg_end(file, size) else "truncated"


def _has_jpeg_end(file, size, tail=64):
    """Looks for the end marker: at the end, else (cameras append films) anywhere in the scan."""
    scan = file.tell()  # Pillow has read the header up to here
    file.seek(max(scan, size - tail))
    if _JPEG_END in file.read():
        return True
    file.seek(scan)
    return _JPEG_END in file.read()


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
            problems.append((path, str(error).splitlines()[0][:120]))
    return problems


def decode_image(content, channels):
    """Decodes a JPEG or PNG.

    Transparency is dropped, 16-bit values are reduced to 8, gray becomes colour and colour gray as
    `channels` asks. EXIF orientation is ignored, since no TensorFlow op can read it.

    Args:
        content: scalar string tensor, the bytes of the file.
        channels: int, 1 or 3.

    Returns:
        uint8 tensor `(height, width, channels)`.
    """
    import tensorflow as tf

    # The op reads PNG, too. The accurate inverse DCT is what Pillow, and so most training code,
    # uses; TensorFlow's default is a faster one that is off by up to 5 levels.
    return tf.io.decode_jpeg(content, channels=channels, dct_method="INTEGER_ACCURATE")


def resize_images(images, image_shape):
    """Resizes to exactly this height and width, bilinear and antialiased.

    The aspect ratio is not kept, as in the official fine-tuning code (vit_jax). Images that have
    the shape already are returned as they are, bit for bit.

    Args:
        images: tensor `(..., height, width, channels)` with values from 0 to 255.
        image_shape: (height, width), in pixels.

    Returns:
        float32 tensor `(..., *image_shape, channels)` with values from 0 to 255.
    """
    import tensorflow as tf

    resized = tf.image.resize(tf.cast(images, tf.float32), image_shape, antialias=True)
    return tf.clip_by_value(resized, 0.0, 255.0)


def to_model_range(images):
    """Scales pixel values from [0, 255] to [-1, 1], as the official code does.

    Args:
        images: tensor of any shape and number type.

    Returns:
        float32 tensor of the same shape.
    """
    import tensorflow as tf

    return (tf.cast(images, tf.float32) - 127.5) / 127.5
