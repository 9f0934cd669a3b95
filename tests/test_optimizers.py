"""Tests `keras_mixer/training/schedules.py` and `optimizers.py` against formulas."""

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mixer.config.training import OPTIMIZERS, SCHEDULERS, Config
from keras_mixer.runs.open_run import plan_run
from keras_mixer.training.optimizers import build_optimizer, ema_variables
from keras_mixer.training.schedules import DECAYS, WarmupDecay, schedule_of


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


@pytest.mark.parametrize("unit, steps", [("epoch", 20), ("step", 1)])
def test_rates_that_drop_and_rates_that_stay(unit, steps):
    """By the flags, through the config of a run: 20 steps are an epoch."""

    def rates(**fields):
        run = plan_run(
            Config(lr=0.5, warmup_step=2, num_steps=9, batch_size=64, schedule_unit=unit, **fields)
        )
        assert run.steps_per_epoch == 20
        schedule = schedule_of(run)
        return [float(schedule(units * steps)) for units in (0, 1, 2, 3, 5, 6, 8, 9)]

    dropping = {"scheduler": "step", "drop_every": 3, "drop_factor": 0.5}
    expected = [0, 0.25, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]
    assert rates(**dropping) == pytest.approx(expected)
    assert rates(scheduler="step") == pytest.approx([0, 0.25, 0.5, *[0.05] * 2, *[5e-3] * 2, 5e-4])
    assert rates(scheduler="constant") == pytest.approx([0, 0.25, *[0.5] * 6])


def test_no_warmup_starts_at_the_peak():
    assert float(WarmupDecay(0.5, 0, 50)(0)) == 0.5


def test_schedule_round_trip():
    schedule = WarmupDecay(0.5, 10, 50, "step", 20, 0.3)
    again = WarmupDecay.from_config(schedule.get_config())
    assert float(again(20)) == float(schedule(20)) == pytest.approx(0.15)


def test_every_scheduler_has_a_decay():
    assert set(DECAYS) == set(SCHEDULERS)


RATES = [0.25, 0.5, 1.0, 0.5]  # of the weights below
COMBINED = {"clip_norm": 0.1, "ema": 0.9}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def weights():
    """A stem, two matrices, a vector."""
    drawn = np.random.default_rng(0)
    shapes = {"stem": (2, 2, 1, 3), "low": (3, 4), "high": (3, 4), "bias": (4,)}
    return [
        keras.Variable(
            drawn.normal(size=shape), name="bias" if name == "bias" else "kernel", dtype="float32"
        )
        for name, shape in shapes.items()
    ]


def moved(name, size=1.0, jit=False, **options):
    """What one step adds to each weight; gradients are drawn, of some size."""
    variables, drawn = weights(), np.random.default_rng(1)
    before = [v.numpy() for v in variables]
    gradients = [tf.constant(size * drawn.normal(size=v.shape), tf.float32) for v in variables]
    optimizer = build_optimizer(name, 0.1, variables, **options)
    tf.function(lambda: optimizer.apply(gradients, variables), jit_compile=jit)()
    return [v.numpy() - b for v, b in zip(variables, before, strict=True)]


@every_optimizer
@pytest.mark.parametrize("decay, rates", [(0.0, None), (0.5, None), (0.5, RATES)], ids=str)
def test_decay_is_decoupled_and_shrinks_kernels_only(name, decay, rates):
    """By their share of the rate; a stem, which Muon treats in another way, like any kernel."""
    steps = moved(name, size=0.0, decay=decay, rates=rates)
    for variable, rate, step in zip(weights(), rates or [1.0] * 4, steps, strict=True):
        decayed = variable.name == "kernel" and decay > 0
        expected = -0.1 * decay * rate * variable.numpy() * decayed
        np.testing.assert_allclose(step, expected, rtol=1e-5, atol=3e-7 * decayed)


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in OPTIMIZERS),
        *((name, COMBINED) for name in OPTIMIZERS),
        ("adamw", {**COMBINED, "jit": True}),
        ("sgd", {"scale_loss": True, "size": 2.0**15}),  # by which it divides at first
    ],
)
def test_every_optimizer_moves_each_weight_by_its_share(name, options):
    """Those that divide by the size of the gradients, too; after clipping."""
    whole, shares = moved(name, **options), moved(name, rates=RATES, **options)
    assert all(abs(step).max() > 1e-6 for step in whole)
    for full, part, rate in zip(whole, shares, RATES, strict=True):
        np.testing.assert_allclose(part, rate * full, rtol=1e-4, atol=3e-7)


@every_optimizer
def test_without_layer_decay_it_is_kerass_own_optimizer(name):
    kind = type(build_optimizer(name, 0.1, weights()))
    assert kind.__name__.lower() == name and kind.__module__.startswith("keras.")


def test_rates_leave_the_names_of_the_state_as_they_are():
    def names(rates):
        optimizer = build_optimizer("adamw", 0.1, weights(), rates=rates)
        return [re.sub(r"_[0-9]+", "", v.path) for v in optimizer.variables]  # as in checkpoints.py

    assert names(None) == names(RATES)


def kernel():
    return [keras.Variable([1.0, 2.0], name="kernel")]


def step(optimizer, variables, gradient):
    optimizer.apply([keras.ops.full(v.shape, gradient) for v in variables], variables)


def test_momentum_is_that_of_sgd():
    variables = kernel()
    optimizer = build_optimizer("sgd", 0.1, variables, momentum=0.5)
    step(optimizer, variables, 1.0)
    step(optimizer, variables, 1.0)
    np.testing.assert_allclose(variables[0], [1 - 0.1 - 0.15, 2 - 0.1 - 0.15], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    whole, clipped = moved("sgd"), moved("sgd", clip_norm=0.5)
    norm = math.sqrt(sum((step**2).sum() for step in whole)) / 0.1
    for full, part in zip(whole, clipped, strict=True):
        np.testing.assert_allclose(part, 0.5 / norm * full, rtol=1e-4, atol=3e-7)


def test_average_follows_its_formula_and_stays_apart():
    variables = kernel()
    optimizer = build_optimizer("sgd", 0.1, variables, momentum=0.0, ema=0.9)
    average = None
    for _ in range(5):
        step(optimizer, variables, 1.0)
        value = float(variables[0][0])
        average = value if average is None else 0.9 * average + 0.1 * value
    assert float(ema_variables(optimizer)[0][0]) == pytest.approx(average, rel=1e-6)
    optimizer.finalize_variable_values(variables)
    assert float(variables[0][0]) == value


def test_no_average_unless_asked_for():
    assert ema_variables(build_optimizer("sgd", 0.1, kernel())) == []


def test_a_step_that_overflows_is_left_out_and_counts_for_nothing():
    variables = kernel()
    optimizer = build_optimizer("adam", 0.1, variables, decay=0.5, ema=0.9, scale_loss=True)
    step(optimizer, variables, 2.0**15)
    before = [v.numpy() for v in (*variables, *ema_variables(optimizer))]
    step(optimizer, variables, np.inf)
    after = [v.numpy() for v in (*variables, *ema_variables(optimizer))]
    np.testing.assert_array_equal(before, after)
    assert int(optimizer.iterations) == 1
    assert float(optimizer.dynamic_scale) == 2.0**14


def test_scaling_the_loss_changes_no_step_that_is_taken():
    plain, scaled = kernel(), kernel()
    fields = {"decay": 0.1, "clip_norm": 0.5, "ema": 0.9}
    one = build_optimizer("adamw", 0.1, plain, **fields)
    other = build_optimizer("adamw", 0.1, scaled, **fields, scale_loss=True)
    for _ in range(3):
        step(one, plain, 0.3)
        step(other, scaled, 0.3 * 2.0**15)
    np.testing.assert_allclose(plain[0], scaled[0], rtol=1e-6)
    np.testing.assert_allclose(ema_variables(one)[0], ema_variables(other)[0], rtol=1e-6)
