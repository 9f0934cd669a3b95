"""How far a run has come, which epoch is its best, and whether it is over."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """Progress of a run: what a checkpoint holds besides arrays.

    Attributes:
        step: Optimizer steps taken.
        rows: One dict per finished epoch, the rows of history.csv.
        best: The row whose weights are in best/; None before the first.
        seconds: Time spent in the current epoch.
        computed_by: The devices, and whether with XLA; exactness holds for one of these.
    """

    step: int = 0
    rows: list[dict] = dataclasses.field(default_factory=list)
    best: dict | None = None
    seconds: float = 0.0
    computed_by: str = ""


def is_over(run, progress):
    """Tells whether a run has no steps left, or was stopped early."""
    if progress.step == run.total_steps:
        return True
    if not run.config.early_stopping or not progress.rows:
        return False
    best = max(range(len(progress.rows)), key=lambda index: rank(progress.rows[index]))
    return len(progress.rows) - 1 - best >= run.config.early_stopping


def epoch_is_open(run, step):
    """Tells whether a run is in the middle of an epoch after so many steps."""
    return step % run.steps_per_epoch != 0 and step < run.total_steps


def rank(row):
    """Orders rows by validation accuracy, then by validation loss; no row comes before any."""
    return (row["val_accuracy"], -row["val_loss"]) if row else (-1.0, 0.0)
