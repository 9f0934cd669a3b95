"""Report: a Markdown table of finished runs, mean ± standard deviation over seeds."""

import dataclasses
import itertools
import statistics
from pathlib import Path

from keras_mixer.config.options import format_value
from keras_mixer.config.training import Config
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import logger, printable
from keras_mixer.model.architecture import MIXER_FIELDS
from keras_mixer.model.variants import MIXER
from keras_mixer.reports.markdown import code, spread, table
from keras_mixer.runs.run import (
    CONFIG,
    FLAGS,
    HISTORY,
    METRICS,
    read_history,
    read_metrics,
    read_record,
)

# Flags that runs of one experiment may differ in: the seed, and most that do not change the result.
_KEPT = ("train_split", "validation_split", "test_split")
_IGNORED = {"seed", "permutation"} | {  # permutation: in runs of earlier versions
    field.name
    for field in dataclasses.fields(Config)
    if not field.metadata["result"] and field.name not in _KEPT
}

_COLUMNS = (
    *("experiment", "data: training, validation, test images", "runs", "validation top-1"),
    *("test top-1", "epochs", "training time"),
)

_LEGEND = (
    "Accuracy in percent, mean ± sample standard deviation over the runs, which differ in their "
    "seed; training time is the median."
)


def read_experiments(directories, presets=None):
    """Reads finished runs; those that differ only in their seed are one experiment.

    Args:
        directories: Paths of run directories, and of folders of sweeps, which stand for their runs.
        presets: dict from the flag that names a preset to the set of its flags, or None. A run that
            has all flags of a preset, at most a quarter of them with other values, is shown as the
            longest such preset and the flags that differ.

    Returns:
        dict from (experiment, identity of the data and names of the splits that are scored) to a
        list of runs, each a dict of `directory`, `experiment`, `identity`, `data` (name and numbers
        of images, as text), `scores` by split, `epochs`, `seconds` of training steps, `flags`,
        `record` (config.json) and `rows` of its history.

    Raises:
        InputError: If no directory holds a finished run; prints those that do not.
    """
    experiments = {}
    for directory in dict.fromkeys(itertools.chain(*map(_runs_at, directories))):
        if run := _read(directory, presets or {}):
            same = run["identity"], *sorted(run["scores"])
            experiments.setdefault((run["experiment"], same), []).append(run)
    if not experiments:
        raise InputError("none of the directories holds a finished run")
    for runs in experiments.values():
        _note_repeated_seeds(runs)
    return experiments


def _note_repeated_seeds(runs):
    of_seed = {}
    for run in runs:
        of_seed.setdefault(run["record"]["config"].get("seed"), []).append(str(run["directory"]))
    for seed, directories in of_seed.items():
        if len(directories) > 1:
            logger.warning(
                f"the same experiment with the same seed {seed}: {', '.join(directories)}"
            )


def _runs_at(path):
    """Returns the resolved paths of run directories that a path stands for."""
    path = Path(path).resolve()
    with path_errors(path):
        of_sweep = [] if (path / CONFIG).exists() else sorted(path.glob(f"*/seed-*/{CONFIG}"))
    return [config.parent for config in of_sweep] or [path]


def as_table(experiments):
    """Returns a Markdown table with a row for each of `read_experiments`'s experiments.

    Scores are percentages, mean ± sample standard deviation; the time is the median of that of the
    training steps, without start-up and validation. Below the table are the machines and versions.
    """
    rows = (_row(experiment, runs) for (experiment, _), runs in experiments.items())
    machines = made_on(run["directory"] for runs in experiments.values() for run in runs)
    return "\n".join([*table(_COLUMNS, rows), "", _LEGEND, "", *machines]) + "\n"


def _read(directory, presets):
    """Returns what is reported of a run; None, with a warning, if it is unfinished or damaged."""
    try:
        return _read_finished(directory, presets)
    except InputError as error:
        logger.warning(f"{directory}: left out: {error}")
        return None


def _read_finished(directory, presets):
    with path_errors(directory):
        record, (scores, _) = read_record(directory), read_metrics(directory)
        found = {CONFIG: record, METRICS: scores}
        found |= {name: (directory / name).exists() for name in (HISTORY, FLAGS)}
        if missing := [name for name in found if not found[name]]:
            raise InputError(f"no finished run (it holds no {missing[0]})")
        # Names of folders need not be UTF-8.
        flags = (directory / FLAGS).read_text("utf-8", "backslashreplace").splitlines()
    rows = read_history(directory)
    return {
        "experiment": _experiment(flags, presets),
        "identity": record["data"]["identity"],
        "data": _data(record),
        "scores": scores,
        "epochs": len(rows),
        "seconds": _seconds(directory, rows),
        "directory": directory,
        "flags": flags,
        "record": record,
        "rows": rows,
    }


def _seconds(directory, rows):
    """Returns the seconds of all training steps, by history.csv."""
    try:
        return sum(float(row["seconds"]) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / HISTORY}: damaged") from error


def settings(run):
    """Returns the options of a run of `read_experiments` that may change its result, as a dict."""
    config = run["record"]["config"]
    return {name: value for name, value in config.items() if name not in _IGNORED}


def differences(runs):
    """Returns a list of (option, its value in each run) for options in which runs differ."""
    values = list(map(settings, runs))
    rows = (
        (name, [_shown(None if _has_no(own, name) else own.get(name)) for own in values])
        for name in dict.fromkeys(itertools.chain(*values))
    )
    return [(name, row) for name, row in rows if len(set(row)) > 1]


def _has_no(own, name):
    """Returns whether a run's model is a baseline, which the option would not change."""
    return name in MIXER_FIELDS and own.get("model", MIXER) != MIXER


def _shown(value):
    if isinstance(value, float):
        return f"{value:g}"
    return (
        "–" if value is None else format_value(tuple(value) if isinstance(value, list) else value)
    )


def _data(record):
    """Returns the name of a run's dataset and the numbers of its images, as text."""
    config, images = record["config"], record["data"]["images"]
    name = config["dataset"]
    if config["data_dir"] and name in ("folder", "csv"):
        name = printable(Path(config["data_dir"]).name)
    return f"{name}: {', '.join(f'{images[split]:,}' for split in SPLITS if split in images)}"


def _experiment(flags, presets):
    """Returns the flags that are not at their default as text, without those in `_IGNORED`."""
    fitting = [name for name, given in presets.items() if _follows(flags, given)]
    if fitting:
        name = max(fitting, key=lambda name: len(presets[name]))
        given = presets[name]
        others = {_data_set(flags)} - {_data_set(given)}
        differing = [flag for flag in flags if flag not in given | {_data_set(flags)}]
        flags = [name, *others, *differing]
    kept = [flag for flag in flags if flag.split("=")[0].removeprefix("--") not in _IGNORED]
    return " ".join(kept) or "the defaults"


def _data_set(flags):
    default = f"--dataset={Config.dataset}"  # not written in flags.txt
    return next((flag for flag in flags if flag.startswith("--dataset=")), default)


def _follows(flags, preset):
    """Returns whether a run has a preset's flags, at most a quarter of them with other values."""
    preset = preset - {_data_set(preset)}
    names = {flag.split("=")[0] for flag in flags}
    same = len(preset & set(flags))
    return {flag.split("=")[0] for flag in preset} <= names and 4 * same >= 3 * len(preset)


def made_on(directories):
    """Returns a list of sentences on the machines and versions that run directories come from."""
    machines = (describe_machine(read_record(path)["environment"]) for path in directories)
    return list(dict.fromkeys(machines))


def describe_machine(environment):
    """Returns a sentence on a machine and its versions; see `environment.environment`."""
    cores = environment["cores"]
    return (
        f"Made on {environment['cpu']}, {cores} core{'' if str(cores) == '1' else 's'}, Python "
        f"{environment['python']}, TensorFlow {environment['tensorflow']}, Keras "
        f"{environment['keras']}."
    )


def _row(experiment, runs):
    scores = [
        spread([100 * run["scores"][split]["top1"] for run in runs if split in run["scores"]])
        for split in ("validation", "test")
    ]
    seconds = statistics.median(run["seconds"] for run in runs)
    fewest, most = (choose(run["epochs"] for run in runs) for choose in (min, max))
    epochs = fewest if fewest == most else f"{fewest}–{most}"
    return code(experiment), runs[0]["data"], len(runs), *scores, epochs, f"{seconds:.0f} s"
