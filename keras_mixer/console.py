"""Terminal output: notices and progress bars, all on standard error.

Standard output belongs to results (tables, JSON, CSV), so that they can be piped. Names that come
from files are printed literally: control characters are escaped, and nothing is read as markup.
"""

import contextlib
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


class _StandardError:
    """Standard error, or nothing once it is closed.

    When the terminal closes, or the same Ctrl-C has ended `tee`, writing fails; that must not end
    a run that is about to save its state.
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


_console = Console(
    file=_StandardError(), highlight=False, markup=False, emoji=False, soft_wrap=True
)


def say(text):
    """Prints a line for the person at the terminal."""
    _console.print(printable(text))


def printable(text):
    """Returns the text with control characters and undecodable bytes escaped, line ends kept."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def progress_bar():
    """Returns a rich Progress with count, elapsed time and ETA; use it as a context manager.

    It is drawn on terminals only, and leaves no trace when it ends.
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
        disable=not _console.is_terminal,
    )


@contextlib.contextmanager
def byte_bar(description):
    """Shows how many bytes have come, how fast, and the ETA, on terminals only.

    Args:
        description: What the bar says.

    Yields:
        Function of the bytes there are and the bytes there will be.
    """
    columns = (
        *(TextColumn("{task.description}"), BarColumn(bar_width=24)),
        *(DownloadColumn(binary_units=True), TransferSpeedColumn()),
        *(TextColumn("eta"), TimeRemainingColumn()),
    )
    terminal = _console.is_terminal
    with Progress(*columns, console=_console, transient=True, disable=not terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def track(items, description, total=None):
    """Yields the items under a progress bar.

    Args:
        items: Any iterable.
        description: What the bar says.
        total: How many items there are, where `len` cannot tell; where nobody can, they are
            counted.
    """
    with progress_bar() as bar:
        total = len(items) if total is None and isinstance(items, Sized) else total
        task = bar.add_task(description, total=total, status="")
        for item in items:
            yield item
            bar.advance(task)


@contextlib.contextmanager
def quiet_tensorflow():
    """Keeps TensorFlow's start-up messages off the terminal, which no flag silences altogether.

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
