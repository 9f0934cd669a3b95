"""Jobs: train a config, evaluate it once and export it."""

import contextlib
import logging
import statistics
import time
from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.compute.process_group import refuse_several_processes
from keras_mixer.errors import InputError, RunError
from keras_mixer.inference.export.formats import export
from keras_mixer.inference.export.versions import check_target, published
from keras_mixer.log import logger
from keras_mixer.runs.open_run import note_slow_average, note_split_to_score, open_run
from keras_mixer.runs.run import check_finished, describe_scores, write_metrics
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
        RunError: If the run cannot continue, e.g. with a loss of NaN.
        Interrupted: If a signal stopped the run, after its state was saved.
    """
    with open_run(config, _check_export) as run:
        if run.finished:
            check_finished(run)
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
        from keras_mixer.training.fit import fit_run

    note_split_to_score(run)
    note_slow_average(run)
    fit_run(run, callbacks)
    if not run.group.is_main:
        return
    score_run(run)
    if run.config.export and run.saved_model is None:
        target = {"export_dir": run.config.export_dir, "name": run.config.name}
        sha256 = model_folder.read_metadata(run.best)["sha256"]
        with _with_scores(run):
            version = published(Path(*target.values()), sha256) or export(run, **target)
        write_metrics(run, saved_model=str(version))


@contextlib.contextmanager
def _with_scores(run):
    """Adds the scores of the complete run to an error of the export."""
    try:
        yield
    except (InputError, RunError) as error:
        raise type(error)(
            f"{error}; the run itself is complete ({describe_scores(run.scores)}), and the same "
            f"command exports it again"
        ) from error


class JobSequence:
    """Runs `total` jobs one after the other, and logs the progress.

    Every job has its own run directory; finished jobs are skipped.

    Args:
        total: int. Number of jobs.
        begun: int. Number of those that are finished, or run by other processes.
    """

    def __init__(self, total, begun=0):
        refuse_several_processes("sequences of jobs")
        self.total = total
        self._begun = begun
        self._durations = []  # in seconds, of the jobs that were not finished before

    def run(self, name, config, callbacks=()):
        """Runs a job unless it is finished, and returns its `Run`.

        Args:
            name: Name of the job on the terminal.
            config: `Config` with an output_dir that no other job has.
            callbacks: Keras callbacks; see `fit`.

        Raises:
            InputError, RunError, Interrupted: See `run_job`.
        """
        with open_run(config, _check_export) as run:
            self._begun += 1
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
    """Hides TensorFlow's warnings about retracing, which each model of a sequence causes."""

    def is_other(record):
        return "retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
