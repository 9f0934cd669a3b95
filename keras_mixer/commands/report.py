"""Command for finished runs: report."""

import dataclasses

from keras_mixer.commands.shared import check_outputs, publish_table
from keras_mixer.config.options import named_as_flags, option
from keras_mixer.errors import InputError
from keras_mixer.reports.report import report as compare_runs


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Flags of `report`."""

    output: str | None = option(None, "Write the table to this file instead of printing it.")
    html: str | None = option(
        None,
        "Folder for a page, too: curves, intervals, confusion, calibration, mistakes and weights. "
        "index.html and CSV files of the same names are replaced.",
    )
    plot: str | None = option(
        None, "Plot loss, accuracy and learning rate by epoch to this file (.png, .svg, .pdf)."
    )


def report(options, arguments):
    """Tabulates finished runs: mean ± std over runs that differ only in their seed.

    The folder of a sweep stands for its runs. With --html, a page with figures is written as well.
    """
    if not arguments:
        raise InputError("expected at least one RUN")
    check_outputs(options, "output", "plot")
    with named_as_flags(ReportOptions):
        made = compare_runs(arguments, options.html, options.plot)
    publish_table("report", options, arguments, made.table)
