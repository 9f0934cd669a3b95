"""HTML page on finished runs: one file with figures, which needs neither a network nor a script.

Jinja's autoescape escapes all text, since classes and files may have any name.
"""

import base64
import hashlib
import importlib.metadata
import math
import os
import shlex
import statistics
from pathlib import Path

import jinja2
from markupsafe import Markup

from keras_mixer.errors import InputError
from keras_mixer.files import rows_as_csv, write_atomically
from keras_mixer.inference.calibration import wilson_interval
from keras_mixer.jobs import without_retracing_warnings
from keras_mixer.log import duration, logger, one_line
from keras_mixer.reports.analysis import compare
from keras_mixer.reports.curves import CURVES, line_style, plot_column, with_values
from keras_mixer.reports.experiments import SCORED, differences
from keras_mixer.reports.figures import FIGURES, examine
from keras_mixer.reports.pictures import img, svg
from keras_mixer.runs.run import BEST
from keras_mixer.weights.model_folder import read_spec


def write_page(folder, report, command="", plots=()):
    """Writes the page, index.html, and the data of its figures as CSV files; returns its path.

    Args:
        folder: Path of a folder that exists.
        report: `Report`.
        command: Command line that makes the page, for its foot.
        plots: list of (SVG file as bytes, caption), of the search of a sweep.
    """
    findings, rendered = {}, {}
    for number, experiment in enumerate(report.experiments, 1):
        directory = experiment.runs[0].directory
        try:
            with without_retracing_warnings():
                found = examine(directory, f"examining run {number} of {len(report)}")
            rendered[number] = [(f, f.render(found, f"{f.name}-{number}")) for f in FIGURES]
            findings[number] = found._replace(model=None)  # frees its memory
        except InputError as error:
            logger.warning(f"{directory}: the page shows its curves and scores alone: {error}")
    runs = _runs(report.experiments)
    comparisons = _comparisons(report.experiments, findings)
    tables = _tables(report.experiments, findings, runs, comparisons)
    tables = {name: rows for name, rows in tables.items() if rows}
    template = _environment().get_template("page.html")
    html = template.render(
        version=importlib.metadata.version("keras_mixer"),
        command=command,
        files=tables,
        experiments=report.experiments,
        findings=findings,
        rendered=rendered,
        data_sets=list(dict.fromkeys(e.runs[0].data for e in report.experiments)),
        machines=report.machines,
        differences=differences(report.experiments),
        runs=runs,
        scored=SCORED,
        curves=_curves(report.experiments),
        comparisons=comparisons,
        plots=[(img(content, "svg+xml", caption), caption) for content, caption in plots],
    )
    for name, rows in tables.items():
        plain = [{column: _plain(value) for column, value in row.items()} for row in rows]
        write_atomically(Path(folder) / name, rows_as_csv(plain).encode())
    write_atomically(Path(folder) / "index.html", html.encode())
    return Path(folder) / "index.html"


# === Data ===


def _tables(experiments, findings, runs, comparisons):
    """Returns a dict from the name of a CSV file to its rows, a list of dicts."""
    histories = [run.history for experiment in experiments for run in experiment.runs]
    tables = {
        "runs.csv": runs,
        "curves.csv": [
            {name: run[name] for name in ("experiment", "run", "seed")}
            | {name: epoch.get(name) for name in ("epoch", *CURVES)}
            for run, history in zip(runs, histories, strict=True)
            for epoch in history
        ],
        "comparison.csv": [
            {"best": group["best"].number, "experiment": other.number, **compared._asdict()}
            for group in comparisons
            for other, compared in group["others"]
        ],
    }
    for number, found in findings.items():
        tables[f"classes-{number}.csv"] = found.scores["classes"]
        for figure in FIGURES:
            tables[f"{figure.name}-{number}.csv"] = figure.data(found)
    return tables


def _runs(experiments):
    """Returns a dict per run."""
    runs = [(experiment, run) for experiment in experiments for run in experiment.runs]
    above = os.path.commonpath([os.path.dirname(run.directory) for _, run in runs])
    return [
        {
            "experiment": experiment.number,
            "name": experiment.name,
            "run": os.path.relpath(run.directory, above),
            "seed": run.config.get("seed"),
            **_scores(run, "validation"),
            **_scores(run, "test"),
            "epochs": len(run.history),
            "seconds": run.seconds,
            "images_per_second": _median(run.column("images_per_second")),
            "parameters": _parameters(run),
        }
        for experiment, run in runs
    ]


def _scores(run, split):
    """Returns the top-1 accuracy on a split with its 95% interval, as a dict."""
    top1, count = (run.scores.get(split, {}).get(name) for name in ("top1", "n"))
    low, high = wilson_interval(round(top1 * count), count) if count else (None, None)
    return {split: top1, f"{split}_low": low, f"{split}_high": high}


def _median(values):
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _parameters(run):
    try:
        return read_spec(run.directory / BEST).architecture.parameters
    except InputError:
        return None


def _comparisons(experiments, findings):
    """Returns a dict per set of images: the `best` experiment and the `others`.

    The others are a list of (`Experiment`, its `Comparison` with the best).
    """
    groups = {}
    for experiment in experiments:
        if found := findings.get(experiment.number):
            correct, images = found.predicted == found.labels, found.run.dataset.identity
            groups.setdefault((images, found.split), []).append((experiment, correct))
    comparisons = []
    for group in groups.values():
        best, reference = max(group, key=lambda pair: pair[1].mean())
        others = [(e, compare(correct, reference)) for e, correct in group if e is not best]
        comparisons += [{"best": best, "others": others}] if others else []
    return comparisons


# === Rendering ===


def _curves(experiments):
    """Returns a dict from the title of each curve to its SVG element."""

    def plot(figure, column):
        figure.set_size_inches(4.4, 2.6)
        plot_column(figure.subplots(), experiments, column)

    titles = {column: CURVES[column] for column in with_values(experiments)}
    return {
        title: svg(
            column.replace("_", "-"), f"{title} by epoch; the data: curves.csv", plot, column
        )
        for column, title in titles.items()
    }


def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_plain,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _FILTERS
    return environment


def _plain(value):
    """Returns a value; text on one line, with unprintable characters escaped."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _source_hash(script):
    """Returns the hash by which the page's Content-Security-Policy allows its only script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


_FILTERS = {
    "percent": lambda value: "–" if value is None else f"{value:.2%}",
    "points": lambda value: f"{100 * value:+.2f}".replace("-", "−"),
    "count": lambda value: "–" if value is None else f"{value:,.0f}",
    "duration": duration,
    "quote": shlex.quote,
    "line_style": line_style,
    "source_hash": _source_hash,
}
