"""Markdown, as in results/: tables, code, and a mean with its spread."""

import statistics


def table(columns, rows):
    """Returns the lines of a Markdown table.

    Args:
        columns: list of the titles of columns.
        rows: Iterable of rows, each a list of as many cells: text, or what `str` makes text of. A
            `|` in a cell is escaped.
    """
    return [_line(columns), "|" + "---|" * len(columns), *map(_line, rows)]


def _line(cells):
    escaped = [str(cell).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def code(text):
    """Returns text as code."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def spread(values):
    """Returns a list of floats as text: mean ± sample standard deviation; a dash for no floats."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
