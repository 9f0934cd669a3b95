"""Many runs, one after the other: what is finished stays, what was interrupted continues."""

import statistics
import time

import keras
import tensorflow as tf

from keras_mixer import console
from keras_mixer.inference.evaluate import score_run
from keras_mixer.training.fit import train
from keras_mixer.training.opening import open_run


class Campaign:
    """Trains and scores runs, and says how far it has come.

    Every run is a run directory of its own, so the same campaign given again finds what is done.

    Args:
        total: int. How many runs there will be.
    """

    def __init__(self, total):
        self.total = total
        self._begun = 0
        self._durations = []  # in seconds, of the runs that were not finished before
        tf.get_logger().addFilter(_is_news)

    def run(self, name, config):
        """Trains and scores what a config says, unless that is done.

        Args:
            name: What the run is called on the terminal.
            config: `Config`, whose output_dir is the run's own.

        Returns:
            The `Run`, with its metrics.

        Raises:
            InputError, RunError, Interrupted: As `training.fit.fit` does.
        """
        self._begun += 1
        with open_run(config) as run:
            if config.eval_split not in run.metrics():
                console.say(f"[{self._begun}/{self.total}] {name}{self._time_left()}")
                start = time.monotonic()
                train(run)
                score_run(run)
                self._durations.append(time.monotonic() - start)
                keras.backend.clear_session()  # else every model stays in memory
        return run

    def _time_left(self):
        if not self._durations:
            return ""
        left = statistics.mean(self._durations) * (self.total - self._begun + 1)
        return f", about {max(1, round(left / 60))} min left if all take as long"


def _is_news(record):
    """TensorFlow warns of many traced functions, which is what many models are."""
    return "retracing" not in record.getMessage()
