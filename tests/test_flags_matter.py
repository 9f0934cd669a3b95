"""Tests that every flag that claims to touch the result does, and that no other one does."""

import dataclasses

import numpy as np
import pytest
from conftest import GOLDEN

from keras_mixer import Config, fit
from keras_mixer.weights import native

BASE = {
    "depth": 2, "dim": 8, "batch_size": 128, "num_steps": 2, "warmup_step": 1, "lr": 0.1,
    "jit": "false", "precision": "float32", "clip_norm": 0.01,
}  # fmt: skip

# A value for each flag with which the same run must come out differently.
OTHER = {
    "image_shape": (16, 8), "validation_fraction": 0.2, "flip": True, "crop_padding": 1,
    "variant": None, "patch_shape": (4, 2), "depth": 3, "dim": 10, "tokens_mlp_dim": 5,
    "channels_mlp_dim": 9, "activation": "relu", "token_mixing": False, "channel_mixing": False,
    "dropout": 0.2, "stochastic_depth": 0.3, "optimizer": "adam", "batch_size": 64, "lr": 0.2,
    "momentum": 0.5, "decay": 0.5, "num_steps": 3, "warmup_step": 0, "schedule_unit": "step",
    "scheduler": "linear", "clip_norm": 0.0, "label_smoothing": 0.2, "ema": 0.9,
    "precision": "bfloat16", "jit": "true", "seed": 1,
}  # fmt: skip

# Where the data come from and what the weights start from have tests of their own:
# test_sources.py, test_config.py (num_classes can only be left out or right), test_fit.py.
ELSEWHERE = {"dataset", "num_classes", "checkpoint"}

RESULT = {f.name for f in dataclasses.fields(Config) if f.metadata.get("result", True)}
CHANGED = [name for name in OTHER if name not in ("variant", "jit")]  # see below


def weights(tmp_path_factory, **fields):
    directory = tmp_path_factory.mktemp("run")
    run = fit(Config(**{**BASE, **fields, "output_dir": str(directory)}))
    return native.read_weights(run.best)[0]


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(array, other[name]) for name, array in one.items()
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return weights(tmp_path_factory)


def test_no_flag_escapes():
    assert set(OTHER) | ELSEWHERE == RESULT


@pytest.mark.parametrize("name", CHANGED)
def test_flag_changes_the_result(base, tmp_path_factory, name):
    assert OTHER[name] != BASE.get(name, getattr(Config(), name))
    assert not same(weights(tmp_path_factory, **{name: OTHER[name]}), base)


@pytest.mark.parametrize(
    ("name", "value"), [("save_every", 3), ("save_unit", "step"), ("eval_split", "validation")]
)
def test_flag_changes_no_bit_of_the_result(base, tmp_path_factory, name, value):
    assert name not in RESULT
    assert same(weights(tmp_path_factory, **{name: value}), base)


def test_compilation_changes_rounding_only(base, tmp_path_factory):
    """`--jit` is compared on resume because its last bits may differ, not because more may."""
    compiled = weights(tmp_path_factory, jit="true")
    for name, array in base.items():
        np.testing.assert_allclose(compiled[name], array, atol=1e-3)


def test_variant_sets_the_size():
    """Table 1's smallest has 18 million parameters, too many to train here."""
    from keras_mixer.resolve import resolve

    assert resolve(Config(variant="S/32"), 10).architecture()["dim"] == 512


def test_golden_checkpoint_can_be_trained_on(tmp_path_factory, folder):
    """Official weights, whose 24 patches leave the image shape to the flag, with a fresh head."""
    directory = tmp_path_factory.mktemp("run")
    config = Config(
        **{"dataset": "folder", "data_dir": str(folder), "batch_size": 8, "num_steps": 1},
        **{"image_shape": (24, 16), "checkpoint": str(GOLDEN / "official_mixer.npz")},
        **{"lr": 1e-9, "warmup_step": 0, "jit": "false", "output_dir": str(directory)},
    )
    run = fit(config)
    found = native.read_weights(run.best)[0]
    with np.load(GOLDEN / "official_mixer.npz") as expected:
        np.testing.assert_allclose(found["stem/kernel"], expected["stem/kernel"], atol=1e-6)
    assert found["head/kernel"].shape == (24, 3)
