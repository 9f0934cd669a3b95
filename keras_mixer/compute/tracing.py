"""What TensorFlow would keep of a traced training step until the process ends."""

import functools

import keras
from tensorflow.python.framework import ops


def forget_gradients(model):
    """Has a model's training step remove the gradient functions that its tracing registers.

    Each `tf.custom_gradient` in a graph is kept in TensorFlow's registry for good, and with it the
    graph, its memory for weights and the optimizer's: a process that makes many runs would keep
    those of every run (https://github.com/tensorflow/tensorflow/issues/97697, so in 2.21). Keras's
    optimizers have one, too. Once a step is traced, nobody asks for its gradient again.

    Args:
        model: `keras.Model`, before `fit`.
    """
    if keras.backend.backend() != "tensorflow":
        return
    train_step = model.train_step

    @functools.wraps(train_step)
    def forgetful(data):
        known = _registered()
        try:
            return train_step(data)
        finally:
            for name in _registered() - known:
                del ops.gradient_registry._registry[name]

    model.train_step = forgetful


def _registered():
    """Returns the names of custom gradients; none if TensorFlow has no such registry any more."""
    registry = getattr(ops.gradient_registry, "_registry", {})
    return {name for name in list(registry) if name.startswith("CustomGradient-")}
