"""Page: finished runs as one HTML file with figures, which needs neither a network nor a script.

The first run of each experiment is examined: its best weights, and what they say of the images of
its `eval_split`. All text goes through Jinja's autoescape, since classes and files have any name.
"""

import base64
import hashlib
import importlib.metadata
import itertools
import math
import os
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from keras_mixer.errors import InputError
from keras_mixer.files import rows_as_csv
from keras_mixer.inference.calibration import wilson_interval
from keras_mixer.jobs import without_retracing_warnings
from keras_mixer.log import duration, logger, one_line
from keras_mixer.reports import figures
from keras_mixer.reports.analysis import compare
from keras_mixer.reports.curves import CURVES, line_of, line_style, number_in
from keras_mixer.reports.examination import Findings, examine
from keras_mixer.reports.page_folder import GENERATOR, INDEX, write_page_folder
from keras_mixer.reports.report import differences, made_on
from keras_mixer.runs.run import BEST
from keras_mixer.weights.model_folder import read_spec

SCORED = ("validation", "test")


class Experiment(NamedTuple):
    """Runs that differ only in their seed.

    Attributes:
        number: int, from 1.
        name: Flags that are not at their default, or their preset.
        runs: list of dicts, see `report.read_experiments`.
        findings: `Findings` on the first run; None if its data or weights are missing.
        shared: Words that the names of all experiments have.
    """

    number: int
    name: str
    runs: list[dict]
    findings: Findings | None
    shared: tuple[str, ...] = ()

    @property
    def label(self):
        """What tells it from the others: a list of the words of its name that not all have."""
        words = [word for word in self.name.split(" ") if word not in self.shared]
        return words or ["nothing else"]

    @property
    def data(self):
        """The dataset and the numbers of its images, as text."""
        return self.runs[0]["data"]

    @property
    def command(self):
        """The command line that repeats the first run, a list of quoted words."""
        return ["keras-mixer", "train", *map(shlex.quote, self.runs[0]["flags"])]

    @property
    def line(self):
        """(index of the color, dashes) of its lines in the curves."""
        return line_style(self.number)


def write_page(folder, experiments, command, plots=()):
    """Writes the page, index.html, and the data of its figures, .csv, to a folder.

    Args:
        folder: Path, see `page_folder.check_page_folder`.
        experiments: dict, see `report.read_experiments`.
        command: Command line that makes the page, for its foot.
        plots: list of (SVG file as bytes, description), on the search of a sweep.
    """
    numbered, shared = enumerate(experiments.items(), 1), _shared([name for name, _ in experiments])
    experiments = [
        Experiment(
            number, name, runs, _examine(runs[0]["directory"], number, len(experiments)), shared
        )
        for number, ((name, _), runs) in numbered
    ]
    files = {
        name: _as_csv(rows)
        for name, rows in itertools.chain(_of_all(experiments), *map(_of_one, experiments))
        if rows
    }
    html = render(experiments, command, files, plots)
    write_page_folder(folder, {INDEX: html.encode(), **files})


def _shared(names):
    """Returns the words, of the first of several names, that all of them have."""
    words = [name.split(" ") for name in names]
    return tuple(w for w in words[0] if all(w in other for other in words)) * (len(names) > 1)


def _examine(directory, number, count):
    """Returns the `Findings` on a run; None, with a warning, without its data or weights."""
    try:
        with without_retracing_warnings():
            return examine(directory, f"examining run {number} of {count}")
    except InputError as error:
        logger.warning(f"{directory}: only its curves and scores are shown: {error}")
        return None


# === Tables ===


def _run_rows(experiments):
    """Returns a dict per run, with its numbers as they are."""
    directories = [str(run["directory"]) for e in experiments for run in e.runs]
    above = os.path.commonpath([os.path.dirname(directory) for directory in directories])
    return [
        {
            "experiment": experiment.number,
            "name": experiment.name,
            "run": os.path.relpath(run["directory"], above),
            "seed": run["record"]["config"].get("seed"),
            **{split: _score(run["scores"].get(split)) for split in SCORED},
            "epochs": run["epochs"],
            "seconds": run["seconds"],
            "images_per_second": _median(run["rows"], "images_per_second"),
            "parameters": _parameters(run["directory"]),
        }
        for experiment in experiments
        for run in experiment.runs
    ]


def _score(scores):
    """Returns (top-1, low, high) with a 95% interval; None without a score."""
    if not scores:
        return None
    count = scores.get("n")
    interval = wilson_interval(round(scores["top1"] * count), count) if count else (None, None)
    return scores["top1"], *interval


def _median(rows, column):
    values = [value for row in rows if math.isfinite(value := number_in(row, column))]
    return statistics.median(values) if values else None


def _parameters(directory):
    try:
        return read_spec(Path(directory) / BEST).architecture.parameters
    except InputError:
        return None


def _comparisons(experiments):
    """Returns a dict per set of images: the `best` experiment and `rows` of (other, Comparison)."""
    groups = {}
    for experiment in experiments:
        if found := experiment.findings:
            groups.setdefault((found.identity, found.split), []).append(experiment)
    return [_comparison(group) for group in groups.values() if len(group) > 1]


def _comparison(group):
    best = max(group, key=lambda experiment: experiment.findings.scores["top1"])
    rows = [
        (other, compare(other.findings.correct, best.findings.correct))
        for other in group
        if other is not best
    ]
    return {"best": best, "rows": rows}


# === Data of the figures, as CSV ===


def _of_all(experiments):
    """Yields (name, rows) of the files on all runs."""
    runs = _run_rows(experiments)
    for row in runs:
        for split in SCORED:
            names = (split, f"{split}_low", f"{split}_high")
            row |= dict(zip(names, row[split] or (None,) * 3, strict=True))
    yield "runs.csv", runs
    places = iter(runs)
    yield (
        "curves.csv",
        [
            {"experiment": experiment.number, "run": place["run"], "seed": place["seed"]}
            | {name: row.get(name) for name in ("epoch", *CURVES)}
            for experiment in experiments
            for run, place in zip(experiment.runs, places, strict=False)
            for row in run["rows"]
        ],
    )
    yield (
        "comparison.csv",
        [
            {"best": group["best"].number, "experiment": other.number, **compared._asdict()}
            for group in _comparisons(experiments)
            for other, compared in group["rows"]
        ],
    )


def _of_one(experiment):
    """Yields (name, rows) of the files on one experiment."""
    if not (found := experiment.findings):
        return
    scores, number = found.scores, experiment.number
    names = [row["name"] for row in scores["classes"]]
    yield f"classes-{number}.csv", scores["classes"]
    yield (
        f"confusion-{number}.csv",
        [
            {"true": name, "predicted": other, "images": count}
            for name, counts in zip(names, scores["confusion"], strict=True)
            for other, count in zip(names, counts, strict=True)
            if count
        ],
    )
    columns = ("confidence", "accuracy", "images")
    yield f"reliability-{number}.csv", [dict(zip(columns, b, strict=True)) for b in found.bins]


def _as_csv(rows):
    return rows_as_csv(
        [{name: _plain(value) for name, value in row.items()} for row in rows]
    ).encode()


def _plain(value):
    """Returns a value; text on one line, with characters that cannot be seen or saved escaped."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return one_line(value)


# === Rendering ===


def render(experiments, command="", files=(), plots=()):
    """Returns the page as a string of HTML.

    Args:
        experiments: list of `Experiment`.
        command: Command line that makes the page.
        files: Names of the .csv files beside it.
        plots: As for `write_page`.
    """
    runs = [run for experiment in experiments for run in experiment.runs]
    template = _environment().get_template("page.html")
    return template.render(
        generator=GENERATOR,
        version=importlib.metadata.version("keras_mixer"),
        command=command,
        files=list(files),
        experiments=experiments,
        data_sets=list(dict.fromkeys(experiment.data for experiment in experiments)),
        machines=made_on(run["directory"] for run in runs),
        differences=differences(experiment.runs[0] for experiment in experiments),
        runs=_run_rows(experiments),
        scored=SCORED,
        curves=_draw_curves(experiments),
        comparisons=_comparisons(experiments),
        plots=list(itertools.starmap(figures.vector_picture, plots)),
        drawn={e.number: _draw_findings(e) for e in experiments if e.findings},
    )


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


def _source_hash(script):
    """Returns the hash by which the page's Content-Security-Policy allows its only script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


_FILTERS = {
    "percent": lambda value: f"{100 * value:.2f}",
    "points": lambda value: f"{100 * value:+.2f}".replace("-", "−"),
    "duration": duration,
    "source_hash": _source_hash,
}


def _draw_curves(experiments):
    """Returns a list of (title, SVG) for the columns of history.csv that have values."""
    drawn = []
    for column, title in CURVES.items():
        lines = [line_of(e.number, e.runs, column) for e in experiments]
        if lines := [line for line in lines if line.epochs]:
            description = f"{title} by epoch; the numbers are in curves.csv"
            name = column.replace("_", "-")
            drawn.append((title, figures.draw_lines(name, description, lines)))
    return drawn


def _draw_findings(experiment):
    """Returns the figures of an experiment, a dict of SVG by name."""
    found, number = experiment.findings, experiment.number
    names = [_plain(row["name"]) for row in found.scores["classes"]]
    beside = f"the numbers are in confusion-{number}.csv"
    return {
        "confusion": figures.draw_confusion(
            f"confusion-{number}", f"Confusion matrix; {beside}", found.scores["confusion"], names
        ),
        "reliability": figures.draw_reliability(
            f"reliability-{number}",
            f"Accuracy and number of images by confidence; the numbers are in "
            f"reliability-{number}.csv",
            found.bins,
        ),
    }
