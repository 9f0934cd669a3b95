"""What the terminal shows: notices and progress bars, all on standard error.

Standard output belongs to results (tables, JSON, CSV), so that they can be piped. Names that come
from files are printed literally: control characters are escaped, and nothing is read as markup.
"""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def say(text):
    """Prints a line for the person at the terminal."""
    _console.print(printable(text))


def printable(text):
    """Returns the text with control characters and undecodable bytes escaped, line ends kept."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def progress_bar(status_width=None):
    """Returns a rich Progress with count, elapsed time and ETA; use it as a context manager.

    Args:
        status_width: int. Columns kept for a task's `status` field, so that the bar stands still.
    """
    status = TextColumn("{task.fields[status]}", table_column=Column(min_width=status_width))
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        status,
        console=_console,
        transient=True,
    )


def track(items, description):
    """Yields the items under a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=len(items), status="")
        for item in items:
            yield item
            bar.advance(task)
