"""One image: is the file sound, how is it decoded, resized and scaled.

Training, evaluation, prediction and the exported model all use the three functions at the end, so
an image means the same to each of them. TensorFlow is imported only when they are called: the
checks above them run before it starts.
"""

import os

MOST_PIXELS = 89_478_485  # Pillow's limit against decompression bombs
FORMATS = ("JPEG", "PNG")

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xae\x42\x60\x82"}
_TAIL = 64  # some cameras and editors write a few bytes after the end marker


def check_image_file(path):
    """Says what is wrong with an image file, from its header and its end, without decoding it.

    Args:
        path: string or bytes.

    Returns:
        None for a sound JPEG or PNG, else a reason such as `"truncated"`.
    """
    from PIL import Image

    try:
        if not os.path.isfile(path):  # a pipe or a device is never opened: it could hang
            return "not a regular file"
        if not os.path.getsize(path):
            return "empty file"
        with open(path, "rb") as file:
            kind, (width, height) = _format_and_size(file, Image)
            file.seek(max(0, os.path.getsize(path) - _TAIL))
            tail = file.read()
    except Image.DecompressionBombError:
        return f"more than {MOST_PIXELS} pixels"
    except OSError as error:
        return error.strerror or f"not a {' or '.join(FORMATS)} image"
    if width * height > MOST_PIXELS:
        return f"{width}x{height} is more than {MOST_PIXELS} pixels"
    return None if _ENDS[kind] in tail else "truncated"


def _format_and_size(file, image_module):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", image_module.DecompressionBombWarning)  # checked by us
        with image_module.open(file, formats=FORMATS) as image:
            return image.format, image.size


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
