"""What several verbs do: hold arguments, write files, start TensorFlow without its chatter."""

import contextlib
import os
import sys
from pathlib import Path

from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically


def only(arguments, what):
    """Returns the one argument of a verb.

    Args:
        arguments: list of strings.
        what: What the argument is called in `--help`.

    Raises:
        InputError: If there is none, or more than one.
    """
    if len(arguments) != 1:
        raise InputError(f"expected exactly one {what}, received {len(arguments)}")
    return arguments[0]


def check_writable(path):
    """Refuses an `--output` that could not be written, before the work for it is done.

    Raises:
        InputError: If its folder does not exist, or it is itself a folder.
    """
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise InputError(f"--output={path}: its folder does not exist, or it is itself a folder")


def write(path, text):
    """Writes the text of an `--output` in one step; see `check_writable`."""
    check_writable(path)
    write_atomically(Path(path), text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def quiet_tensorflow():
    """Keeps TensorFlow's start-up chatter, which no flag silences whole, off the terminal.

    TensorFlow 2.21 prints about oneDNN and missing CUDA libraries before its own log level is read
    (https://github.com/tensorflow/tensorflow/issues/100442). Errors are exceptions, and pass.
    """
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        raise InputError(f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}: expected tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "tensorflow" in sys.modules or os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow

        tensorflow.config.list_physical_devices()
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
