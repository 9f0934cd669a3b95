"""Tests `keras_mixer/model/baselines.py`: models to compare a Mixer with."""

import dataclasses

import keras
import numpy as np
import pytest
from conftest import randomize

from keras_mixer import Config, InputError, fit, load_mixer
from keras_mixer.model.architecture import Architecture, Baseline, ModelSpec
from keras_mixer.model.baselines import build_model
from keras_mixer.runs.open_run import plan_run
from keras_mixer.weights.convert import convert_weights

MLP = Baseline(
    model="mlp", image_shape=(28, 28), patch_shape=None, channels=1, depth=1, dim=256,
    num_classes=10, activation="relu",
)  # fmt: skip
CNN = MLP.replace(model="cnn", dim=128)
SMALL = MLP.replace(image_shape=(6, 7), channels=3, depth=2, dim=5, num_classes=4)


def relu(x):
    return np.maximum(x, 0)


def convolve(images, kernel, bias):
    """A convolution without padding, by its definition."""
    height, width = images.shape[1] - 2, images.shape[2] - 2
    return sum(
        images[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    ) + bias  # fmt: skip


def computed(architecture, images, weights):
    """The logits, by NumPy."""
    weights, x = iter(weights), images
    if architecture.model == "cnn":
        for _ in range(2):
            x = relu(convolve(x, next(weights), next(weights)))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * rows, : 2 * columns].reshape(len(x), rows, 2, columns, 2, -1).max((2, 4))
    x = x.reshape(len(x), -1)
    for _ in range(architecture.depth):
        x = relu(x @ next(weights) + next(weights))
    return x @ next(weights) + next(weights)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_logits_are_those_of_numpy(model):
    architecture = SMALL.replace(model=model)
    built = randomize(build_model(architecture, dropout=0.5))
    images = np.random.default_rng(0).normal(size=(3, 6, 7, 3)).astype("float32")
    expected = computed(architecture, images, built.get_weights())
    np.testing.assert_allclose(built(images, training=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "architecture, parameters", [(MLP, 784 * 256 + 256 + 2570), (CNN, 1_199_882), (SMALL, 689)]
)
def test_weights_are_as_expected(architecture, parameters):
    """1,199,882 is what PyTorch's MNIST example has."""
    built = build_model(architecture)
    assert built.count_params() == architecture.parameters == parameters
    assert {v.path: tuple(v.shape) for v in built.weights} == architecture.shapes
    headless = build_model(architecture.replace(num_classes=0))
    assert headless.output_shape == (None, architecture.dim)


def test_multiply_adds_are_counted_by_layer():
    assert MLP.multiply_adds == 784 * 256 + 256 * 10
    convolutions = 26 * 26 * 9 * 32 + 24 * 24 * 9 * 32 * 64
    assert CNN.multiply_adds == convolutions + 9216 * 128 + 1280


def test_dropout_is_in_training_alone():
    model = build_model(CNN, dropout=0.5)
    rates = [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    assert rates == [0.25, 0.5]


def test_a_baseline_is_written_and_read():
    spec = ModelSpec(CNN, tuple("0123456789"))
    assert ModelSpec.from_json(spec.to_json()) == spec
    mixer = Architecture(image_shape=(4, 4), patch_shape=(2, 2), depth=1, dim=2, num_classes=2)
    assert "model" not in mixer.to_json(), "as files of earlier versions"
    with pytest.raises(InputError, match="missing: .*image_shape"):
        Architecture.from_json({"model": "mlp"})


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_baseline_is_trained_scored_and_served_as_a_mixer(run, tmp_path, model):
    flags = ["--depth=1", "--dim=32", "--activation=relu", "--dropout=0.2", "--optimizer=adam"]
    status, output, errors = run(
        *("train", f"--model={model}", *flags, "--batch_size=64", "--num_steps=3"),
        *("--output_dir=run", "--lr=0.01"),
    )
    assert status == 0, errors
    assert "of 360 images" in output
    loaded = load_mixer(tmp_path / "run")
    assert loaded.spec.architecture.model == model
    assert run("evaluate", "run")[0] == 0
    status, _, errors = run("fewshot", "run", "--shots=1")
    assert status == 0, errors
    status, _, errors = run("convert", "run", "it.npz")
    assert (status, "this format can only store a Mixer" in errors) == (2, True)
    with pytest.raises(InputError, match="only weights of a Mixer are adapted"):
        load_mixer(tmp_path / "run", image_shape=16)
    convert_weights(tmp_path / "run", tmp_path / "copy")
    again = Config(
        checkpoint=str(tmp_path / "copy"), num_steps=1, batch_size=64, activation="relu",
        output_dir=str(tmp_path / "again"),
    )  # fmt: skip
    assert fit(again).config.model == model, "taken over from the checkpoint"


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_shape": (2, 2)}, {"stochastic_depth": 0.1}, {"remat": True}, {"variant": "S/16"},
        {"tokens_mlp_dim": 5}, {"token_mixing": False}, {"layer_decay": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_mixer_layers_are_refused(fields):
    [name] = fields
    with pytest.raises(InputError, match=f"--{name}=.* is for mixer layers"):
        plan_run(Config(model="mlp", depth=1, dim=8, **fields))


def test_too_small_an_image_for_convolutions():
    with pytest.raises(InputError, match="image_shape=5,9: expected at least 6 pixels"):
        CNN.replace(image_shape=(5, 9))


def test_a_planned_baseline_can_be_planned_again():
    planned = plan_run(Config(model="cnn", depth=1, dim=8))
    assert planned.config.patch_shape == (8, 8)
    assert plan_run(dataclasses.replace(planned.config)).config == planned.config
