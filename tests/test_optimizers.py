"""Tests `keras_mixer/training/schedules.py` and `optimizers.py` against formulas."""

import math

import keras
import numpy as np
import pytest

from keras_mixer.config.training import OPTIMIZERS as OPTIMIZER_NAMES
from keras_mixer.config.training import SCHEDULERS
from keras_mixer.training.optimizers import OPTIMIZERS, ema_variables, build_optimizer
from keras_mixer.training.schedules import DECAYS, WarmupDecay

# === Schedules ===


def expected_rate(step, scheduler, peak=0.5, warmup=10, total=50):
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / (total - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * share)) if scheduler == "cosine" else 1 - share)


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_schedule_follows_its_formula(scheduler):
    schedule = WarmupDecay(0.5, 10, 50, scheduler)
    rates = [float(schedule(step)) for step in range(51)]
    np.testing.assert_allclose(rates, [expected_rate(s, scheduler) for s in range(51)], atol=1e-7)
    assert rates[0] == 0
    assert max(rates) == rates[10] == 0.5
    assert rates[50] == pytest.approx(0, abs=1e-7)
    assert (np.diff(rates[10:]) < 0).all(), "it never climbs"
    assert float(schedule(500)) == pytest.approx(0, abs=1e-7), "nor comes back after the end"


def test_no_warmup_starts_at_the_peak():
    assert float(WarmupDecay(0.5, 0, 50)(0)) == 0.5


def test_schedule_round_trip():
    schedule = WarmupDecay(0.5, 10, 50, "linear")
    again = WarmupDecay.from_config(schedule.get_config())
    assert float(again(20)) == float(schedule(20))


def test_tables_cover_the_choices():
    assert set(DECAYS) == set(SCHEDULERS)
    assert set(OPTIMIZERS) == set(OPTIMIZER_NAMES)


# === Optimizers ===


def weights():
    return [
        keras.Variable([[1.0, -2.0]], name="kernel"),
        keras.Variable([3.0, 4.0], name="bias"),
        keras.Variable([5.0], name="gamma"),
    ]


def step(optimizer, variables, gradient=0.0):
    optimizer.apply([keras.ops.full(v.shape, gradient) for v in variables], variables)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_decoupled_and_shrinks_kernels_only(name):
    variables = weights()
    step(build_optimizer(name, 0.1, variables, decay=0.5), variables)
    np.testing.assert_allclose(variables[0], [[0.95, -1.9]], rtol=1e-6)  # 1 - lr * decay
    np.testing.assert_array_equal(variables[1], [3, 4])
    np.testing.assert_array_equal(variables[2], [5])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_decay_of_the_stem_is_that_of_every_kernel(name, decay):
    """Muon treats what is no matrix in another way."""
    stem = keras.Variable(np.ones((2, 2, 1, 3)), name="kernel")
    step(build_optimizer(name, 0.1, [stem], decay=decay), [stem])
    np.testing.assert_allclose(stem, np.full((2, 2, 1, 3), 1 - 0.1 * decay), rtol=1e-6)


def test_momentum_is_that_of_sgd():
    variables = weights()
    optimizer = build_optimizer("sgd", 0.1, variables, momentum=0.5)
    step(optimizer, variables, 1.0)
    step(optimizer, variables, 1.0)
    np.testing.assert_allclose(variables[2], [5 - 0.1 - 0.15], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    variables = weights()
    optimizer = build_optimizer("sgd", 1.0, variables, momentum=0.0, clip_norm=1.0)
    step(optimizer, variables, 10.0)
    moved = 10.0 / math.sqrt(5 * 10.0**2)  # five equal numbers, together of norm 1
    np.testing.assert_allclose(variables[1], [3 - moved, 4 - moved], rtol=1e-6)


def test_average_follows_its_formula_and_stays_apart():
    variables = weights()
    optimizer = build_optimizer("sgd", 0.1, variables, momentum=0.0, ema=0.9)
    average = None
    for _ in range(5):
        step(optimizer, variables, 1.0)
        gamma = float(variables[2][0])
        average = gamma if average is None else 0.9 * average + 0.1 * gamma
    assert float(ema_variables(optimizer)[2][0]) == pytest.approx(average, rel=1e-6)
    optimizer.finalize_variable_values(variables)
    assert float(variables[2][0]) == gamma


def test_no_average_unless_asked_for():
    variables = weights()
    assert ema_variables(build_optimizer("sgd", 0.1, variables)) == []
