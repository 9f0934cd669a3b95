"""TensorBoard: the curves and the graph of a run, in its logs/."""

import shutil

import keras
import tensorflow as tf

from keras_mixer.runs.run import CURVES

# By folder in logs/: the names of scalars, and their columns in history.csv.
COLUMNS = {
    "train": {
        "loss": "loss",
        "accuracy": "accuracy",
        "learning_rate": "lr",
        "images_per_second": "images_per_second",
    },
    "validation": {"loss": "val_loss", "accuracy": "val_accuracy"},
}


class Board(keras.callbacks.Callback):
    """Writes the history to TensorBoard, a point per epoch at its last step.

    A resumed run writes its whole history again, so that no epoch is missing or repeated.

    Args:
        run: `Run`.
        progress: `Progress`.
    """

    def __init__(self, run, progress):
        super().__init__()
        self.run = run
        self.progress = progress
        self._writers = {}
        self._written = 0

    def on_train_begin(self, logs=None):
        if self._writers:
            return  # a later call of fit in the same run
        for curve in CURVES:
            shutil.rmtree(self.run.logs / curve, ignore_errors=True)
            self._writers[curve] = tf.summary.create_file_writer(str(self.run.logs / curve))
        if keras.backend.backend() == "tensorflow":
            with self._writers["train"].as_default():
                tf.summary.graph(_graph(self.model))
        self._write()

    def on_epoch_end(self, epoch, logs=None):
        self._write()

    def _write(self):
        for row in self.progress.rows[self._written :]:
            for curve, columns in COLUMNS.items():
                with self._writers[curve].as_default():
                    for name, column in columns.items():
                        if row[column] is not None:
                            tf.summary.scalar(name, row[column], step=row["step"])
        self._written = len(self.progress.rows)
        for writer in self._writers.values():
            writer.flush()


def _graph(model):
    """Returns the graph of a prediction; a training step has thousands of nodes more."""
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, "images")
    forward = tf.function(lambda images: model(images, training=False))
    return forward.get_concrete_function(spec).graph
