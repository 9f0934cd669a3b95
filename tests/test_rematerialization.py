"""Rematerialization: the same function and gradients, for less memory."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_fast_mixing import RANDOM, build_layer, outputs_and_gradients

from keras_mixer import build_mixer
from keras_mixer.compute import fast_mixing
from keras_mixer.compute.fast_mixing import mix, use_fast_mixing
from keras_mixer.compute.rematerialization import rematerialize
from keras_mixer.model.layers import MixerBlock


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_fast_mixing_computes_the_same_bits_again(dtype, monkeypatch):
    results, counts = [], []
    for remat in (False, True):
        calls, normalize = [], fast_mixing._normalize
        monkeypatch.setattr(
            fast_mixing, "_normalize", lambda *a, n=normalize, c=calls: c.append(1) or n(*a)
        )
        layer = build_layer(dtype, **RANDOM)
        kind = "float32" if dtype == "float32" else "bfloat16"

        def call(x, remat=remat, layer=layer):
            return tf.concat(mix(layer, [x[:4], x[4:]], remat), 0)

        results.append(outputs_and_gradients(layer, call, kind))
        counts.append(len(calls))
        monkeypatch.undo()
    assert counts == [4, 8], "two branches of two parts, twice"
    for kept, again in zip(*results, strict=True):
        np.testing.assert_array_equal(again, kept)


def small_mixer():
    keras.utils.set_random_seed(1)
    return build_mixer((8, 8), (2, 2), channels=1, depth=2, dim=16, num_classes=3, **RANDOM)


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_draws_the_same_again_and_learns_the_same(jit):
    losses, counts, call = [], [], MixerBlock.call
    for remat in (False, True):
        calls = []
        model = rematerialize(small_mixer()) if remat else small_mixer()
        model.compile(keras.optimizers.AdamW(0.01), "mse", jit_compile=jit)
        random = np.random.default_rng(0)
        x, y = random.normal(size=(32, 8, 8, 1)), random.normal(size=(32, 3))
        with pytest.MonkeyPatch.context() as patch:
            counted = lambda *a, calls=calls, **k: calls.append(1) or call(*a, **k)  # noqa: E731
            patch.setattr(MixerBlock, "call", counted)
            losses.append(model.fit(x, y, 8, epochs=3, shuffle=False, verbose=0).history["loss"])
        counts.append(len(calls))
    assert counts[1] >= counts[0] + 2, "two layers are computed again"
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_inference_and_weights_stay():
    model = small_mixer()
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    for other in (rematerialize(model), use_fast_mixing(model, 16, remat=True)):
        assert [v.path for v in other.weights] == [v.path for v in model.weights]
        np.testing.assert_allclose(
            other.predict_on_batch(images), model.predict_on_batch(images), atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("jit", ["auto", "true", "false"])
def test_peak_memory_grows_half_as_fast_with_the_batch(jit, tmp_path):
    sizes = {"depth": 12, "dim": 128, "image_shape": 32, "patch_shape": 4, "jit": jit}

    def peak(batch_size, remat):
        config = {**sizes, "batch_size": batch_size, "remat": remat, "output_dir": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "keras_mixer.benchmark.worker", "training"],
            **{"input": json.dumps(config) + "\n0\n", "text": True, "check": True},
            capture_output=True,
        )
        return json.loads(done.stdout.splitlines()[-1])["memory"]

    kept, again = (peak(160, remat) - peak(32, remat) for remat in (False, True))
    assert again < kept / 2
