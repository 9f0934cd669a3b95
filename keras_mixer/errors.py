"""Errors that a user can fix; the command line prints them as one line, without a traceback."""

import contextlib
import re


class InputError(ValueError):
    """A flag, file or folder is not valid. The command line exits with status 2.

    The message has what was expected, what was received, and the flag that fixes it.
    It is one line: names that come from files can hold others.
    """

    def __init__(self, text):
        super().__init__(" ".join(str(text).splitlines()))


class InUseError(InputError):
    """Another process trains in the directory."""


class RunError(RuntimeError):
    """A run cannot go on, as when the loss is not finite. The command line exits with status 1."""


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
    """Puts `what` a message is about, such as a path, before the text of an InputError."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(f"{what}") else f"{what}: {text}") from error


def without_internals(error):
    """Returns the first line of a TensorFlow error, without its ops."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error).splitlines()[0]).strip()


MOST_NAMED = 20


def join_names(names):
    """Returns the first names of a list as text, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
