"""Terminal output: messages and progress bars, all on standard error.

Standard output is for results (tables, JSON, CSV), so that they can be piped. Text is printed
literally: control characters, as in file names, are escaped, and there is no rich markup.
"""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Sized

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from keras_mixer.errors import InputError
from keras_mixer.interrupts import ending_at_once


class _StandardError:
    """Standard error, without errors once it is closed.

    Writing fails when the terminal is closed, or Ctrl-C has ended `tee`, too. That must not keep a
    run from saving its state.
    """

    def write(self, text):
        with contextlib.suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name):
        return getattr(sys.stderr, name)


def prepare_streams():
    """Makes standard streams that were closed, as by `2>&-`, and lets all print any text.

    Without this, the next file that is opened, such as a checkpoint, would be standard error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
        if getattr(sys, name) is None and number:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_console = Console(
    file=_StandardError(), highlight=False, markup=False, emoji=False, soft_wrap=True
)


# Levels of --verbosity, with the usual numbers.
VERBOSITIES = {"error": -2, "warning": -1, "info": 0, "debug": 1}
_verbosity = VERBOSITIES["info"]


def set_verbosity(level):
    """Sets what is printed from now on: a value of `VERBOSITIES`."""
    global _verbosity
    _verbosity = level


def debugging():
    """Returns whether everything is to be shown, --verbosity=debug."""
    return _verbosity >= VERBOSITIES["debug"]


def say(text, level="info"):
    """Prints a line to standard error, unless --verbosity is below the level."""
    if VERBOSITIES[level] <= _verbosity:
        _console.print(printable(text))


def warn(text):
    """Prints a line that concerns the result to standard error, unless only errors are wanted."""
    say(text, "warning")


_standard_error = 2  # the file descriptor, wherever the user's standard error is at the moment


def print_last_words(text):
    """Prints an error from any thread, before the process is ended at once."""
    with contextlib.suppress(OSError):
        os.write(_standard_error, f"error: {printable(text)}\n".encode(errors="backslashreplace"))


def printable(text):
    """Returns the text with control characters and undecodable bytes escaped, except newlines."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def one_line(text):
    """Returns the text as `printable`, newlines escaped as well: a name cannot forge a line."""
    return printable(text).replace("\n", "\\n")


def progress_bar():
    """Returns a rich Progress with count, elapsed time and ETA, drawn on terminals only.

    It is a context manager, and is erased at the end.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=_console,
        transient=True,
        disable=not _shows_bars(),
    )


def _shows_bars():
    return _console.is_terminal and _verbosity >= VERBOSITIES["info"]


@contextlib.contextmanager
def byte_bar(description):
    """Shows a progress bar of a download with its speed and ETA, on terminals only.

    Yields:
        Function of the bytes received and the bytes in total, which updates the bar.
    """
    columns = (
        *(TextColumn("{task.description}"), BarColumn(bar_width=24)),
        *(DownloadColumn(binary_units=True), TransferSpeedColumn()),
        *(TextColumn("eta"), TimeRemainingColumn()),
    )
    hidden = not _shows_bars()
    with Progress(*columns, console=_console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def track(items, description, total=None):
    """Yields the items of an iterable with a progress bar.

    Args:
        items: Any iterable.
        description: Text before the bar.
        total: int. Number of items; by default their `len`, or unknown.
    """
    with progress_bar() as bar:
        total = len(items) if total is None and isinstance(items, Sized) else total
        task = bar.add_task(description, total=total, status="")
        for item in items:
            yield item
            bar.advance(task)


BACKENDS = ("tensorflow", "jax")  # of Keras, that commands run on


def _import_keras():
    """Imports Keras with its own settings, whatever keras.json in the user's home says.

    If it has been imported, as in a notebook, its settings are the user's.
    """
    if "keras" in sys.modules:
        return
    try:
        import keras
    except (AssertionError, ValueError) as error:
        raise InputError(
            "Keras does not accept its settings in ~/.keras/keras.json (or in KERAS_HOME): "
            f"correct or remove that file {error}".strip()
        ) from error
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")


def check_installed(backend):
    """Raises an `InputError` if Keras's backend is not installed."""
    if not importlib.util.find_spec(backend):
        raise InputError(
            f"KERAS_BACKEND={backend} needs a package: pip install 'keras_mixer[{backend}]'"
        )


@contextlib.contextmanager
def quiet_tensorflow():
    """Hides TensorFlow's start-up messages, but for --verbosity=debug; its errors are exceptions.

    TensorFlow 2.21 prints about oneDNN and missing CUDA libraries before its log level is read
    (https://github.com/tensorflow/tensorflow/issues/100442).
    """
    global _standard_error
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend not in BACKENDS:
        raise InputError(f"KERAS_BACKEND={backend}: expected tensorflow or jax")
    check_installed(backend)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if debugging() else "2")
    if "tensorflow" in sys.modules or os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        _import_keras()
        yield
        return
    sys.stderr.flush()
    stderr = _standard_error = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        with ending_at_once(stderr):
            _import_keras()
            import tensorflow

            tensorflow.config.list_physical_devices()
            if backend == "jax":
                keep_tensorflow_off_gpus()
            yield
    finally:
        os.dup2(stderr, 2)
        _standard_error = 2
        os.close(stderr)


def set_streams_aside():
    """Hides what libraries in C++ print from now on, but for --verbosity=debug; our lines stay."""
    global _standard_error
    if debugging():
        return
    for number, name in ((1, "stdout"), (2, "stderr")):
        getattr(sys, name).flush()
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1, errors="backslashreplace"))
    _standard_error = sys.stderr.fileno()
    with open(os.devnull, "w") as devnull:
        for number in (1, 2):
            os.dup2(devnull.fileno(), number)


def keep_tensorflow_off_gpus():
    """Leaves the GPUs to another backend: TensorFlow, which reads the images, takes all memory."""
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")


def duration(seconds):
    """Returns a duration in words: `40 s`, `12 min`, `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
