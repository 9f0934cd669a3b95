"""What several tests need: small images, small datasets, one trained run."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import csv
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_mixer.data.splits import ArrayImages, Dataset
from keras_mixer.files import unseal, write_sealed
from keras_mixer.log import show_messages
from keras_mixer.model.architecture import Architecture

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

if os.environ["KERAS_BACKEND"] == "torch":  # whose tensors NumPy can only read without gradients
    import torch

    torch.set_grad_enabled(False)


@pytest.fixture(autouse=True)
def messages():
    """Prints the library's messages to standard error, as the command line does."""
    show_messages()


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

# Image, patch, grid and widths all differ, so that one in the place of another is noticed.
SMALL = Architecture(
    image_shape=(8, 12), patch_shape=(4, 2), channels=2, depth=3, dim=6, tokens_mlp_dim=5,
    channels_mlp_dim=7, num_classes=3,
)  # fmt: skip


def data_of(class_names, channels):
    """A `Dataset` of these classes without images."""
    train = ArrayImages(np.zeros((0, 8, 8, channels), np.uint8), np.zeros(0, int))
    return Dataset(tuple(class_names), train, None, None, "")


def randomize(model):
    """Fills every weight of a model with noise, biases and norms too; returns the model."""
    generator = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(generator.normal(scale=0.4, size=variable.shape))
    return model


def read_history(run):
    """Returns the rows of a run's history.csv as dicts of strings."""
    with open(run.directory / "history.csv") as file:
        return list(csv.DictReader(file))


def rewrite(path, change):
    """Changes a sealed file by a function that changes its values, and seals it again."""
    values = unseal(json.loads(path.read_text()))
    change(values)
    write_sealed(path, values)


@pytest.fixture(autouse=True, scope="session")
def default_interrupt():
    """SIGINT acts as in a terminal, here and in the processes that tests start.

    A suite that was started in the background ignores it, and so would its children.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The folder that stands in for the user's cache folder, which tests leave alone."""
    os.environ["KERAS_MIXER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def command(tmp_path):
    """Runs `train.py` or another command in a process of its own, in an empty folder."""

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


@pytest.fixture
def interrupted(monkeypatch):
    """Trains, and sends this process a signal after so many steps, as a terminal would."""
    import keras_mixer
    from keras_mixer.signals import Interrupted
    from keras_mixer.training import fit as fit_module

    def run(config, step, number=signal.SIGTERM):
        class Interrupting(fit_module.Saver):
            steps_left = step

            def on_train_batch_end(self, batch, logs=None):
                self.steps_left -= 1
                if self.steps_left == 0:
                    os.kill(os.getpid(), number)
                super().on_train_batch_end(batch, logs)

        with monkeypatch.context() as patch:
            patch.setattr(fit_module, "Saver", Interrupting)
            with pytest.raises(Interrupted) as error:
                keras_mixer.fit(config)
        return error.value

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    yield run
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command in this process, in an empty folder; returns (status, stdout, stderr)."""
    from keras_mixer.__main__ import main

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (main(list(map(str, arguments))), *capsys.readouterr())


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
def before_training(tmp_path, monkeypatch):
    """Returns the compiled model of a run and its first batch, as arrays, without training."""
    import keras

    from keras_mixer.training.fit import fit_run

    class Taken(Exception):
        """Ends the run."""

    def take(model, batches, **options):
        raise Taken(model, next(batches.as_numpy_iterator()))

    def take_from(run):
        run = dataclasses.replace(run, directory=tmp_path / "before_training")
        run.directory.mkdir(exist_ok=True)  # as `open_run` does
        with monkeypatch.context() as patch:
            patch.setattr(keras.Model, "fit", take)
            with pytest.raises(Taken) as taken:
                fit_run(run)
        return taken.value.args

    return take_from


@pytest.fixture
def first_batch(before_training):
    """Returns the first batch that a run is trained on, as arrays."""
    return lambda run: before_training(run)[1]


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
