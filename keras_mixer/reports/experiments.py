"""Finished runs, and experiments: groups of runs that differ only in their seed."""

import collections
import dataclasses
import itertools
import math
from pathlib import Path
from typing import NamedTuple

from keras_mixer.config.command_line import parse
from keras_mixer.config.options import as_flags, format_value
from keras_mixer.config.training import Config
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import listed
from keras_mixer.log import logger, printable
from keras_mixer.model.architecture import MIXER_FIELDS
from keras_mixer.model.variants import MIXER
from keras_mixer.runs.run import (
    CONFIG,
    FLAGS,
    HISTORY,
    METRICS,
    describe_scores,
    read_history,
    read_metrics,
    read_record,
)

SCORED = ("validation", "test")  # splits that reports compare

# Options in which the runs of one experiment may differ: the seed, and those without effect on the
# result, but for the names of splits.
_KEPT = ("train_split", "validation_split", "test_split")
_IGNORED = {"seed"} | {
    field.name
    for field in dataclasses.fields(Config)
    if not field.metadata["result"] and field.name not in _KEPT
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


class FinishedRun(NamedTuple):
    """A finished run, as its files describe it.

    Attributes:
        directory: `Path`.
        config: dict of the resolved `Config`.
        preset: Name of the preset; None without one, and for runs of earlier versions.
        flags: list of strings, the lines of flags.txt: flags that are not at their default.
        images: dict from split to number of images.
        identity: Identity of the data.
        scores: dict by split, from metrics.json.
        history: list of dicts of strings, from history.csv.
        seconds: float, of all training steps.
    """

    directory: Path
    config: dict
    preset: str | None
    flags: list
    images: dict
    identity: str
    scores: dict
    history: list
    seconds: float

    @property
    def name(self):
        """Name of the experiment: its preset and the flags that differ from it, as text."""
        given, base = _by_name(self.flags), _preset_flags(self.preset)
        at_default = {
            name: f"--{name}={format_value(_DEFAULTS[name])}"
            for name in base
            if name not in given and _DEFAULTS[name] is not None
        }
        differing = [
            flag
            for name, flag in (at_default | given).items()
            if flag != base.get(name) and name not in _IGNORED
        ]
        return " ".join([f"--preset={self.preset}"] * bool(base) + differing) or "the defaults"

    @property
    def data(self):
        """Name of the dataset and the number of images in each split, as text."""
        name, folder = self.config["dataset"], self.config["data_dir"]
        if folder and name in ("folder", "csv"):
            name = printable(Path(folder).name)
        counts = [f"{self.images[split]:,}" for split in SPLITS if split in self.images]
        return f"{name}: {', '.join(counts)}"

    def column(self, name):
        """Values of a column of history.csv, a list of floats; NaN for an empty one."""
        return [float(row.get(name) or "nan") for row in self.history]


def _by_name(flags):
    return {flag.split("=")[0].removeprefix("--"): flag for flag in flags}


def _preset_flags(preset):
    """Returns a preset's flags by name; empty for None and for one that this version lacks."""
    try:
        config = parse(Config, [f"--preset={preset}"])[0] if preset else Config()
    except InputError:
        return {}
    return _by_name(as_flags(config))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Finished runs that differ only in their seed.

    Attributes:
        number: int, from 1.
        name: Their preset and flags, see `FinishedRun.name`.
        runs: list of `FinishedRun`.
        shared: Words that the names of all experiments have.
    """

    number: int
    name: str
    runs: list
    shared: tuple

    @property
    def label(self):
        """Words of the name that not all experiments share, a list."""
        words = [word for word in self.name.split(" ") if word not in self.shared]
        return words or ["common flags only"]

    def top1(self, split):
        """Top-1 accuracies on a split, a list of fractions."""
        return [run.scores[split]["top1"] for run in self.runs if split in run.scores]


def read_experiments(directories):
    """Reads finished runs and groups them: those that differ only in their seed are one experiment.

    Args:
        directories: Paths of run directories, and of folders of sweeps, which stand for their runs.

    Returns:
        list of `Experiment`.

    Raises:
        InputError: If no directory holds a finished run. Each that does not is left out, with a
            warning.
    """
    groups = {}
    for directory in dict.fromkeys(itertools.chain(*map(_run_directories, directories))):
        try:
            with path_errors(directory):
                run = _read_finished(directory)
            key = run.name, run.identity, *sorted(run.scores)
            groups.setdefault(key, []).append(run)
        except InputError as error:
            logger.warning(f"{directory}: left out: {error}")
    if not groups:
        raise InputError("none of the directories holds a finished run")
    words = [name.split(" ") for name, *_ in groups]
    shared = tuple(w for w in words[0] if all(w in own for own in words)) if len(words) > 1 else ()
    for runs in groups.values():
        _warn_about_repeated_seeds(runs)
    return [
        Experiment(number, name, runs, shared)
        for number, ((name, *_), runs) in enumerate(groups.items(), 1)
    ]


def _run_directories(path):
    """Returns the resolved paths of the run directories that a path stands for."""
    path = Path(path).resolve()
    with path_errors(path):
        trials = [] if (path / CONFIG).exists() else listed(path)
        runs = [run for trial in trials for run in listed(trial, "seed-*")]
        return [run for run in runs if (run / CONFIG).exists()] or [path]


def _read_finished(directory):
    """Returns the `FinishedRun` in a directory.

    Raises:
        InputError: If the run is unfinished or damaged.
    """
    record, (scores, _) = read_record(directory), read_metrics(directory)
    found = {CONFIG: record, METRICS: scores}
    found |= {name: (directory / name).exists() for name in (HISTORY, FLAGS)}
    if missing := [name for name in found if not found[name]]:
        raise InputError(f"no finished run (it holds no {missing[0]})")
    # Names of folders need not be UTF-8.
    flags = (directory / FLAGS).read_text("utf-8", "backslashreplace").splitlines()
    history = read_history(directory)
    try:
        numbers = [{name: float(row[name] or "nan") for name in row} for row in history]
        seconds = sum(row["seconds"] for row in numbers)
        if not math.isfinite(seconds):
            raise ValueError("an epoch without its time")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / HISTORY}: damaged") from error
    try:
        data = record["data"]["images"], record["data"]["identity"]
        config, preset = record["config"], record.get("preset")
        run = FinishedRun(directory, config, preset, flags, *data, scores, history, seconds)
        hash((run.name, run.data, run.identity, config.get("seed")))
        sum(score["top1"] + score.get("n", 0) for score in scores.values())
        describe_machine(record["environment"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{CONFIG} or {METRICS} holds other values than those of a run ({error!r})"
        ) from error
    return run


def describe_machine(environment):
    """Returns a sentence on a machine and its versions; see `environment.environment`."""
    cores = environment["cores"]
    return (
        f"Made on {environment['cpu']}, {cores} core{'' if str(cores) == '1' else 's'}, Python "
        f"{environment['python']}, TensorFlow {environment['tensorflow']}, Keras "
        f"{environment['keras']}."
    )


def _warn_about_repeated_seeds(runs):
    seeds = collections.Counter(run.config.get("seed") for run in runs)
    for seed, count in seeds.items():
        if count > 1:
            logger.warning(f"{count} runs of {runs[0].name} have the same seed, {seed}")


def provenance_of(source):
    """Returns how a run was trained, and its scores, as text; empty for any other source."""
    with path_errors(source):
        if not (Path(source) / CONFIG).exists() or not read_metrics(source)[0]:
            return ""
    run = _read_finished(Path(source))
    return (
        f"trained by {run.name} on {run.data} images (training, validation, test); "
        f"{describe_scores(run.scores)}"
    )


def differences(experiments):
    """Returns a list of (option, its value in each experiment) for the options that differ.

    Options without effect on the result are left out.
    """
    configs = [experiment.runs[0].config for experiment in experiments]
    names = [name for name in dict.fromkeys(itertools.chain(*configs)) if name not in _IGNORED]
    rows = [(name, [_format_option(config, name) for config in configs]) for name in names]
    return [(name, row) for name, row in rows if len(set(row)) > 1]


def _format_option(config, name):
    """Returns an option as text; a dash for one that a baseline has no use for."""
    value = config.get(name)
    if name == "permutation" and value == "none":  # runs of earlier versions have this option
        return "–"
    if value is None or (name in MIXER_FIELDS and config.get("model", MIXER) != MIXER):
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return format_value(tuple(value) if isinstance(value, list) else value)
