"""Tests `keras_mixer/compute/devices.py`: on JAX, the number of devices changes only last bits.

A process has one backend: `test_on_jax` runs this file again, on JAX with four virtual devices.
"""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, TINY, read_history

from keras_mixer import Config, InputError, fit, run_job
from keras_mixer.backend import quiet_tensorflow
from keras_mixer.compute.devices import choose_devices, predictor
from keras_mixer.inference.evaluate import outputs_of, subject_of_run
from keras_mixer.inference.predict import classify
from keras_mixer.runs.checkpoints import newest_checkpoint

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    import jax
on_jax = pytest.mark.skipif(not ON_JAX, reason="test_on_jax runs it")
on_tensorflow = pytest.mark.skipif(ON_JAX, reason="of the TensorFlow backend")

RANDOM = {"inception_crop": 0.3, "mixup": 0.4, "class_weights": "balanced", "clip_norm": 0.1}


@pytest.fixture
def config(tmp_path):
    def make(directory="run", **fields):
        fields = {**TINY, "jit": "auto", "export": False, **fields}
        return Config(**fields, output_dir=str(tmp_path / directory))

    return make


def last_state(run):
    """Arrays of the last checkpoint, but for the metrics of its epoch."""
    arrays = newest_checkpoint(run.checkpoints).arrays
    return {name: array for name, array in arrays.items() if not name.startswith("meters")}


@pytest.mark.slow
@on_tensorflow
def test_on_jax(tmp_path):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed: pip install -e '.[test]'")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-rs", __file__],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
        env={
            **os.environ,
            "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@on_jax
def test_any_number_of_devices_gives_the_weights_of_one(config):
    """With all that is random, EMA, clipping and accumulation; 144 validation images, not by 5."""
    fields = {**RANDOM, "accumulation": 2, "validation_fraction": 0.11}
    alone = fit(config("1", devices="1", **fields))
    assert len(alone.dataset.validation) % 2
    for devices in ("0,2", "all"):
        shared = fit(config(devices, devices=devices, **fields))
        expected, received = last_state(alone), last_state(shared)
        for name, array in expected.items():
            np.testing.assert_allclose(received[name], array, rtol=0, atol=2e-5, err_msg=name)
        for one, several in zip(read_history(alone), read_history(shared), strict=True):
            for name in ("loss", "val_loss", "val_accuracy"):
                assert float(several[name]) == pytest.approx(float(one[name]), abs=1e-4), name


@on_jax
def test_interrupted_it_continues_bit_for_bit(config, interrupted):
    fields = {**RANDOM, "devices": "2", "num_steps": 2}
    expected = last_state(fit(config("undisturbed", **fields)))
    interrupted(config(**fields), 26)
    interrupted(config(**fields), 14)
    received = last_state(fit(config(**fields)))
    assert {k: v.tobytes() for k, v in received.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


@on_jax
def test_it_may_continue_on_another_number_of_devices(config, interrupted, capsys):
    expected = last_state(fit(config("undisturbed", devices="4")))
    interrupted(config(devices="2"), 30)
    received = last_state(fit(config(devices="4")))
    assert "computed by cpu:0, cpu:1, XLA, jax until now" in capsys.readouterr().err
    for name, array in expected.items():
        np.testing.assert_allclose(received[name], array, rtol=0, atol=2e-5, err_msg=name)


@on_jax
def test_parts_of_a_batch_give_its_gradients(config):
    fields = {"dropout": 0.0, "stochastic_depth": 0.0, "num_steps": 1, "warmup_step": 0}
    whole = last_state(fit(config("whole", **fields)))
    parts = last_state(fit(config("parts", accumulation=4, **fields)))
    for name, array in whole.items():
        np.testing.assert_allclose(parts[name], array, rtol=0, atol=2e-5, err_msg=name)


@on_jax
def test_all_devices_evaluate_and_predict(config, monkeypatch):
    """360 test images in batches of 7, and 5 images at once: no multiples of the devices."""
    run = fit(config(num_steps=1))
    subject = subject_of_run(run, "test", batch_size=7)
    images = list(run.dataset.test.pixels[:5])
    received, _ = outputs_of(subject)
    probabilities = [row for _, row in classify(subject.model, images)]
    of_all = predictor(subject.model)
    assert len(jax.local_devices()) == 4
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    alone, _ = outputs_of(subject)
    np.testing.assert_allclose(received, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        probabilities, [row for _, row in classify(subject.model, images)], rtol=0, atol=1e-5
    )
    gray = np.zeros((3, 8, 8, 1), "f")
    expected = subject.model.predict_on_batch(gray)
    np.testing.assert_allclose(of_all(gray), expected, rtol=0, atol=1e-5)


@on_jax
def test_exports_are_made_by_tensorflow(config, tmp_path):
    made = config(export=True, export_dir=str(tmp_path / "exports"))
    run = run_job(made)
    assert (tmp_path / "exports/mlp_mixer/1/saved_model.pb").exists()
    assert run.saved_model.endswith("mlp_mixer/1")
    assert run_job(made).finished


@on_jax
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 63}, "--batch_size=63.*a multiple of the 4 devices.*--devices=1 uses one"),
        ({"devices": "5"}, "--devices=5: there is no device 4; visible: cpu:0, cpu:1, cpu:2"),
        ({"devices": "0,7"}, "--devices=0,7: there is no device 7"),
    ],
)
def test_devices_that_cannot_share_a_batch_are_refused(config, fields, message):
    with pytest.raises(InputError, match=message):
        fit(config(**fields))


@on_tensorflow
def test_several_devices_need_jax(monkeypatch, capsys):
    assert choose_devices("all") == choose_devices("1") == ["cpu:0"]
    monkeypatch.setattr("keras_mixer.compute.devices._visible", lambda: ["gpu:0", "gpu:1"])
    assert choose_devices("all") == ["gpu:0"]
    assert "2 devices are visible, one is used; all need Keras's JAX" in capsys.readouterr().err
    assert choose_devices("0,0") == ["gpu:0"]
    with pytest.raises(InputError, match="--devices=2: several devices need Keras's JAX backend"):
        choose_devices("2")


@on_tensorflow
def test_an_abort_leaves_time_to_report_who_is_lost():
    """JAX aborts in a thread of its own; another thread reports meanwhile."""
    program = """
import ctypes, os, threading, time
from keras_mixer.compute.process_group import _delay_aborts
_delay_aborts()
threading.Thread(target=ctypes.CDLL(None).abort).start()  # without the lock of Python
time.sleep(1)
os._exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 7


@on_tensorflow
@pytest.mark.parametrize("devices", ["none", "0", "0,", "-1", "1,x", "1.5", ""])
def test_other_names_of_devices_are_refused(config, devices):
    with pytest.raises(InputError, match="--devices"):
        fit(config(devices=devices))


@on_tensorflow
def test_backends_that_are_missing_or_do_not_train_end_in_one_line(command, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    done = command("--num_steps=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: KERAS_BACKEND=torch: expected tensorflow or jax\n"
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match=r"jax needs a package: pip install 'keras_mixer\[jax\]'"),
        quiet_tensorflow(),
    ):
        pass
