"""Curves: what runs do from epoch to epoch, as lines over the runs of an experiment."""

import itertools
import math
import statistics
from typing import NamedTuple

from keras_mixer.reports.report import differences

# Columns of history.csv that are drawn, with their titles.
CURVES = {
    "val_accuracy": "Validation accuracy",
    "accuracy": "Training accuracy",
    "val_loss": "Validation loss",
    "loss": "Training loss",
    "lr": "Learning rate",
}
COLORS = 6  # of the page, --series-0 and so on
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))  # with the colors, 12 kinds of lines


class Line(NamedTuple):
    """A column of history.csv over epochs, of runs that differ in their seed.

    Attributes:
        number: int. Number of the experiment, from 1, which its color and dashes are by.
        epochs: list of floats.
        mean, low, high: lists of floats, over the runs that have the epoch.
    """

    number: int
    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def line_of(number, runs, column):
    """Returns the `Line` of a column.

    Args:
        number: int. Number of the experiment.
        runs: list of its runs, dicts with `rows`, see `report.read_experiments`.
        column: string, a key of `CURVES`.
    """
    values = {}
    for row in itertools.chain(*(run["rows"] for run in runs)):
        epoch, value = number_in(row, "epoch"), number_in(row, column)
        if math.isfinite(epoch) and math.isfinite(value):
            values.setdefault(epoch, []).append(value)
    epochs = sorted(values)
    of_runs = (statistics.mean, min, max)
    return Line(number, epochs, *([choose(values[e]) for e in epochs] for choose in of_runs))


def number_in(row, column):
    """Returns a value of a row of history.csv; NaN for an empty one, as without validation."""
    try:
        return float(row.get(column) or "nan")
    except ValueError:
        return math.nan


def line_style(number):
    """Returns the (index of the color, dashes) of an experiment's line, by its number from 1."""
    return (number - 1) % COLORS, DASHES[(number - 1) % len(DASHES)]


def draw_curves(path, experiments):
    """Draws the curves of experiments into one picture, with a legend of what they differ in.

    Args:
        path: Path of a .png, .svg or .pdf file, replaced.
        experiments: dict, see `report.read_experiments`.
    """
    from matplotlib import style

    # The default style first: a user's would give another picture. A flag may have $ in it.
    with style.context(["default", {"text.parse_math": False}]):
        _draw(experiments).savefig(path, dpi=110)


def _draw(experiments):
    from matplotlib.figure import Figure

    every = list(experiments.values())
    drawn = {title: _lines(every, column) for column, title in CURVES.items()}
    drawn = {title: lines for title, lines in drawn.items() if lines}
    figure = Figure(figsize=(11, 6 + 0.17 * len(every)), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for panel, (title, lines) in itertools.zip_longest(panels, drawn.items(), fillvalue=("", ())):
        _draw_panel(panel, title, lines)
    names = _names(experiments)
    labels = [f"{name} ({len(runs)})" for name, runs in zip(names, every, strict=True)]
    figure.legend(panels[0].get_lines(), labels, loc="outside lower left", fontsize=8)
    return figure


def _lines(every, column):
    lines = [line_of(number, runs, column) for number, runs in enumerate(every, 1)]
    return [line for line in lines if line.epochs]


def _draw_panel(panel, title, lines):
    from matplotlib.ticker import MaxNLocator

    panel.set_visible(bool(lines))
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("epoch", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for line in lines:
        index, dashes = line_style(line.number)
        look = {"color": f"C{index}", "linewidth": 1.3, "linestyle": (0, dashes or (1, 0))}
        look["marker"] = "o" if len(line.epochs) == 1 else ""
        panel.plot(line.epochs, line.mean, **look)
        if line.low != line.high:
            panel.fill_between(line.epochs, line.low, line.high, color=f"C{index}", alpha=0.15)


def _names(experiments):
    """Returns short names of experiments: by their flags, or by the options that differ."""
    by_flags = distinct([name for name, _ in experiments])
    options = differences(runs[0] for runs in experiments.values())
    by_options = [
        " ".join(f"{name}={values[i]}" for name, values in options) or name
        for i, name in enumerate(by_flags)
    ]
    return min(by_flags, by_options, key=lambda names: max(map(len, names)))


def distinct(names):
    """Returns names of experiments without the flags that all of them have, and without dashes."""
    words = [[word.removeprefix("--") for word in name.split(" ")] for name in names]
    common = set.intersection(*map(set, words)) if len(names) > 1 else set()
    return [" ".join(word for word in own if word not in common) or "the rest" for own in words]
