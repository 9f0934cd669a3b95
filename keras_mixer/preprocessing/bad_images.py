"""Finds images that cannot be decoded: before a run, to skip them, or after a decoding error.

With --bad_images=skip, images are decoded before the first step, by the decoder of training. The
run is then the same, bit for bit, as one on a folder without the bad images.
"""

import contextlib
import functools
import io
import os
import pkgutil
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from keras_mixer.data.image_checks import check_image, check_image_file, find_unreadable
from keras_mixer.data.splits import FileImages, refuse_bad
from keras_mixer.data.tfrecords import DamagedRecord, RecordImages
from keras_mixer.errors import InputError
from keras_mixer.files import OF_THE_MACHINE
from keras_mixer.log import track
from keras_mixer.preprocessing.decode import decode_image, decoding_problem

_CHUNK = 256  # images; small, so that Ctrl-C is noticed and few results wait
_PASSING = {os.strerror(number) for number in OF_THE_MACHINE}


def find_bad(images):
    """Decodes images and returns those that cannot be decoded.

    Files that passed before and have not changed since are not decoded again.

    Args:
        images: `Images`.

    Returns:
        list of (index, reason).
    """
    if type(images) is not FileImages:
        return _find_undecodable(images)
    check = functools.partial(_check_in_parallel, functools.partial(_file_problem, images.channels))
    sources = [pkgutil.get_data(__package__, f"{name}.py") for name in ("decode", "bad_images")]
    version = b"".join([*sources, tf.__version__.encode()])
    return find_unreadable(images.listing, check, "decoding", version)


@contextlib.contextmanager
def broken_images_named(*splits):
    """Converts TensorFlow's errors in reading images to an `InputError` that names the images.

    Only headers and ends of files are checked before a run; other and later damage shows here.

    Args:
        *splits: `Images` that are read in the block, or None.
    """
    try:
        yield
    except _READING_ERRORS:
        for split in splits:
            refuse_bad(split, _find_undecodable(split))
        raise


_READING_ERRORS = (
    tf.errors.InvalidArgumentError,  # cannot be decoded
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,  # a folder
    tf.errors.UnknownError,  # the disk, the network
)


def _find_undecodable(images):
    """Decodes all images, even if they passed before; those in memory need not be."""
    if type(images) is FileImages:
        check, items = functools.partial(_file_problem, images.channels), images.paths
    elif type(images) is RecordImages:
        check, items = functools.partial(_record_problem, images), range(len(images))
    else:
        return []
    problems = track(_check_in_parallel(check, items), "checking images (decoding)", len(items))
    return [(index, problem) for index, problem in enumerate(problems) if problem]


def _check_in_parallel(check, items):
    """Yields the results of a function, in order."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _CHUNK):
            yield from pool.map(check, items[start : start + _CHUNK])


def _file_problem(channels, path):
    problem = check_image_file(path)
    if problem in _PASSING:
        raise InputError(f"{os.fsdecode(path)}: {problem}; it may be readable another time")
    return problem or _decoding_problem(os.fsdecode(path), lambda: tf.io.read_file(path), channels)


def _record_problem(images, index):
    try:
        images.label(index)
        content = images.content(index)
    except DamagedRecord as error:
        return error.reason
    return check_image(io.BytesIO(content)) or _decoding_problem(
        images.name_of(index), lambda: content, images.channels
    )


def _decoding_problem(name, read, channels):
    try:
        decode_image(read(), channels)
    except (tf.errors.ResourceExhaustedError, tf.errors.UnknownError) as error:
        raise InputError(
            f"{name}: {decoding_problem(error)}; it may be readable another time"
        ) from error
    except (tf.errors.OpError, ValueError) as error:
        return decoding_problem(error)
    return None
