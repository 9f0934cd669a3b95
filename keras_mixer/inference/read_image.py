"""Reads images given as paths, PIL images, arrays or the bytes of a file.

Pixels equal those of `decode_image` in every case. Error messages do not name the image.
"""

import io
import os
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from keras_mixer.data.image_checks import check_image, check_image_file
from keras_mixer.data.image_listing import list_images
from keras_mixer.errors import InputError
from keras_mixer.preprocessing.decode import decode_image, decoding_problem
from keras_mixer.preprocessing.resize import preprocess

_PATH = (str, bytes, os.PathLike)


def as_list(images):
    """Returns a list of images from a list, one image, or an array of several.

    Args:
        images: See `predict.preprocess`.
    """
    if isinstance(images, (*_PATH, io.BytesIO, Image.Image)):
        return [images]
    if isinstance(images, Iterable) and not hasattr(images, "__array__"):
        return list(images)
    array = _as_array(images)
    return list(array) if array.ndim in (1, 4) else [array]  # 1: of paths


def refuse_unreadable(images, results):
    """Raises an `InputError` that names the first image whose result is an error message.

    Args:
        images: list of images.
        results: Those of `read_image`, or of `predict.classify`.
    """
    for index, (image, result) in enumerate(zip(images, results, strict=True)):
        if isinstance(result, str):
            name = os.fsdecode(image) if isinstance(image, _PATH) else f"images[{index}]"
            raise InputError(f"{name:.1000}: {result}")  # bytes of a file are not all shown


def read_image(image, spec):
    """Reads and preprocesses an image.

    Args:
        image: Of any kind in `READERS`.
        spec: `ModelSpec`.

    Returns:
        float32 array `(height, width, channels)` in [-1, 1], or an error message.
    """
    read = next(read for kind, read in READERS if isinstance(image, kind))
    try:
        return preprocess(read(image, spec.architecture.channels), spec).numpy()
    except InputError as error:
        return str(error)


def _read_file(path, channels):
    if not os.path.exists(path):
        raise InputError("no such file")
    if os.path.isdir(path):
        held = len(list_images(path)[0])
        if not held:
            raise InputError("the folder has no images")
        raise InputError(f"expected an image, received a folder of {held}; give their paths")
    if problem := check_image_file(path):
        raise InputError(problem)
    return _decode(tf.io.read_file(os.fsencode(path)), channels)


def _read_content(file, channels):
    if problem := check_image(file):
        raise InputError(problem)
    return _decode(file.getvalue(), channels)


def _decode(content, channels):
    try:
        return decode_image(content, channels)
    except (tf.errors.OpError, ValueError) as error:
        raise InputError(decoding_problem(error)) from error


def _read_picture(image, channels):
    """Converts a PIL image by the rules of `decode_image`."""
    if image.mode in ("I", "F"):  # integers and floats of 32 bits, of unknown range
        return _read_array(image, channels)
    try:
        color = _as_color(image)
    except Exception as error:  # Pillow reads files late, and raises many types on damaged ones
        raise InputError(f"Pillow cannot read it ({error})") from error
    return np.atleast_3d(np.asarray(color.convert("L") if channels == 1 else color))


def _as_color(image):
    """Returns a PIL image upright and in RGB."""
    rotated = image.format in (None, "JPEG", "MPO")  # as `decode_image`, for files
    upright = ImageOps.exif_transpose(image) if rotated else image
    if image.mode.startswith("I;16"):  # of which Pillow would clip all above 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    upright = upright.convert("RGBA")
    if image.format == "GIF":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright)
    return upright.convert("RGB")


def _read_array(image, channels):
    array = _as_array(image)
    if array.dtype != np.uint8:
        raise InputError(f"expected uint8 from 0 to 255, received {_describe(array)}")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or not array.size:
        wanted = "(height, width) or (height, width, channels), of 1, 3 or 4 channels"
        raise InputError(f"expected an array {wanted}, received {array.shape}")
    single = array.shape[2:] == (1,)
    return _read_picture(Image.fromarray(array[..., 0] if single else array), channels)


def _as_array(image):
    try:
        return np.asarray(image)
    except Exception as error:  # each library has its own, as of arrays on a GPU
        raise InputError(f"expected an image, received no array ({error})") from error


def _describe(array):
    """Describes the values of an array that is not of uint8."""
    if array.dtype.kind not in "biuf" or not array.size:
        kind = array.dtype if array.ndim else type(array[()]).__name__
        return f"{kind}; give a path, a PIL image or such an array"
    return (
        f"{array.dtype} from {array.min()} to {array.max()}; scale it to 0 to 255 and convert it "
        f"with .round().astype('uint8')"
    )


READERS = (  # by type of image; the last reads all others
    (_PATH, _read_file),
    (io.BytesIO, _read_content),
    (Image.Image, _read_picture),
    (object, _read_array),
)
