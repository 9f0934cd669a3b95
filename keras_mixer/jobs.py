"""Jobs: train a config, evaluate it once and export it."""

import contextlib
import logging
import statistics
import time
from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.compute.process_group import refuse_several_processes
from keras_mixer.errors import InputError, RunError
from keras_mixer.inference.export.versions import check_target, published
from keras_mixer.log import logger
from keras_mixer.runs.open_run import note_split_to_score, open_run
from keras_mixer.runs.run import describe_scores, write_metrics
from keras_mixer.weights import model_folder


def run_job(config, callbacks=()):
    """Trains a Mixer, evaluates it once on the test set, and exports a SavedModel.

    Called again with the same config, it continues an interrupted job and leaves a finished one.

    Args:
        config: `keras_mixer.Config`.
        callbacks: Keras callbacks; see `fit`.

    Returns:
        The `Run`; its `scores`, `selected_epoch` and `saved_model` are those of metrics.json.

    Raises:
        InputError: If the config, the data or the directory are not valid.
        RunError: If the run cannot go on, such as when the loss is not finite.
        Interrupted: If a signal stopped the run, after its state was saved.
    """
    with open_run(config, _check_export) as run:
        if run.finished:
            logger.info(f"{run.directory} is complete; nothing was changed")
        else:
            _train_evaluate_export(run, callbacks)
    return run


def _check_export(run):
    if run.config.export and run.saved_model is None:
        check_target(run.config.export_dir, run.config.name, run.spec)


def _train_evaluate_export(run, callbacks=()):
    with quiet_tensorflow():  # imported here, once all input has been checked
        from keras_mixer.inference.evaluate import score_run
        from keras_mixer.inference.export.saved_model import export_model
        from keras_mixer.training.fit import fit_run

    note_split_to_score(run)
    fit_run(run, callbacks)
    if not run.group.is_main:
        return
    score_run(run)
    if run.config.export and run.saved_model is None:
        home = Path(run.config.export_dir) / run.config.name
        sha256 = model_folder.read_facts(run.best)["sha256"]
        with _scores_named(run):
            target = published(home, sha256) or export_model(
                run.best, run.config.export_dir, run.config.name
            )
        write_metrics(run, saved_model=str(target))


@contextlib.contextmanager
def _scores_named(run):
    """Adds to an error of the export that the run itself is complete, and its scores."""
    try:
        yield
    except (InputError, RunError) as error:
        raise type(error)(
            f"{error}; the run itself is complete ({describe_scores(run.scores)}), and the same "
            f"command exports it again"
        ) from error


class JobSequence:
    """Runs `total` jobs one after the other, and prints the progress.

    Every job has its own run directory, so the same sequence run again skips finished jobs.

    Args:
        total: int. Number of jobs.
        begun: int. Number of those that were run before, or are run elsewhere.
    """

    def __init__(self, total, begun=0):
        refuse_several_processes("sequences of jobs")
        self.total = total
        self._begun = begun
        self._durations = []  # in seconds, of the jobs that were not finished before

    def run(self, name, config, callbacks=()):
        """Runs a job, unless it is finished, and returns its `Run`.

        Args:
            name: Name of the job on the terminal.
            config: `Config` with an output_dir that no other job has.
            callbacks: Keras callbacks; see `fit`.

        Raises:
            InputError, RunError, Interrupted: See `run_job`.
        """
        self._begun += 1
        with open_run(config, _check_export) as run:
            if not run.finished:
                logger.info(f"[{self._begun}/{self.total}] {name}{self._time_left()}")
                start = time.monotonic()
                with without_retracing_warnings():
                    _train_evaluate_export(run, callbacks)
                self._durations.append(time.monotonic() - start)
        return run

    def _time_left(self):
        if not self._durations:
            return ""
        left = statistics.mean(self._durations) * (self.total - self._begun + 1)
        return f", about {max(1, round(left / 60))} min left if all take as long"


@contextlib.contextmanager
def without_retracing_warnings():
    """Hides TensorFlow's warnings about retracing: every model of a sequence is traced anew."""

    def is_other(record):
        return "retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
