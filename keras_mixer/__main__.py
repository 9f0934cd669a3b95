"""The command line: `python -m keras_mixer COMMAND`, also installed as `keras-mixer COMMAND`.

Exit status:
    0: done.
    1: a run failed, images could not be read, or an accuracy is not the expected one.
    2: wrong input: a flag, a file or data; the message is one line.
    130, 143: stopped by a signal (SIGINT, SIGTERM); a run has saved its state.
"""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import os
import platform
import shlex
import signal
import sys

from keras_mixer.signals import exiting_on_interrupt, temporary_handlers

with exiting_on_interrupt():
    from keras_mixer.commands.shared import hint_at_separator
    from keras_mixer.commands.table import COMMANDS
    from keras_mixer.compute.rank import find_rank
    from keras_mixer.config.command_line import describe, parse
    from keras_mixer.config.options import nearest
    from keras_mixer.errors import InputError, RunError
    from keras_mixer.log import logger, prepare_streams, printable, show_messages
    from keras_mixer.signals import SIGNALS, Interrupted


def main(arguments=None):
    """Runs a command and returns the exit status.

    Args:
        arguments: list of strings, the command first. Defaults to `sys.argv[1:]`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    prepare_streams()
    name, *rest = arguments or ["--help"]
    show_messages()
    with _exit_statuses(name, rest) as ending:
        ending.status = _run(name, rest)
        sys.stdout.flush()  # raises if the pipe is closed
    return ending.status


def _run(name, arguments):
    if name in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if "--version" in (name, *arguments):
        print(_versions())
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"no such command: {name}, expected one of {', '.join(COMMANDS)}"
            f"{nearest(name, COMMANDS)}"
        )
    command = COMMANDS[name]
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        title = f"{_usage(name)}\n\n{inspect.cleandoc(command.run.__doc__ or '')}"
        print(describe(command.options, title, command.examples))
        return 0
    try:
        options, _, rest = parse(command.options, arguments, command.arguments)
    except InputError as error:
        takes_train = "--" in (command.arguments or "")
        raise (hint_at_separator(error, name) if takes_train else error) from error
    return command.run(options, rest) or 0


def _versions():
    libraries = {"TensorFlow": "tensorflow", "Keras": "keras", "NumPy": "numpy"}
    found = [f"{name} {importlib.metadata.version(package)}" for name, package in libraries.items()]
    own = importlib.metadata.version("keras_mixer")
    return f"keras_mixer {own} ({', '.join(found)}, Python {platform.python_version()})"


def _overview():
    lines = ["usage: keras-mixer COMMAND [--flag=value ...]", "", "commands:"]
    for name, command in COMMANDS.items():
        first, *_ = (command.run.__doc__ or "").strip().split("\n")  # python -OO drops docstrings
        lines.append(f"  {name:<10} {first}")
    help = "keras-mixer COMMAND --help shows the flags of a command; --version the versions"
    return "\n".join([*lines, "", help])


def _usage(name):
    words = [COMMANDS[name].arguments or "", "[--flag=value ...]"]
    if "--" in words[0]:  # flags for another command, which come last
        words.reverse()
    return " ".join(filter(None, ["usage: keras-mixer", name, *words]))


_ENDING = [number for number in SIGNALS if number != signal.SIGINT]


@dataclasses.dataclass
class _Ending:
    status: int = 0


@contextlib.contextmanager
def _exit_statuses(name, arguments):
    """Prints errors as one line, without a traceback; yields an `_Ending` with the exit status."""
    ending = _Ending()
    try:
        with temporary_handlers(_ENDING, lambda number, frame: sys.exit(128 + number)):
            yield ending
    except InputError as error:
        ending.status = _complain(error, 2)
    except RunError as error:
        ending.status = _complain(error, 1)
    except KeyboardInterrupt:
        ending.status = _complain("interrupted", 130)
    except Interrupted as error:
        logger.info(
            f"stopped by {error}, state saved; to continue: {_same_command(name, arguments)}"
        )
        ending.status = error.exit_status
    except OSError as error:  # a full disk, no permission, a name that is too long
        ending.status = 1
        if not isinstance(error, BrokenPipeError):  # standard output was closed, as by `| head`
            _complain(f"{error}; what was saved before is intact", 1)
        _discard_output()


def _discard_output():
    """Redirects a standard output that cannot be written, which Python would flush at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _same_command(name, arguments):
    """Returns the command line that continues an interrupted run."""
    if find_rank():
        return "the same command in all processes"
    script = sys.argv[0].endswith("train.py")
    entry = ["python", sys.argv[0]] if script else ["keras-mixer", name]
    return shlex.join([*entry, *(a for a in arguments if not a.startswith("--overwrite"))])


def _complain(error, status):
    print(printable(f"error: {' '.join(str(error).splitlines())}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
