"""Curves and the graph of a run for TensorBoard, in its logs/."""

import shutil

import keras
import tensorflow as tf

from keras_mixer.training.run import CURVES

# The columns of history.csv that are drawn, by the curve they belong to.
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
    """Draws a point per epoch, at its last step.

    A run that goes on begins by drawing all that it remembers, so its curves are whole and hold no
    point of an epoch that was lost and repeated.

    Args:
        run: `Run`.
        progress: `Progress`.
    """

    def __init__(self, run, progress):
        super().__init__()
        self.run = run
        self.progress = progress
        self._writers = {}
        self._drawn = 0

    def on_train_begin(self, logs=None):
        if self._writers:
            return  # the run takes several calls of fit
        for curve in CURVES:
            shutil.rmtree(self.run.logs / curve, ignore_errors=True)
            self._writers[curve] = tf.summary.create_file_writer(str(self.run.logs / curve))
        with self._writers["train"].as_default():
            tf.summary.graph(_graph(self.model))
        self._draw()

    def on_epoch_end(self, epoch, logs=None):
        self._draw()

    def _draw(self):
        for row in self.progress.rows[self._drawn :]:
            for curve, columns in COLUMNS.items():
                with self._writers[curve].as_default():
                    for name, column in columns.items():
                        if row[column] is not None:
                            tf.summary.scalar(name, row[column], step=row["step"])
        self._drawn = len(self.progress.rows)
        for writer in self._writers.values():
            writer.flush()


def _graph(model):
    """The graph of a prediction; that of a training step is thousands of nodes larger."""
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, "images")
    forward = tf.function(lambda images: model(images, training=False))
    return forward.get_concrete_function(spec).graph
