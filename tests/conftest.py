"""What several tests need: small images, small data sets, one trained run."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

if os.environ["KERAS_BACKEND"] == "torch":  # whose tensors NumPy can only read without gradients
    import torch

    torch.set_grad_enabled(False)

# A run of a few seconds with every source of randomness switched on.
TINY = {
    "depth": 2,
    "dim": 8,
    "batch_size": 64,
    "num_steps": 3,
    "optimizer": "adamw",
    "lr": 0.01,
    "decay": 0.1,
    "dropout": 0.1,
    "stochastic_depth": 0.2,
    "flip": True,
    "crop_padding": 1,
    "ema": 0.9,
    "jit": "false",
}


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The folder that stands in for the user's cache folder, which tests leave alone."""
    os.environ["KERAS_MIXER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def command(tmp_path):
    """Runs `train.py` or a verb in a process of its own, in an empty folder."""

    def run(*arguments, verb=None, cwd=tmp_path, path=ROOT):
        entry = [str(ROOT / "train.py")] if verb is None else ["-m", "keras_mixer", verb]
        return subprocess.run(
            [sys.executable, *entry, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        )

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A trained and scored run of the digits; read it, do not change it."""
    import keras_mixer
    from keras_mixer.inference.evaluate import score_run

    directory = tmp_path_factory.mktemp("runs") / "trained"
    config = keras_mixer.Config(
        **{**TINY, "dim": 16, "num_steps": 8, "dropout": 0.0, "stochastic_depth": 0.0},
        output_dir=str(directory),
        export=False,
    )
    run = keras_mixer.fit(config)
    score_run(run)
    return run


@pytest.fixture
def write_image():
    """Writes an image file from an array, or from noise of a given shape."""

    def write(path, pixels=(12, 10, 3), seed=0, **options):
        if isinstance(pixels, tuple):
            pixels = np.random.default_rng(seed).integers(0, 256, pixels, np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(path, **options)
        return pixels

    return write


@pytest.fixture(scope="session")
def photos():
    """Two real photographs of 427×640 pixels that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


@pytest.fixture
def folder(tmp_path, write_image, photos):
    """Class folders with 12 PNG and JPEG cut-outs of photographs, of varied size, in 3 classes."""
    china, flower = photos
    for name, photo in (("ant", china), ("bee", flower), ("cat", flower[::-1])):
        for index in range(12):
            suffix = "jpg" if index % 2 else "png"
            cut = photo[10 * index : 20 * index + 20, 30 * index : 38 * index + 24]
            write_image(tmp_path / "data" / name / f"{index}.{suffix}", cut)
    return tmp_path / "data"
