"""Tests `keras_mixer/runs/state.py`."""

import keras
import numpy as np
import pytest

from keras_mixer import RunError, build_mixer
from keras_mixer.runs.state import gather_state, restore_state
from keras_mixer.training.optimizers import build_optimizer


def compiled():
    sizes = {"channels": 1, "depth": 2, "dim": 4, "num_classes": 2}
    model = build_mixer((4, 4), (2, 2), **sizes, dropout=0.1, stochastic_depth=0.1)
    accuracy = keras.metrics.CategoricalAccuracy("accuracy")
    optimizer = build_optimizer("adamw", 0.1, model.trainable_variables, ema=0.9)
    model.compile(optimizer, "categorical_crossentropy", metrics=[accuracy], jit_compile=False)
    return model, [*model.metrics[0].variables, *accuracy.variables]


def test_everything_that_a_step_changes_comes_back():
    """Weights, moments, average, counters, metrics, and the states of the seed generators."""
    model, meters = compiled()
    before = gather_state(model, meters)
    data = np.random.default_rng(0)
    images, labels = data.normal(size=(8, 4, 4, 1)), np.eye(2)[data.integers(0, 2, 8)]
    model.train_on_batch(images, labels)
    changed = {n for n, a in gather_state(model, meters).items() if (a != before[n]).any()}
    for part in ("kernel", "momentum", "average", "iteration", "seed_generator", "meters"):
        assert any(part in name for name in changed), part
    restore_state(model, meters, before)
    for name, array in gather_state(model, meters).items():
        np.testing.assert_array_equal(array, before[name])


def test_names_do_not_depend_on_what_was_built_before_in_the_process():
    assert gather_state(*compiled()).keys() == gather_state(*compiled()).keys()


def test_a_state_of_another_model_is_refused():
    model, meters = compiled()
    arrays = gather_state(model, meters)
    del arrays[next(iter(arrays))]
    with pytest.raises(RunError, match="of another model; differing: model/0000/stem/kernel"):
        restore_state(model, meters, arrays)
