"""Messages and progress bars: `logging.getLogger("keras_mixer")`, and bars on a terminal.

Programs that use the library configure its messages with Python's logging. The command line prints
them to standard error, with `show_messages`; standard output is for results (tables, JSON, CSV).
"""

import contextlib
import io
import logging
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

logger = logging.getLogger("keras_mixer")


class _StandardError:
    """Standard error that ignores failed writes.

    Writes fail once the terminal is closed, or Ctrl-C has also ended `tee`. A run must save its
    state nevertheless.
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
    """Opens standard streams that were closed, as by `2>&-`, and lets all print any text.

    Otherwise the next file to be opened, such as a checkpoint, would become standard error.
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


# Levels of --verbosity.
VERBOSITIES = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}


class _TerminalHandler(logging.Handler):
    """Prints messages literally: without rich markup, and with control characters escaped."""

    def emit(self, record):
        _console.print(printable(record.getMessage()))


def show_messages(level=logging.INFO):
    """Prints messages of at least this level to standard error."""
    if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        logger.addHandler(_TerminalHandler())
        logger.propagate = False  # libraries add handlers to the root logger
    logger.setLevel(level)


def debugging():
    """Returns whether messages of level debug are printed, as with --verbosity=debug."""
    return logger.isEnabledFor(logging.DEBUG)


_standard_error = 2  # file descriptor that leads to the user's standard error


def print_last_words(text):
    """Prints an error from any thread, right before the process ends."""
    with contextlib.suppress(OSError):
        os.write(_standard_error, f"error: {printable(text)}\n".encode(errors="backslashreplace"))


def printable(text):
    """Returns the text with control characters and undecodable bytes escaped, except newlines."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def one_line(text):
    """Returns the text as `printable`, with newlines escaped as well."""
    return printable(text).replace("\n", "\\n")


def progress_bar():
    """Returns a rich Progress with count, elapsed time and ETA, shown on terminals only.

    It is a context manager; the bar disappears at its end.
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
    return _console.is_terminal and logger.level <= logging.INFO


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


@contextlib.contextmanager
def hidden_standard_error():
    """Discards what is written to standard error, the file descriptor, until the block ends.

    Yields:
        File descriptor of the original standard error.
    """
    global _standard_error
    sys.stderr.flush()
    stderr = _standard_error = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield stderr
    finally:
        os.dup2(stderr, 2)
        _standard_error = 2
        os.close(stderr)


def hide_library_output():
    """Hides what C++ libraries print, except with --verbosity=debug; Python still prints."""
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


def duration(seconds):
    """Formats a duration: `40 s`, `12 min`, `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
