"""Report: a table of finished runs, mean ± standard deviation over seeds."""

import csv
import dataclasses
import statistics
from pathlib import Path

from keras_mixer.config.training import Config
from keras_mixer.errors import InputError, path_errors
from keras_mixer.training.run import FLAGS, HISTORY, METRICS, read_metrics, read_record

# Flags that tell runs of one experiment apart, or do not touch what comes out.
_KEPT = ("eval_split", "train_split", "validation_split", "test_split")
_ASIDE = {"seed"} | {
    field.name
    for field in dataclasses.fields(Config)
    if not field.metadata["result"] and field.name not in _KEPT
}

_HEADER = (
    "| experiment | runs | validation top-1 | test top-1 | epochs | training time |",
    "|---|---|---|---|---|---|",
)


def tabulate(directories, presets=None):
    """Summarizes runs that differ in nothing but their seed, on the same data, as one row each.

    Args:
        directories: Paths of finished run directories.
        presets: dict from name to set of flags, or None. Where a run has all flags of a preset, a
            few perhaps with other values, the name of the longest such is written in their place,
            and what differs after it.

    Returns:
        A Markdown table, and below it the machines and versions that the runs were made on. Scores
        are percentages, mean ± sample standard deviation; the time is the mean of the steps alone,
        without start-up and validation.

    Raises:
        InputError: If a directory holds no finished run.
    """
    experiments = {}
    for directory in dict.fromkeys(Path(name).resolve() for name in directories):
        run = _read(directory, presets or {})
        experiments.setdefault((run["experiment"], run["data"]), []).append(run)
    rows = [_row(experiment, runs) for (experiment, _), runs in experiments.items()]
    machines = made_on(run["directory"] for runs in experiments.values() for run in runs)
    return "\n".join([*_HEADER, *rows, "", *machines]) + "\n"


def _read(directory, presets):
    with path_errors(directory):
        return _contents(directory, presets)


def _contents(directory, presets):
    record = read_record(directory)
    scores, _ = read_metrics(directory)
    if record is None or not scores:
        raise InputError(f"{directory}: no finished run (it holds no config.json or no {METRICS})")
    with open(directory / HISTORY, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        "experiment": _experiment((directory / FLAGS).read_text().splitlines(), presets),
        "data": record["data"]["identity"],
        "scores": scores,
        "epochs": len(rows),
        "seconds": sum(float(row["seconds"]) for row in rows),
        "directory": directory,
    }


def _experiment(flags, presets):
    """The flags that are not at their default, without those that are set aside."""
    fitting = [name for name, given in presets.items() if _follows(flags, given)]
    if fitting:
        name = max(fitting, key=lambda name: len(presets[name]))
        given = presets[name]
        others = {_data_set(flags)} - {_data_set(given)}
        differing = [flag for flag in flags if flag not in given | {_data_set(flags)}]
        flags = [f"--flagfile={name}", *others, *differing]
    kept = [flag for flag in flags if flag.split("=")[0].removeprefix("--") not in _ASIDE]
    return " ".join(kept) or "the defaults"


def _data_set(flags):
    default = f"--dataset={Config.dataset}"  # which leaves no flag behind
    return next((flag for flag in flags if flag.startswith("--dataset=")), default)


def _follows(flags, preset):
    """Tells whether a run has the flags of a preset, at most a quarter of them of other value."""
    preset = preset - {_data_set(preset)}
    names = {flag.split("=")[0] for flag in flags}
    same = len(preset & set(flags))
    return {flag.split("=")[0] for flag in preset} <= names and 4 * same >= 3 * len(preset)


def made_on(directories):
    """Returns a sentence for every machine, with its versions, that runs were made on.

    Args:
        directories: Paths of run directories.
    """
    machines = (_machine(read_record(directory)["environment"]) for directory in directories)
    return [f"Made on {machine}." for machine in dict.fromkeys(machines)]


def _machine(environment):
    return (
        f"{environment['cpu']}, {environment['cores']} cores, Python {environment['python']}, "
        f"TensorFlow {environment['tensorflow']}, Keras {environment['keras']}"
    )


def _row(experiment, runs):
    scores = [
        spread([100 * run["scores"][split]["top1"] for run in runs if split in run["scores"]])
        for split in ("validation", "test")
    ]
    seconds = statistics.mean(run["seconds"] for run in runs)
    fewest, most = (choose(run["epochs"] for run in runs) for choose in (min, max))
    epochs = fewest if fewest == most else f"{fewest}–{most}"
    cells = [f"`{experiment}`", len(runs), *scores, epochs, f"{seconds:.0f} s"]
    return f"| {' | '.join(map(str, cells))} |"


def spread(values):
    """Returns numbers as text: mean ± sample standard deviation, where there are several.

    Args:
        values: list of floats; for none a dash is returned.
    """
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
