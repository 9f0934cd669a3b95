"""Finds images that cannot be decoded: before a run, to leave them out, or once it has failed.

With --bad_images=skip they are found before the first step, by the decoder that training uses. So
the run is the same, to the last bit, as one on a folder without them.
"""

import contextlib
import functools
import io
import itertools
import os
import pkgutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from keras_mixer.data.image_checks import (
    check_image,
    check_image_file,
    find_unreadable,
    refuse_files,
)
from keras_mixer.data.splits import FileImages
from keras_mixer.data.tfrecords import DamagedRecord, RecordImages, refuse_records
from keras_mixer.errors import InputError
from keras_mixer.files import OF_THE_MACHINE
from keras_mixer.log import track
from keras_mixer.preprocessing.decode import decode_image, decoding_problem, find_undecodable

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
    problems = zip(track(range(len(images)), "checking images"), problems, strict=True)
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


# === During a run ===


_READING_ERRORS = (
    tf.errors.InvalidArgumentError,  # what cannot be decoded
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,  # a folder
    tf.errors.UnknownError,  # the disk, the network
)
_IDLE = 10.0  # seconds without work after which pipes are looked for


@contextlib.contextmanager
def broken_images_named(*splits):
    """Converts TensorFlow's errors in reading images to an `InputError` that names the files.

    Only headers and ends of files are checked before a run; other and later damage shows here.

    Args:
        *splits: `splits.Images` that are read in the block, or None.
    """
    try:
        with _pipes_ended([split for split in splits if type(split) is FileImages]):
            yield
    except _READING_ERRORS:
        for split in splits:
            if refuse := _REFUSALS.get(type(split)):
                refuse(split)
        raise


@contextlib.contextmanager
def _pipes_ended(splits):
    """Ends the reading of named pipes that took an image's place: it would wait for ever.

    They are looked for while the process does nothing, ever more rarely.
    """
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(splits, over), daemon=True)
    if splits:
        watch.start()
    try:
        yield
    finally:
        over.set()


def _watch(splits, over):
    wait, used = _IDLE, time.process_time()
    while not over.wait(wait):
        before, used = used, time.process_time()
        if used - before < wait / 10:
            wait *= 2
            for path in itertools.chain.from_iterable(split.paths for split in splits):
                _end_pipe(path)


def _end_pipe(path):
    """Opens a named pipe for writing and closes it, so that who reads it is at the end."""
    with contextlib.suppress(OSError):  # nobody reads it, or the file is gone
        if stat.S_ISFIFO(os.stat(path).st_mode):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def _refuse_files(split):
    paths = track(split.paths, "looking for broken images")
    refuse_files(find_undecodable((path, functools.partial(_read, path)) for path in paths))


def _read(path):
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a regular file")
    return tf.io.read_file(path)


def _refuse_records(split):
    indices = track(range(len(split)), "looking for broken images")
    contents = ((split.place(index), _checked(split, index)) for index in indices)
    refuse_records(find_undecodable(contents, split.channels))


def _checked(split, index):
    split.label(index)
    return split.content(index)


_REFUSALS = {FileImages: _refuse_files, RecordImages: _refuse_records}
