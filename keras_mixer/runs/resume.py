"""Resuming: the progress of a run, and the checkpoint that it continues from.

TensorFlow is not imported.
"""

import dataclasses

from keras_mixer.errors import InputError, RunError
from keras_mixer.log import logger
from keras_mixer.runs.checkpoints import NO_DAMAGE, newest_checkpoint, read_checkpoint
from keras_mixer.runs.run import CHECKPOINTS, HISTORY, read_history, write_history
from keras_mixer.weights import model_folder


@dataclasses.dataclass
class Progress:
    """Progress of a run, saved in every checkpoint.

    Attributes:
        step: Optimizer steps taken.
        rows: One dict per finished epoch, the rows of history.csv.
        best: The row whose weights are in best/; None before the first.
        best_sha256: `model_folder.digest` of those weights; "" before the first.
        run: `Run.identity` of the run.
        seconds: Time spent in the current epoch.
        computed_by: `ComputePlan.describe` of the plan.
    """

    step: int = 0
    rows: list[dict] = dataclasses.field(default_factory=list)
    best: dict | None = None
    best_sha256: str = ""
    run: str = ""
    seconds: float = 0.0
    computed_by: str = ""


def is_over(run, progress):
    """Returns whether a run has no steps left, or was stopped early."""
    if progress.step == run.total_steps:
        return True
    if not run.config.early_stopping or not progress.rows:
        return False
    best = max(range(len(progress.rows)), key=lambda index: quality(progress.rows[index]))
    return len(progress.rows) - 1 - best >= run.config.early_stopping


def epoch_is_open(run, step):
    """Returns whether a run is in the middle of an epoch at a step."""
    return step % run.steps_per_epoch != 0 and step < run.total_steps


def quality(row):
    """Returns the sort key of an epoch: validation accuracy, then loss; None is below any row."""
    return (row["val_accuracy"], -row["val_loss"]) if row else (-1.0, 0.0)


def last_state(run, plan):
    """Returns the `Progress` of a run and the arrays of its newest checkpoint, None before one.

    Process 0 of several finds the checkpoint; the others read the same one. The `ComputePlan` is
    that of the steps that are left.

    Raises:
        RunError: If no checkpoint can be read, or best/ holds weights of another run or epoch.
    """
    if run.group.is_main:
        progress, arrays = _newest_state(run, plan)
        run.group.exchange([dataclasses.asdict(progress), arrays is not None])
        return progress, arrays
    progress, saved = run.group.exchange(None)[0]
    arrays = read_checkpoint(run.checkpoints, progress["step"]) if saved else None
    return Progress(**progress), arrays


def _newest_state(run, plan):
    checkpoint = newest_checkpoint(run.checkpoints, run.identity)
    if checkpoint is None:
        _begin(run)
        return Progress(computed_by=plan.describe(), run=run.identity), None
    progress = Progress(**checkpoint.progress)
    over = is_over(run, progress)
    if progress.best is not None:
        progress.best = _confirm_best(run, progress, over)
    if over:
        write_history(run.directory, progress.rows)
        return progress, checkpoint.arrays
    model_folder.write_spec(run.best, run.spec)
    logger.info(f"continuing {run.directory} at step {progress.step} of {run.total_steps}")
    _compare_plans(progress, plan.describe())
    return progress, checkpoint.arrays


def _begin(run):
    """Makes the folders of a new run; raises an error if it had checkpoints, which are gone."""
    rows = read_history(run.directory) if (run.directory / HISTORY).exists() else []
    done = len(rows) * (run.steps_per_epoch if run.config.save_unit == "step" else 1)
    saved = done > run.config.save_every or run.scores or not run.checkpoints.is_dir()
    if rows and saved:
        raise RunError(
            f"{run.directory} has a history of {len(rows)} epochs but nothing in {CHECKPOINTS}/ to "
            f"continue from; restore it, or start from best/ with --checkpoint={run.directory} and "
            f"another --output_dir, or start over with --overwrite"
        )
    if rows:
        logger.warning(
            f"no checkpoint was saved in {len(rows)} epochs of {run.directory}; they are repeated"
        )
    run.checkpoints.mkdir(exist_ok=True)
    model_folder.write_spec(run.best, run.spec)
    names = ", ".join(run.dataset.class_names[:5])
    more = ", …" if len(run.dataset.class_names) > 5 else ""
    logger.info(
        f"training in {run.directory}: {len(run.dataset.train):,} images of "
        f"{len(run.dataset.class_names)} classes ({names}{more}), "
        f"{run.steps_per_epoch:,} steps an epoch, {run.total_steps:,} steps"
    )


def _compare_plans(progress, now):
    """Warns if another plan computed the run so far, and notes the new one in its progress."""
    if now != (before := progress.computed_by):
        dropout = " and in what dropout zeroes" * (
            now.endswith(", jax") != before.endswith(", jax")
        )
        logger.warning(
            f"computed by {before} until now, by {now} from here on: results may differ from an "
            f"uninterrupted run's in their last bits{dropout}"
        )
        progress.computed_by = now


def _confirm_best(run, progress, over):
    """Returns the history row of the best epoch, or None if best/ will have to be written again.

    A kill between writing best/ and the checkpoint leaves weights of an epoch that will be
    repeated, and the repetition may differ in its last bits.
    """
    try:
        _, metadata = model_folder.read_weights(run.best)
    except InputError as error:
        if over or getattr(error.__cause__, "errno", None) in NO_DAMAGE:
            raise
        logger.warning(f"{error}: replaced by the best epoch from here on")
        return None
    if metadata["sha256"] == progress.best_sha256:
        return progress.best
    repeated = metadata.get("run") == run.identity and metadata["step"] > progress.step
    if repeated and not over:
        return None
    raise RunError(
        f"{run.best} holds other weights than those of epoch {progress.best['epoch']}, which "
        f"{run.directory} saved there; restore them, or train again with --overwrite"
    )
