"""Learning curves: columns of history.csv by epoch, with a line for each experiment."""

import itertools
import math
import statistics

# Columns of history.csv and their titles. Accuracies are plotted in percent.
CURVES = {
    "val_accuracy": "Validation accuracy (%)",
    "accuracy": "Training accuracy (%)",
    "val_loss": "Validation loss",
    "loss": "Training loss",
    "lr": "Learning rate",
}
COLORS = 6  # --series-0 and so on of the page; the first of matplotlib's color cycle
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))  # with the colors, 12 kinds of lines


def line_style(number):
    """Returns (index of the color, dashes) of an experiment's line, by its number from 1."""
    return (number - 1) % COLORS, DASHES[(number - 1) % len(DASHES)]


def save_curves(path, experiments):
    """Saves the curves of experiments as one picture, with their labels in a legend.

    Args:
        path: Path of a .png, .svg or .pdf file, replaced.
        experiments: list of `Experiment`.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # "default": without the user's matplotlibrc. Flags may contain $.
    look = {"text.parse_math": False, "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
    with style.context(["default", look]):
        figure = Figure(figsize=(11, 6 + 0.17 * len(experiments)), layout="constrained")
        columns = with_values(experiments)
        for axes, column in itertools.zip_longest(figure.subplots(2, 3).flat, columns):
            axes.set_visible(column is not None)
            if column:
                axes.set_title(CURVES[column])
                plot_column(axes, experiments, column)
        labels = [f"{' '.join(e.label)} ({len(e.runs)})" for e in experiments]
        lines = [Line2D([], [], **_look(experiment)) for experiment in experiments]
        figure.legend(lines, labels, loc="outside lower left")
        figure.savefig(path, dpi=110)


def with_values(experiments):
    """Returns the keys of `CURVES` that have values in any experiment."""
    return [column for column in CURVES if any(_by_epoch(e, column) for e in experiments)]


def plot_column(axes, experiments, column):
    """Plots a column: the mean over the runs of each experiment, in a band from lowest to highest.

    Args:
        axes: matplotlib `Axes`.
        experiments: list of `Experiment`.
        column: string, a key of `CURVES`.
    """
    from matplotlib.ticker import MaxNLocator

    for experiment in experiments:
        values = _by_epoch(experiment, column)
        mean, low, high = (list(map(f, values.values())) for f in (statistics.mean, min, max))
        marker = "o" if len(values) == 1 else ""
        axes.plot(list(values), mean, marker=marker, **_look(experiment))
        if low != high:
            color = _look(experiment)["color"]
            axes.fill_between(list(values), low, high, color=color, alpha=0.16, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _look(experiment):
    index, dashes = line_style(experiment.number)
    return {"color": f"C{index}", "linestyle": (0, dashes or (1, 0)), "linewidth": 1.5}


def _by_epoch(experiment, column):
    """Returns a dict from epoch to the list of the runs' values, without empty ones."""
    scale, values = 100 if "accuracy" in column else 1, {}
    for run in experiment.runs:
        for epoch, value in zip(run.column("epoch"), run.column(column), strict=True):
            if math.isfinite(epoch) and math.isfinite(value):
                values.setdefault(epoch, []).append(scale * value)
    return dict(sorted(values.items()))
