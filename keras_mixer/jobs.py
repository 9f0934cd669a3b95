"""The whole job of a config: train, evaluate once, export.

`train.py`, the studies and notebooks call `run_job`.
"""

import contextlib
import logging
import statistics
import time

from keras_mixer import console
from keras_mixer.training.open_run import open_run


def run_job(config):
    """Trains as a config says, evaluates the test set once, and exports a SavedModel.

    Called again with the same config it continues where it was stopped; a finished job is left as
    it is.

    Args:
        config: `keras_mixer.Config`.

    Returns:
        The `Run`; its `scores` and `facts` are those of metrics.json.

    Raises:
        InputError: If the config, the data or the directory forbid it.
        RunError: If the run cannot go on, such as when the loss is not finite.
        Interrupted: If a signal stopped the run, after its state was saved.
    """
    with open_run(config) as run:
        if run.finished:
            console.say(f"{run.directory} is complete; nothing was changed")
        else:
            _train_evaluate_export(run)
    return run


def _train_evaluate_export(run):
    with console.quiet_tensorflow():  # which starts here, when nothing is left to be refused
        from keras_mixer.inference.evaluate import score_run
        from keras_mixer.inference.export import export_model
        from keras_mixer.training.fit import fit_run

    fit_run(run)
    score_run(run)
    if run.config.export and "saved_model" not in run.facts:
        target = export_model(run.best, run.config.export_dir, run.config.name)
        run.write_metrics(saved_model=str(target))


class JobSequence:
    """Runs many jobs, one after the other, and prints how far it has come.

    Every job has a run directory of its own, so the same sequence given again finds what is done.

    Args:
        total: int. How many jobs there will be.
    """

    def __init__(self, total):
        self.total = total
        self._begun = 0
        self._durations = []  # in seconds, of the jobs that were not finished before

    def run(self, name, config):
        """Runs a job, unless it is finished.

        Args:
            name: What the job is called on the terminal.
            config: `Config`, whose output_dir is the job's own.

        Returns:
            The `Run`.

        Raises:
            InputError, RunError, Interrupted: As `run_job` does.
        """
        self._begun += 1
        with open_run(config) as run:
            if not run.finished:
                console.say(f"[{self._begun}/{self.total}] {name}{self._time_left()}")
                start = time.monotonic()
                with _without_retracing_warnings():
                    _train_evaluate_export(run)
                self._durations.append(time.monotonic() - start)
                _clear_session()
        return run

    def _time_left(self):
        if not self._durations:
            return ""
        left = statistics.mean(self._durations) * (self.total - self._begun + 1)
        return f", about {max(1, round(left / 60))} min left if all take as long"


def _clear_session():
    """Frees the models of a job, which Keras keeps in memory as long as the process runs."""
    from keras.backend import clear_session  # imported with TensorFlow, when a job begins

    clear_session()


@contextlib.contextmanager
def _without_retracing_warnings():
    """Many models mean many traced functions, which TensorFlow warns of."""

    def is_news(record):
        return "retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
