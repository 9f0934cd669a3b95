"""Finds images that cannot be decoded, so that --bad_images=skip leaves them out of a run.

They are found before the first step, by the decoder that training uses. So the run is the same, to
the last bit, as one on a folder without them.
"""

import functools
import io
import os
import pkgutil
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from keras_mixer import console
from keras_mixer.data.image_checks import check_image, check_image_file, find_unreadable
from keras_mixer.data.splits import FileImages
from keras_mixer.data.tfrecords import DamagedRecord, RecordImages
from keras_mixer.errors import InputError
from keras_mixer.files import OF_THE_MACHINE
from keras_mixer.preprocessing.decode import decode_image, decoding_problem

_AT_ONCE = 256  # images; so that an interruption is noticed, and few results wait
_PASSING = {os.strerror(number) for number in OF_THE_MACHINE}


def find_bad(images):
    """Decodes images and returns those that cannot be decoded.

    Files that passed before and have not changed since are not decoded again.

    Args:
        images: `Images`.

    Returns:
        list of (index, reason).
    """
    search = _SEARCHES.get(type(images))
    return search(images) if search else []


def _find_bad_files(images):
    check = functools.partial(_check_in_parallel, functools.partial(_file_problem, images.channels))
    sources = [pkgutil.get_data(__package__, f"{name}.py") for name in ("decode", "bad_images")]
    version = b"".join([*sources, tf.__version__.encode()])
    return find_unreadable(images.listing, check, "decoding", version)


def _find_bad_records(images):
    problems = _check_in_parallel(functools.partial(_record_problem, images), range(len(images)))
    problems = zip(console.track(range(len(images)), "checking images"), problems, strict=True)
    return [(index, problem) for index, problem in problems if problem]


def _check_in_parallel(check, items):
    """Yields the results of a function, in order."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _AT_ONCE):
            yield from pool.map(check, items[start : start + _AT_ONCE])


def _file_problem(channels, path):
    problem = check_image_file(path)
    if problem in _PASSING:
        raise InputError(f"{os.fsdecode(path)}: {problem}; it may be readable another time")
    return problem or _decoding_problem(lambda: tf.io.read_file(path), channels)


def _record_problem(images, index):
    try:
        images.label(index)
        content = images.content(index)
    except DamagedRecord as error:
        return error.reason
    return check_image(io.BytesIO(content)) or _decoding_problem(lambda: content, images.channels)


def _decoding_problem(read, channels):
    try:
        decode_image(read(), channels)
    except (tf.errors.ResourceExhaustedError, tf.errors.UnknownError) as error:
        raise InputError(f"reading or decoding an image: {decoding_problem(error)}") from error
    except (tf.errors.OpError, ValueError) as error:
        return decoding_problem(error)
    return None


_SEARCHES = {FileImages: _find_bad_files, RecordImages: _find_bad_records}
