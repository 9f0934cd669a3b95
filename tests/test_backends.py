"""Tests the model on Keras's other backends: the logits, gradients and weights are TensorFlow's.

A process has one backend, so each question is answered in one of its own, by `tools/on_backend.py`.
"""

import functools
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT

from keras_mixer.weights.model_folder import digest
from keras_mixer.weights.pretrained import read_pretrained

pytestmark = pytest.mark.backends


@pytest.fixture(params=["jax", "torch"])
def backend(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f'{request.param} is not installed: pip install -e ".[test,backends]"')
    return request.param


def run_on(backend, *command):
    """Runs Python under a backend; on the CPU, since GPUs round products of matrices coarsely."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env={
            **os.environ,
            "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    assert done.returncode == 0, f"on {backend}:\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Returns the arrays that a function of `tools/on_backend.py` answers with under a backend."""

    @functools.cache
    def ask(backend, question, *arguments):
        path = tmp_path_factory.mktemp(backend) / "answers.npz"
        run_on(backend, ROOT / "tools" / "on_backend.py", question, path, *arguments)
        with np.load(path) as answers:
            return dict(answers)

    return ask


def test_logits_and_gradients_are_those_of_tensorflow(ask, backend):
    """Within 1e-5 of the largest value of each array, or within 1e-7 where all are below 0.01."""
    expected, received = (ask(b, "logits_and_gradients") for b in ("tensorflow", backend))
    assert received.keys() == expected.keys()
    for name, array in expected.items():
        largest = np.abs(array).max()
        # What is the same for all channels of a token, the next LayerNorm takes away again.
        assert largest > 1e-3 or name.endswith("token_mixing/dense_1/bias"), f"{name} says nothing"
        np.testing.assert_allclose(
            received[name], array, rtol=0, atol=1e-5 * max(largest, 0.01), err_msg=name
        )


def test_official_checkpoint_gives_the_official_logits(ask, backend):
    """They were computed by the real Flax implementation; see `test_mixer.py`."""
    path = GOLDEN / "official_mixer_expected.npz"
    received = ask(backend, "loaded", GOLDEN / "official_mixer.npz", path)
    np.testing.assert_allclose(received["logits"], np.load(path)["logits"], rtol=0, atol=1e-5)
    assert not received["tensorflow"], "loading and predicting import no TensorFlow"


def test_run_trained_on_tensorflow_is_loaded(ask, backend, trained, tmp_path):
    spec, arrays, _ = read_pretrained(trained.directory)
    shape = (5, *spec.architecture.image_shape, spec.architecture.channels)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")
    np.savez(tmp_path / "images.npz", images=images)
    question = ("loaded", trained.directory, tmp_path / "images.npz")
    expected, received = (ask(b, *question) for b in ("tensorflow", backend))
    np.testing.assert_allclose(received["logits"], expected["logits"], rtol=0, atol=1e-5)
    assert received["sha256"] == digest(arrays), "weights go in and out with every bit"


def test_fit_of_keras_learns_and_draws_anew(ask, backend):
    """Stochastic depth draws from states that the compiled step has to hand on."""
    received = ask(backend, "trained")
    assert received["losses"][-1] < 0.7 * received["losses"][0]
    assert np.all(np.any(received["after"] != received["before"], axis=1)), "in both branches"


def test_tests_of_the_model_and_its_weights_pass(backend):
    """Among them: the mean under stochastic depth, bfloat16 with a float32 head, .keras files."""
    subjects = ("mixer", "layers", "architecture", "model_folder")
    files = [f"tests/test_{subject}.py" for subject in subjects]
    run_on(backend, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *files)
