"""Memory of traced steps: removes gradient functions that TensorFlow would keep forever."""

import functools

import keras
from tensorflow.python.framework import ops

from keras_mixer.compute.private_apis import private


def forget_gradients(model):
    """Makes a model's training step remove the gradient functions that its tracing registers.

    TensorFlow's registry keeps each `tf.custom_gradient` of a graph, and with it the graph, its
    weights and those of the optimizer: a process that trains many models would keep them all
    (https://github.com/tensorflow/tensorflow/issues/97697, so in 2.21). Keras's optimizers have
    one, too. Once a step is traced, nothing needs its gradient again.

    Args:
        model: `keras.Model`, before `fit`.
    """
    if keras.backend.backend() != "tensorflow":
        return
    train_step, registry = model.train_step, private(ops.gradient_registry, "_registry")

    @functools.wraps(train_step)
    def forgetful(data):
        known = set(registry)
        try:
            return train_step(data)
        finally:
            for name in set(registry) - known:
                if name.startswith("CustomGradient-"):
                    del registry[name]

    model.train_step = forgetful
