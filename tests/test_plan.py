"""Tests `keras_mixer/compute/plan.py` and `private_apis.py`: what computes a run, and on what."""

import keras
import pytest
from tensorflow.python.framework import ops

from keras_mixer import Config, InputError, RunError, build_mixer
from keras_mixer.compute import plan as plan_module
from keras_mixer.compute.plan import compute_plan, resolve_plan
from keras_mixer.compute.private_apis import PRIVATE_APIS, private
from keras_mixer.runs.open_run import plan_run
from keras_mixer.training.compile import compile_model

KINDS = {"_FastMixing", "_Rematerialization", "_Accumulation"}
MIXER = {"model": "mixer", "batch_size": 64}


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    monkeypatch.setattr("keras_mixer.compute.fast_mixing.cores", lambda: 3)


@pytest.mark.parametrize(
    ("fields", "text", "jit_compile"),
    [
        ({}, "CPU, fast mixing in 3 parts", False),
        ({"accumulation": 4}, "CPU, fast mixing in 2 parts", False),
        ({"batch_size": 8, "remat": True}, "CPU, fast mixing, rematerialized", False),
        ({"precision": "float16"}, "CPU, no XLA", False),
        ({"model": "cnn"}, "CPU, no XLA", False),
        ({"jit": "true", "remat": True}, "CPU, XLA, rematerialized", True),
        ({"jit": "false"}, "CPU, no XLA", False),
    ],
    ids=str,
)
def test_a_plan_is_described_as_in_checkpoints_so_far(fields, text, jit_compile):
    plan = resolve_plan(Config(**MIXER | fields))
    assert (plan.describe(), plan.jit_compile) == (text, jit_compile)


@pytest.mark.parametrize(
    ("devices", "backend", "processes", "text"),
    [
        (["cpu:0", "cpu:1"], "jax", 1, "cpu:0, cpu:1, XLA, jax"),
        (["gpu:0"], "tensorflow", 1, "gpu:0, XLA"),
        (["gpu:0", "gpu:1"], "jax", 2, "2 devices of 2 processes, XLA, jax"),
    ],
)
def test_devices_and_processes_are_part_of_the_description(devices, backend, processes, text):
    plan = resolve_plan(Config(**MIXER, jit="true"))
    changes = {"devices": tuple(devices), "backend": backend, "processes": processes}
    assert plan_module.dataclasses.replace(plan, **changes).describe() == text


@pytest.mark.parametrize(
    ("setting", "value"), [("max_epochs", 1), ("max_steps_per_epoch", 2), ("floatx", "float16")]
)
def test_settings_of_keras_that_would_change_a_run_are_refused(monkeypatch, setting, value):
    monkeypatch.setattr(keras.config, setting, lambda: value)
    with pytest.raises(InputError, match=f"Keras is set to {setting}={value}: expected"):
        compute_plan(Config(**MIXER)).__enter__()


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(InputError, match="not on torch; unset KERAS_BACKEND"):
        compute_plan(Config(**MIXER)).__enter__()


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, {"_FastMixing"}),
        ({"accumulation": 2, "remat": True}, {"_Accumulation", "_FastMixing"}),
        ({"jit": "true", "remat": True}, {"_Rematerialization"}),
        ({"jit": "false"}, set()),
    ],
    ids=["default", "accumulation", "xla", "plain"],
)
def test_the_model_of_a_run_is_compiled_by_its_plan(fields, kinds):
    run = plan_run(Config(depth=1, dim=4, batch_size=64, optimizer="adamw", **fields))
    plan = resolve_plan(run.config)
    model, metric_variables = compile_model(run, plan, 0.1)
    assert {kind.__name__ for kind in type(model).mro()} & KINDS == kinds
    assert getattr(model, "parts", 3) == plan.parts
    assert model.jit_compile == ("jit" in fields and fields["jit"] == "true")
    assert [v.name for v in metric_variables] == ["total", "count"] * 2
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)


# === Private APIs ===


def test_private_apis_exist_in_these_versions():
    """If one is missing, check what relies on it, then the version in the table."""
    model = build_mixer((4, 4), (2, 2), channels=1, depth=1, dim=4, num_classes=2)
    model.compile(keras.optimizers.SGD(use_ema=True), "mse")
    model.optimizer.build(model.trainable_variables)
    on_jax = {"compute_loss_and_updates", "_update_metrics_variables"}
    if keras.backend.backend() == "jax":
        on_jax = {"_compute_loss"}  # used on TensorFlow
    for name in PRIVATE_APIS.keys() - on_jax:
        owners = [model, model.optimizer, ops.gradient_registry]
        assert any(hasattr(owner, name) for owner in owners), f"{name} of {PRIVATE_APIS[name]}"


def test_a_missing_one_is_an_error_that_names_the_version():
    with pytest.raises(
        RunError,
        match=r"keras [\d.]+ has no Model._flatten_layers, which --remat needs; it was checked "
        r"with keras 3\.15\.1: pip install keras==3\.15\.1",
    ):
        private(type("Model", (), {}), "_flatten_layers")
