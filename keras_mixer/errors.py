"""Errors that a user can fix: on the command line they are one line, without a traceback."""

import contextlib


class InputError(ValueError):
    """Something given is wrong: a flag, a file, a folder. The command line exits with status 2.

    The message says what happened, what was expected, what was received, and which flag fixes it.
    """


class RunError(RuntimeError):
    """A run cannot go on: the loss is not finite, the disk is full. The exit status is 1."""


@contextlib.contextmanager
def path_errors(given):
    """Turns an OSError about a path (too long, no permission) into an InputError.

    Args:
        given: The flag or argument with its value, as the message begins.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{given}: {error.strerror or error}") from error


@contextlib.contextmanager
def named(what):
    """Puts what a message is about, such as a path, before the text of an InputError."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(f"{what}") else f"{what}: {text}") from error


MOST_NAMED = 20


def some_of(names):
    """Returns the first names of a list as text, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
