"""The trials of a sweep: what an Optuna study holds of them, as tables and plots."""

import contextlib
import io
import re
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

from keras_mixer.files import rows_as_csv, write_atomically
from keras_mixer.log import logger
from keras_mixer.reports.markdown import spread, table
from keras_mixer.reports.report import SWEEP_PLOTS as PLOTS
from keras_mixer.reports.report import made_on
from keras_mixer.runs.run import HISTORY, Run, read_history, read_metrics
from keras_mixer.studies.space import shown_setting

INDEX = "index"  # user attribute of a trial: its place in the queue
LEFT = "left"  # user attribute of a trial: it was not tried, or not to its end
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


def tried(search, study, folder):
    """Returns a list of `Trial`, one per setting, the best one first; of equal ones, as queued."""
    found, queued = {}, study.get_trials(deepcopy=False)
    for trial in sorted(filter(counts, queued), key=lambda t: t.user_attrs.get(INDEX, len(queued))):
        if trial.state.name in _STATES and trial.params.keys() == search.space.keys():
            one = _trial(trial, search, folder)
            found.setdefault(one.folder, one)
    return sorted(found.values(), key=lambda t: -1 if t.top1 is None else t.top1, reverse=True)


def counts(trial):
    """Returns whether a trial is the one of its place in the queue: not one to be tried again."""
    gone = trial.state.name == "FAIL" and "error" not in trial.user_attrs  # with its process
    return trial.state.name != "WAITING" and not gone and LEFT not in trial.user_attrs


def _trial(trial, search, folder):
    values = shown_setting(search.space, trial.params)
    state, error = _STATES[trial.state.name], trial.user_attrs.get("error", "")
    top1 = trial.value if state == "complete" else None
    return Trial(values, state, top1, folder_of(folder, values), error)


def folder_of(folder, setting):
    """Returns the folder of a setting's runs, the same whoever trains it."""
    name = ",".join(f"{name}={value}" for name, value in setting.items())
    return folder / re.sub(r"[^\w.,=+-]", "_", name)


def text_of(setting):
    """Returns a setting in words, for the terminal."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


# === Tables ===


def as_table(result, search):
    """Returns a Markdown table of the settings, the best one first, and the scores of that one."""
    columns = [*search.space, "validation top-1", "epochs", "training time", "state"]
    runs = [path for trial in result.trials for path in runs_of(trial, search)]
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
    runs = runs_of(trial, search)
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
    """Returns lines on the scores of the best setting; none without runs of it."""
    if not result.runs:
        return []
    split = result.runs[0].config.eval_split
    top1 = [100 * run.scores[split]["top1"] for run in result.runs]
    images, seeds = len(result.runs[0].dataset.split(split)), _over(len(result.runs))
    return [
        f"**The best by validation, {text_of(result.trials[0].setting)}: {spread(top1)}% of "
        f"{images:,} {split} images, {seeds}.**\n"
    ]


def runs_of(trial, search):
    """Returns the paths of a trial's run directories that have a history."""
    runs = [trial.folder / f"seed-{seed}" for seed in search.seeds]
    there = [run for run in runs if (run / HISTORY).exists()]
    if trial.state == "complete" and len(there) < len(runs):
        logger.warning(f"{trial.folder}: runs are missing there; the table is without them")
    return there


def as_csv(result, search):
    """Returns a CSV table with a row for each epoch of each run, as text."""
    scored = [run.directory for run in result.runs]
    runs = [(trial, run) for trial in result.trials for run in runs_of(trial, search)]
    runs += [(result.trials[0], run) for run in scored if run not in dict(map(reversed, runs))]
    rows = [
        {"run": str(run), "seed": run.name.removeprefix("seed-"), **trial.setting, **_epoch(row)}
        for trial, run in runs
        for row in read_history(run)
    ]
    return rows_as_csv(rows, ["run"])


def _epoch(row):
    """Returns a row of history.csv, in which `lr` is the rate at the end of the epoch."""
    return {"current_lr" if name == "lr" else name: value for name, value in row.items()}


# === Plots ===

_FOLDER = "plots"  # in the folder of the sweep


def draw(study, folder):
    """Draws Optuna's plots of a study as SVG files; those that need more trials are left out.

    Args:
        study: Optuna study.
        folder: `Path` of the sweep.
    """
    import matplotlib

    folder = folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_optuna(), matplotlib.rc_context({"backend": "agg", "svg.hashsalt": "sweep"}):
        for name in PLOTS:
            try:
                warnings.simplefilter("ignore", UserWarning)  # values that are all the same
                _draw(study, name, folder / f"{name}.svg")
            except (RuntimeError, ValueError) as error:
                logger.info(f"{name} is not drawn: {error}")


def _draw(study, name, path):
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as plots

    axes = getattr(plots, f"plot_{name}")(study, target_name="validation top-1")
    figure = getattr(axes, "figure", None) or plt.gcf()
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close("all")
    write_atomically(path, picture.getvalue())


@contextlib.contextmanager
def quiet_optuna():
    """Hides Optuna's own messages and its warnings that heartbeats are experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
