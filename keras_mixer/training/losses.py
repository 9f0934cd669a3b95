"""Losses: softmax cross-entropy, and sigmoid cross-entropy summed over the classes."""

import keras
import numpy as np
from keras import ops

from keras_mixer.errors import InputError


@keras.saving.register_keras_serializable(package="keras_mixer")
class SigmoidCrossentropy(keras.losses.Loss):
    """Binary cross-entropy of every class, summed over the classes.

    `keras.losses.BinaryCrossentropy` takes the mean over the classes: gradients smaller by the
    number of classes than those of the official pre-training.

    Reference:
        `sigmoid_xent` of big_vision, used by its configs/mlp_mixer_i1k.py; paper appendix B.
    """

    def call(self, y_true, y_pred):
        """Returns the losses `(batch,)` of labels and logits `(batch, num_classes)`."""
        terms = ops.binary_crossentropy(y_true, ops.cast(y_pred, "float32"), from_logits=True)
        return ops.sum(terms, axis=-1)


# By the names in `architecture.LOSSES`: Keras losses, and functions from logits to probabilities.
KERAS_LOSSES = {
    "softmax": lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
    "sigmoid": SigmoidCrossentropy,
}

PROBABILITIES = {"softmax": ops.softmax, "sigmoid": ops.sigmoid}


def check_finite(logits):
    """Raises an `InputError` if a logit of an array is NaN or infinite."""
    if not np.isfinite(logits).all():
        raise InputError("the model's outputs are not finite, so its weights are damaged")
