"""Trials of a sweep: the settings that an Optuna study holds, as tables and plots."""

import io
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

from keras_mixer.errors import path_errors
from keras_mixer.files import rows_as_csv, write_atomically
from keras_mixer.log import logger
from keras_mixer.reports.markdown import spread, table
from keras_mixer.reports.report import made_on
from keras_mixer.runs.run import HISTORY, Run, read_history, read_metrics
from keras_mixer.studies.space import (
    describe_setting,
    format_setting,
    quiet_optuna,
    setting_folder,
)

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


class Trial(NamedTuple):
    """A setting that was tried.

    Attributes:
        setting: dict from option to string.
        state: string: `complete`, `pruned` or `failed`.
        top1: Mean validation top-1 over the seeds; None if it is not complete.
        folder: `Path` of its runs.
        error: string. Why it failed.
    """

    setting: dict
    state: str
    top1: float | None
    folder: Path
    error: str = ""


class Result(NamedTuple):
    """Outcome of a sweep.

    Attributes:
        trials: list of `Trial`, the best one first.
        runs: list of `Run` of the best one, scored on the test images; empty if not asked for.
    """

    trials: list[Trial]
    runs: list[Run]


def list_trials(search, study, folder):
    """Returns a list of `Trial`, one per setting, the best first; ties in the order of the search.

    Settings that wait, are being trained, or were interrupted are left out.
    """
    trials = {}
    for trial in filter(counts, study.get_trials(deepcopy=False)):
        if trial.state.name in _STATES:
            found = _read_trial(trial, search, folder)
            trials.setdefault(found.folder, found)
    settings = search.settings if search.sampler != "tpe" else []
    folders = [setting_folder(folder, format_setting(search.space, s)) for s in settings]
    order = {path: position for position, path in enumerate(folders)}
    in_order = sorted(trials.values(), key=lambda trial: order.get(trial.folder, len(order)))
    return sorted(in_order, key=lambda t: -1 if t.top1 is None else t.top1, reverse=True)


def counts(trial):
    """Returns whether a trial of Optuna counts: not if it was interrupted, and so queued again."""
    return trial.state.name != "FAIL" or "error" in trial.user_attrs


def _read_trial(trial, search, folder):
    setting = format_setting(search.space, trial.params)
    state, error = _STATES[trial.state.name], trial.user_attrs.get("error", "")
    top1 = trial.value if state == "complete" else None
    return Trial(setting, state, top1, setting_folder(folder, setting), error)


# === Tables ===


def as_table(result, search):
    """Returns a Markdown table of the settings, the best one first, and the scores of that one."""
    columns = [*search.space, "validation top-1", "epochs", "training time", "state"]
    runs = [path for trial in result.trials for path in run_directories(trial, search)]
    return "\n".join(
        [
            *table(columns, (_row(trial, search) for trial in result.trials)),
            "",
            f"Validation top-1 in percent, {_over(len(search.seeds))}, of the epoch "
            f"that is best by it{_SO_FAR * any(t.state == 'pruned' for t in result.trials)}; "
            f"settings are compared by it alone.{_ties(result.trials)}",
            "",
            *_scored(result),
            *(f"{sentence}\n" for sentence in made_on(runs)),
        ]
    )


_SO_FAR = " (of a pruned setting, up to then)"


def _ties(trials):
    """Returns a sentence if several settings are the best."""
    best = sum(trial.top1 == trials[0].top1 for trial in trials)
    return f" {best} are the best; the first of them in the search is taken." if best > 1 else ""


def _over(seeds):
    return "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"


def _row(trial, search):
    """Returns the cells of a setting: mean ± standard deviation over its seeds."""
    runs = run_directories(trial, search)
    histories = [read_history(run) for run in runs]
    seconds = [sum(float(row["seconds"]) for row in rows) for rows in histories]
    if trial.state == "complete":
        top1 = [read_metrics(run)[0]["validation"]["top1"] for run in runs]
    else:
        top1 = [max(float(row["val_accuracy"]) for row in rows) for rows in histories if rows]
    return [
        *trial.setting.values(),
        spread([100 * value for value in top1]),
        max(map(len, histories), default=0),
        f"{statistics.mean(seconds):.0f} s" if seconds else "–",
        f"{trial.state}: {trial.error}" if trial.error else trial.state,
    ]


def _scored(result):
    """Yields a line on the scores of the best setting, if it was scored."""
    if result.runs:
        best, split = result.trials[0].setting, result.runs[0].config.eval_split
        top1 = [100 * run.scores[split]["top1"] for run in result.runs]
        images, seeds = len(result.runs[0].dataset.split(split)), _over(len(result.runs))
        yield (
            f"**The best by validation, {describe_setting(best)}: {spread(top1)}% of {images:,} "
            f"{split} images, {seeds}.**\n"
        )


def run_directories(trial, search):
    """Returns the run directories of a trial that have a history."""
    runs = [trial.folder / f"seed-{seed}" for seed in search.seeds]
    there = [run for run in runs if (run / HISTORY).exists()]
    if trial.state == "complete" and len(there) < len(runs):
        logger.warning(f"{trial.folder}: runs are missing; the table leaves them out")
    return there


def as_csv(result, search):
    """Returns a CSV table with a row for each epoch of each run, as text."""
    trial_of = {path: trial for trial in result.trials for path in run_directories(trial, search)}
    trial_of |= {run.directory: result.trials[0] for run in result.runs}
    rows = []
    for path, trial in trial_of.items():
        start = {"run": str(path), "seed": path.name.removeprefix("seed-"), **trial.setting}
        for epoch in read_history(path):  # a setting may have an lr, too
            rows.append(start | {"current_lr" if n == "lr" else n: v for n, v in epoch.items()})
    return rows_as_csv(rows, ["run"])


# === Plots ===

PLOTS = {
    "optimization_history": "Validation top-1 of each setting in the order of trials, and the best",
    "param_importances": "Share of the variance of validation top-1 that each option explains",
    "parallel_coordinate": "A line for each setting through its values and its validation top-1",
    "slice": "Validation top-1 by the values of each option",
}
_FOLDER = "plots"  # in the folder of the sweep


def draw_plots(study, folder):
    """Writes Optuna's plots of a study as SVG files; those that need more trials are left out."""
    import matplotlib

    folder = folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_optuna(), matplotlib.rc_context({"backend": "agg", "svg.hashsalt": "sweep"}):
        for name in PLOTS:
            try:
                warnings.simplefilter("ignore", UserWarning)  # values that are all the same
                _write_plot(study, name, folder / f"{name}.svg")
            except (RuntimeError, ValueError) as error:
                logger.info(f"no plot of {name}: {error}")


def _write_plot(study, name, path):
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as plots

    axes = getattr(plots, f"plot_{name}")(study, target_name="validation top-1")
    figure = getattr(axes, "figure", None) or plt.gcf()
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close("all")
    write_atomically(path, picture.getvalue())


def drawn_plots(folder):
    """Returns a list of (SVG file as bytes, description) of the plots in the folder of a sweep."""
    with path_errors(folder):
        paths = {Path(folder) / _FOLDER / f"{name}.svg": text for name, text in PLOTS.items()}
        return [(path.read_bytes(), text) for path, text in paths.items() if path.is_file()]
