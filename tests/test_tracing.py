"""Tests `keras_mixer/compute/tracing.py`: a traced step leaves no gradient functions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

from keras_mixer.compute.tracing import forget_gradients


class Traced(keras.Model):
    """A model whose step registers a custom gradient while it is traced, and another one."""

    name_of_other = None

    def train_step(self, data):
        assert not tf.executing_eagerly()
        tf.custom_gradient(lambda x: (x, lambda d: d))(tf.constant(1.0))
        ops.RegisterGradient(self.name_of_other)(lambda *_: None)
        return super().train_step(data)


@pytest.mark.parametrize("forget", [True, False])
def test_custom_gradients_of_a_step_are_forgotten_and_no_others(forget):
    inputs = keras.Input((2,))
    model = Traced(inputs, keras.layers.Dense(1)(inputs))
    model.name_of_other = f"not of a step, {forget}"
    model.compile("sgd", "mse")
    if forget:
        forget_gradients(model)
    before = set(ops.gradient_registry.list())
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    left = set(ops.gradient_registry.list()) - before
    assert model.name_of_other in left
    assert len(left) == (1 if forget else 3), "the step's own, and that of Keras's optimizer"
