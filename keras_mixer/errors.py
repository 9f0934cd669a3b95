"""What a user can mend: errors that reach the command line as one line, without a traceback."""


class InputError(ValueError):
    """Something given is wrong: a flag, a file, a folder. The command line exits with status 2.

    The message says what happened, what was expected, what was received, and which flag mends it.
    """


class RunError(RuntimeError):
    """A run cannot go on: the loss is not finite, the disk is full. The exit status is 1."""
