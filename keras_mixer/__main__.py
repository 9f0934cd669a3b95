"""The command line: `python -m keras_mixer VERB`, also installed as `keras-mixer VERB`.

Each verb accepts only its own flags.

Exit status: 0 done, 1 a run failed, 2 something given is wrong, 130 and 143 stopped by a signal.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys

from keras_mixer.commandline import describe, parse
from keras_mixer.console import printable, say
from keras_mixer.errors import InputError, RunError
from keras_mixer.verbs.table import VERBS


def main(arguments=None):
    """Runs a verb; returns the exit status.

    Args:
        arguments: list of strings, the verb first. Defaults to the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    name, *rest = arguments
    with _ending_well(name, rest) as ending:
        if name not in VERBS:
            import difflib

            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"no such command: {name}, expected one of {', '.join(VERBS)}{hint}")
        ending.status = _run(name, rest)
    return ending.status


def _run(name, arguments):
    verb = VERBS[name]
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        print(describe(verb.options, f"{_usage(name)}\n\n{verb.run.__doc__}"))
        return 0
    options, _, rest = parse(verb.options, arguments, verb.arguments)
    return verb.run(options, rest) or 0


def _overview():
    lines = ["usage: keras-mixer COMMAND [--flag=value ...]", "", "commands:"]
    lines += [f"  {name:<10} {verb.run.__doc__.strip()}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "keras-mixer COMMAND --help shows a command's flags"])


def _usage(name):
    words = ["usage: keras-mixer", name, VERBS[name].arguments, "[--flag=value ...]"]
    return " ".join(filter(None, words))


@dataclasses.dataclass
class _Ending:
    status: int = 0


@contextlib.contextmanager
def _ending_well(name, arguments):
    """Turns what a user can mend into one line, and signals into the status that shells expect."""
    ending = _Ending()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield ending
    except InputError as error:
        ending.status = _complain(error, 2)
    except RunError as error:
        ending.status = _complain(error, 1)
    except KeyboardInterrupt:
        ending.status = _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ending.status = 1
    except OSError as error:  # the disk, a permission, a name that is too long
        ending.status = _complain(f"{error}; what was saved before is intact", 1)
    except BaseException as error:
        if not hasattr(error, "exit_status"):  # training.signals.Interrupted, without importing it
            raise
        entry = (
            ["python", "train.py"] if sys.argv[0].endswith("train.py") else ["keras-mixer", name]
        )
        kept = [word for word in arguments if not word.startswith("--overwrite")]
        again = shlex.join([*entry, *kept])
        say(f"stopped by {error}, state saved; to continue: {again}")
        ending.status = error.exit_status
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(error, status):
    print(printable(f"error: {' '.join(str(error).splitlines())}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
