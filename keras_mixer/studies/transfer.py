"""Transfer: checkpoints fine-tuned on several datasets, by the paper's protocol (section 3).

For each dataset, the learning rate is chosen on held-out training images. Then the model is trained
on all training images, once per seed, and scored once on the test images. Those runs hold out no
images and keep their last weights, so the learning rates are compared by last weights, too.
"""

import dataclasses
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from keras_mixer.config.options import format_value
from keras_mixer.config.training import OF_CHECKPOINTS, Config
from keras_mixer.data.datasets import AVG5
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.jobs import JobSequence
from keras_mixer.reports.markdown import spread, table
from keras_mixer.reports.report import made_on
from keras_mixer.runs.open_run import plan_run
from keras_mixer.runs.run import Run, read_history

FINE_TUNED, SCRATCH = "fine-tuned", "from scratch"


class Result(NamedTuple):
    """Runs on one dataset from one start.

    Attributes:
        name: Name of the dataset's preset.
        start: `FINE_TUNED`, the checkpoint if there are several, or begins with `SCRATCH`.
        choice: dict from learning rate to validation accuracy; {} if only one was given.
        lr: float. The learning rate of the runs.
        runs: list of `Run`, one per seed, scored on their `eval_split`.
    """

    name: str
    start: str
    choice: dict[float, float]
    lr: float
    runs: list[Run]

    def scores(self, metric):
        """Returns a list of the runs' `"top1"` or `"top5"`, in percent."""
        return [100 * run.scores[run.config.eval_split][metric] for run in self.runs]


def study_transfer(tuned, lrs, seeds, output_dir, scratch=False):
    """Fine-tunes on several datasets, and returns a list of `Result`; skips finished runs.

    Args:
        tuned: dict from (name of a dataset's preset, name of a start) to `Config` with the
            checkpoint to start from.
        lrs: Learning rates to choose from, on the validation split with the first seed.
        seeds: Seeds of the runs that are scored: on the test split, or validation without one.
        output_dir: Folder for the run directories.
        scratch: bool. Also train models of the same sizes from scratch, once for each dataset and
            architecture, with the same schedule and a learning rate chosen in the same way.

    Raises:
        InputError: If data, checkpoint or a config are not valid; before anything is trained.
        RunError, Interrupted: See `run_job`.
    """
    plans = {arm: plan_run(config) for arm, config in tuned.items()}
    for (name, _), plan in plans.items():
        _check(name, plan.dataset, lrs)
    arms = tuned | (_from_scratch(tuned, plans) if scratch else {})
    choices = len(lrs) if len(lrs) > 1 else 0
    jobs = JobSequence(len(arms) * (choices + len(seeds)))
    return [
        _train_arm(jobs, arm, arms[arm], lrs, seeds, Path(output_dir))
        for dataset in dict.fromkeys(name for name, _ in tuned)
        for arm in arms
        if arm[0] == dataset
    ]


def _from_scratch(tuned, plans):
    """Returns the arms that are trained from scratch: one for each dataset and architecture."""
    plain = {name: getattr(Config, name) for name in OF_CHECKPOINTS}
    found = {}
    for (name, start), config in tuned.items():
        sizes = plans[name, start].config.architecture()
        label = SCRATCH if start == FINE_TUNED else f"{SCRATCH}, as {start}"
        key = name, *map(str, sizes.values())
        found.setdefault(key, ((name, label), dataclasses.replace(config, **plain, **sizes)))
    return dict(found.values())


def _check(name, dataset, lrs):
    dataset.split(dataset.split_to_score())
    if len(lrs) > 1 and dataset.validation is None:
        raise InputError(
            f"{name}: no images are held out to choose one of --lrs={format_value(tuple(lrs))} "
            f"with; give one learning rate, or --validation_fraction in the flagfile"
        )


def _train_arm(jobs, arm, config, lrs, seeds, output_dir):
    """Chooses a learning rate, then trains with every seed; returns a `Result`."""
    name, start = arm
    folder = output_dir / name / re.sub(r"[^\w.,-]+", "-", start)
    config = dataclasses.replace(config, eval_split=None, export=False, overwrite=False)
    whole = dataclasses.replace(config, validation_fraction=0.0)
    choice = {}
    if len(lrs) > 1:
        own_split = open_dataset(**whole.dataset_options()).validation is not None
        config = dataclasses.replace(config, seed=seeds[0], eval_split="validation")
        for lr in lrs:
            directory = str(folder / f"lr-{lr:g}")
            config = dataclasses.replace(config, lr=lr, output_dir=directory)
            run = jobs.run(f"{name}, {start}, lr {lr:g}", config)
            choice[lr] = _validation_accuracy(run, own_split)
    best = max(choice, key=choice.get) if choice else lrs[0]
    runs = []
    for seed in seeds:
        # As in the paper, these runs are trained on the held-out images, too. The rate is in the
        # path, so that a later call may try other rates.
        directory = str(folder / f"lr-{best:g}-seed-{seed}")
        config = dataclasses.replace(whole, lr=best, seed=seed, output_dir=directory)
        runs.append(jobs.run(f"{name}, {start}, lr {best:g}, seed {seed}", config))
    return Result(name, start, choice, best, runs)


def _validation_accuracy(run, own_split):
    """Returns the accuracy on held-out images of the weights that the final runs will keep.

    Those are the weights of the best epoch if the data have a validation split of their own, and
    the last ones otherwise.
    """
    if own_split:
        return run.scores["validation"]["top1"]
    return float(read_history(run.directory)[-1]["val_accuracy"])


_COLUMNS = (
    *("dataset", "start", "images: training, test", "lr", "top-1", "top-5", "published top-1"),
)


def as_table(results, published):
    """Returns a Markdown table of results and published accuracies.

    Args:
        results: list of `Result`.
        published: dict from a start to a dict from the name of a dataset, or `"avg5"`, to
            `registry.Published`.
    """
    rows = [_row(result, published) for result in results]
    for start in dict.fromkeys(result.start for result in results):
        arm = [result for result in results if result.start == start]
        if len(arm) > 1:
            rows.append(_mean_row(arm, published))
    runs = [run for result in results for run in result.runs]
    seeds = len(results[0].runs)
    over = f"{seeds} seeds each, mean ± sample standard deviation" if seeds > 1 else "one seed each"
    return "\n".join(
        [
            *table(_COLUMNS, rows),
            "",
            f"Test accuracies in percent, {over}.",
            "",
            *_without_test(results),
            *_choices(results),
            *_sources(published),
            *(f"{sentence}\n" for sentence in made_on(run.directory for run in runs)),
        ]
    )


def _without_test(results):
    """Yields a line for each dataset whose validation images are scored."""
    for name in dict.fromkeys(r.name for r in results if r.runs[0].config.eval_split != "test"):
        yield f"{name} has no test images: these are accuracies on its validation images, which "
        yield "have also chosen the learning rate and the epoch.\n"


def _row(result, published):
    dataset, scored = result.runs[0].dataset, result.runs[0].config.eval_split
    return [
        result.name,
        result.start,
        f"{len(dataset.train):,}, {len(dataset.split(scored)):,}",
        f"{result.lr:g}",
        spread(result.scores("top1")),
        spread(result.scores("top5")),
        _published(result.runs[0].config.dataset, published.get(result.start, {})),
    ]


def _mean_row(arm, published):
    """Returns the row of the mean over datasets, itself mean ± deviation over the seeds."""
    means = {
        metric: [
            statistics.mean(scores)
            for scores in zip(*(result.scores(metric) for result in arm), strict=True)
        ]
        for metric in ("top1", "top5")
    }
    five = sorted(result.runs[0].config.dataset for result in arm) == sorted(AVG5)
    name = "Avg-5" if five else f"mean of {len(arm)}"
    figure = _published("avg5", published.get(arm[0].start, {})) if five else "–"
    return [name, arm[0].start, "", "", spread(means["top1"]), spread(means["top5"]), figure]


def _published(name, figures):
    return f"{100 * figures[name].top1:.2f}" if name in figures else "–"


def _sources(published):
    """Yields a line for each published accuracy of each start."""
    for start, figures in published.items():
        of = "" if start == FINE_TUNED else f" of {start}"
        for name, figure in figures.items():
            yield f"Published {name}{of}: {figure.source}.\n"


def _choices(results):
    """Yields a line for each learning rate chosen, with the validation accuracies."""
    for result in results:
        if result.choice:
            seen = ", ".join(f"{lr:g}: {100 * top1:.2f}" for lr, top1 in result.choice.items())
            held_out = f"validation top-1 by lr, seed {result.runs[0].config.seed}"
            ends = min(result.choice), max(result.choice)
            equal = list(result.choice.values()).count(result.choice[result.lr]) > 1
            notes = ", the first of the best" * equal
            notes += ", at the end of what was tried" * (result.lr in ends)
            chosen = f"chosen: {result.lr:g}{notes}"
            yield f"{result.name}, {result.start}, {held_out}: {seen}; {chosen}.\n"
