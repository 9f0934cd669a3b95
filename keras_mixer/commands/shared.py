"""Helpers of several commands: checks of arguments, writing of outputs."""

from pathlib import Path

from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically


def only(arguments, what):
    """Returns the only one of a command's arguments; raises an `InputError` if there is not one.

    Args:
        arguments: list of strings.
        what: Name of the argument in `--help`.
    """
    if len(arguments) != 1:
        raise InputError(f"expected exactly one {what}, received {len(arguments)}")
    return arguments[0]


def check_writable(path):
    """Raises an `InputError` if an `--output` cannot be written, before the work for it is done."""
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise InputError(f"--output={path}: its folder does not exist, or it is itself a folder")


def write(path, text):
    """Writes the text of an `--output` atomically, after `check_writable`."""
    check_writable(path)
    write_atomically(Path(path), text.encode(errors="backslashreplace"))
