"""Errors that a user can fix; the command line prints them as one line, without a traceback."""

import contextlib
import re


class InputError(ValueError):
    """A flag, file or folder is not valid. The command line exits with status 2.

    The message says what was expected, what was received, and which flag fixes it. Line breaks, as
    in names from files, become spaces.
    """

    def __init__(self, text):
        super().__init__(" ".join(str(text).splitlines()))


class InUseError(InputError):
    """Another process trains in the directory."""


class RunError(RuntimeError):
    """A run cannot continue, e.g. with a loss of NaN. The command line exits with status 1."""


@contextlib.contextmanager
def path_errors(given):
    """Turns an OSError about a path (too long, no permission) into an InputError.

    Args:
        given: Start of the message: a path, or a flag with its value.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{given}: {error.strerror or error}") from error


@contextlib.contextmanager
def errors_about(what):
    """Prepends `what` an InputError is about, such as a path, to its message."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(f"{what}") else f"{what}: {text}") from error


def without_internals(error):
    """Returns the first line of a TensorFlow error, without its ops."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error).splitlines()[0]).strip()


def join_names(names, most=20):
    """Returns the first names of a list as text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
