"""Shared by several commands: checks of arguments, writing of outputs."""

from pathlib import Path

from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically


def only(arguments, what):
    """Returns the one argument of a command.

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
