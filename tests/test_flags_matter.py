"""Tests that every flag that claims to touch the result does, and that no other one does."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from conftest import GOLDEN

from keras_mixer import Config, fit
from keras_mixer.model.variants import VARIANTS, Variant
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.open_run import open_run, plan_run

BASE = {
    "depth": 2, "dim": 8, "batch_size": 128, "num_steps": 2, "warmup_step": 1, "lr": 0.1,
    "jit": "false", "precision": "float32", "clip_norm": 0.01,
}  # fmt: skip

# A value for each flag with which the same run must come out differently.
OTHER = {
    "activation": "relu", "dropout": 0.2, "stochastic_depth": 0.3, "optimizer": "adam", "lr": 0.2,
    "momentum": 0.5, "decay": 0.5, "num_steps": 3, "warmup_step": 0, "schedule_unit": "step",
    "scheduler": "linear", "clip_norm": 0.0, "label_smoothing": 0.2, "ema": 0.9,
    "precision": "bfloat16", "loss": "sigmoid", "layer_decay": 0.5,
}  # fmt: skip

# Likewise, seen in the weights or the batches with which training starts: that is quicker.
OTHER_WEIGHTS = {
    "patch_shape": (4, 2), "depth": 3, "dim": 10, "tokens_mlp_dim": 5, "channels_mlp_dim": 9,
    "token_mixing": False, "channel_mixing": False, "seed": 1, "head_bias": 1.0,
}  # fmt: skip
OTHER_BATCHES = {
    "image_shape": (8, 8), "batch_size": 64, "validation_fraction": 0.2, "test_fraction": 0.3,
    "split_seed": 1, "flip": True, "crop_padding": 1, "eval_crop": 0.5, "interpolation": "bicubic",
    "inception_crop": 0.3, "randaugment": (2, 10),
    "color_jitter": 0.3, "random_erasing": 1.0, "mixup": 0.4, "cutmix": 1.0,
    "class_weights": "balanced",
}  # fmt: skip

# Where the data come from (test_sources.py), what can only be left out or right (test_config.py),
# what the weights start from (test_fit.py) and how they are adapted (test_resize.py) or frozen
# (test_finetuning.py), drops of the learning rate (test_optimizers.py), baselines
# (test_baselines.py), what shows on a GPU only (test_independence.py), what has tests of its own
# below or in test_recipes.py.
ELSEWHERE = {
    "dataset", "num_classes", "checkpoint", "resize_tokens", "variant", "jit", "accumulation",
    "early_stopping", "freeze", "drop_every", "drop_factor", "model",
    "deterministic",  # test_independence.py
}  # fmt: skip

RESULT = {f.name for f in dataclasses.fields(Config) if f.metadata.get("result", True)}


def weights(tmp_path_factory, **fields):
    """All that training changes, at its end; the weights in best/ may be of an earlier epoch."""
    directory = tmp_path_factory.mktemp("run")
    run = fit(Config(**{**BASE, **fields, "output_dir": str(directory)}))
    return newest_checkpoint(run.checkpoints).arrays


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(array, other[name]) for name, array in one.items()
    )


def equal(arrays, others):
    return len(arrays) == len(others) and all(map(np.array_equal, arrays, others))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return weights(tmp_path_factory)


def test_no_flag_escapes():
    assert {*OTHER, *OTHER_WEIGHTS, *OTHER_BATCHES} | ELSEWHERE == RESULT


@pytest.mark.parametrize("name", OTHER)
def test_flag_changes_the_result(base, tmp_path_factory, name):
    assert OTHER[name] != BASE.get(name, getattr(Config(), name))
    assert not same(weights(tmp_path_factory, **{name: OTHER[name]}), base)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_flag_changes_the_initial_weights(before_training, name):
    one, other = (
        before_training(plan_run(Config(**fields)))[0].get_weights()
        for fields in (BASE, {**BASE, name: OTHER_WEIGHTS[name]})
    )
    assert not equal(one, other)


@pytest.mark.parametrize("name", OTHER_BATCHES)
def test_flag_changes_the_batches(first_batch, name):
    """Of images that are larger than those of the data."""
    fields = {**BASE, "image_shape": (16, 8)}
    one = first_batch(plan_run(Config(**fields)))
    other = first_batch(plan_run(Config(**{**fields, name: OTHER_BATCHES[name]})))
    assert not equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("save_every", 3), ("save_unit", "step"), ("eval_split", "validation"), ("remat", True)],
)
def test_flag_changes_no_bit_of_the_result(base, tmp_path_factory, name, value):
    assert name not in RESULT
    assert same(weights(tmp_path_factory, **{name: value}), base)


GPU = bool(tf.config.list_physical_devices("GPU"))


@pytest.mark.parametrize(
    ("jit", "precision", "compiled", "fast"),
    [
        ("true", "float32", True, False),
        ("false", "float32", False, False),
        ("auto", "float32", GPU, not GPU),
        ("auto", "bfloat16", GPU, not GPU),
        ("auto", "float16", GPU, False),
        ("true", "bfloat16", True, False),
    ],
)
def test_jit_decides_on_compilation(before_training, jit, precision, compiled, fast):
    model, _ = before_training(plan_run(Config(**{**BASE, "jit": jit, "precision": precision})))
    assert model.jit_compile is compiled
    assert hasattr(model, "parts") is fast


@pytest.mark.parametrize("jit", ["true", "auto"])
def test_jit_changes_no_more_than_the_last_bits(base, tmp_path_factory, jit):
    """Which is why it is compared on resume."""
    found = weights(tmp_path_factory, jit=jit)
    for name in [name for name in base if name.startswith("model/")]:
        np.testing.assert_allclose(found[name], base[name], atol=1e-3)


def test_variant_is_built(before_training, monkeypatch):
    """With a row added to the table, since the smallest in it has 18 million parameters."""
    monkeypatch.setitem(VARIANTS, "XS/4", Variant(2, 6, 4, 3, 12, 0, 0))
    field = Config.__dataclass_fields__["variant"]
    monkeypatch.setattr(field, "metadata", {**field.metadata, "choices": None})
    fields = {**BASE, "variant": "XS/4", "image_shape": (8, 8), "depth": None, "dim": None}
    model, _ = before_training(plan_run(Config(**fields)))
    shapes = {weight.path: weight.shape for weight in model.weights}
    assert shapes["stem/kernel"] == (4, 4, 1, 6)
    assert shapes["mixer_block_1/token_mixing/dense_0/kernel"] == (4, 3)


def test_golden_checkpoint_can_be_trained_on(before_training, folder, tmp_path):
    """Official weights, whose 24 patches leave the image shape to the flag, and a head of zeros."""
    config = Config(
        **{"dataset": "folder", "data_dir": str(folder), "batch_size": 8, "num_steps": 1},
        **{"image_shape": (24, 16), "checkpoint": str(GOLDEN / "official_mixer.npz")},
        **{"warmup_step": 0, "jit": "false", "output_dir": str(tmp_path / "run")},
    )
    with open_run(config) as run:
        model, _ = before_training(run)
    found = {weight.path: weight.numpy() for weight in model.weights}
    with np.load(GOLDEN / "official_mixer.npz") as expected:
        np.testing.assert_array_equal(found["stem/kernel"], expected["stem/kernel"])
    np.testing.assert_array_equal(found["head/kernel"], np.zeros((24, 3)))
