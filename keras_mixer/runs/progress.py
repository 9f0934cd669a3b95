"""Progress of a run: steps taken, history, best epoch, early stopping."""

import dataclasses


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
        computed_by: Devices, and whether XLA is used; only the same give exactly equal results.
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
    best = max(range(len(progress.rows)), key=lambda index: rank(progress.rows[index]))
    return len(progress.rows) - 1 - best >= run.config.early_stopping


def epoch_is_open(run, step):
    """Returns whether a run is in the middle of an epoch at a step."""
    return step % run.steps_per_epoch != 0 and step < run.total_steps


def rank(row):
    """Returns a sort key: validation accuracy, then validation loss; None ranks below any row."""
    return (row["val_accuracy"], -row["val_loss"]) if row else (-1.0, 0.0)
