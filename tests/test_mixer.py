"""Tests `keras_mixer/model/mixer.py`."""

import keras
import numpy as np
import pytest
from conftest import GOLDEN, SMALL, randomize

from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.model.architecture import Baseline
from keras_mixer.model.baselines import build_model
from keras_mixer.model.variants import ACTIVATIONS

SIZES = vars(SMALL)


def _images(shape=(8, 12), channels=2, batch=2):
    return np.random.default_rng(1).uniform(-1, 1, (batch, *shape, channels)).astype("float32")


def test_exact_gelu_would_miss_the_official_logits():
    """The tolerance of test_formats.py is tight enough to tell the two GELUs apart."""
    expected = np.load(GOLDEN / "official_mixer_expected.npz")
    shape = expected["images"].shape[1:3]
    model = load_mixer(GOLDEN / "official_mixer.npz", image_shape=shape)
    exact = build_mixer(**vars(model.spec.architecture) | {"activation": "gelu_erf"})
    exact.set_weights(model.get_weights())
    assert np.abs(exact.predict(expected["images"], verbose=0) - expected["logits"]).max() > 1e-5


def test_model_is_functional_and_keeps_its_names():
    model = build_mixer(**SIZES)
    assert isinstance(model, keras.Model)
    assert type(model).__name__ == "Functional"
    paths = [variable.path for variable in model.weights]
    assert paths[0] == "stem/kernel"
    assert "mixer_block_1/token_mixing/dense_0/kernel" in paths
    assert paths[-1] == "head/bias"
    assert model.get_layer("tokens").output.shape == (None, 2 * 6, 6)


def test_new_model_predicts_every_class_equally():
    model = build_mixer(**SIZES)
    np.testing.assert_array_equal(model(_images()), np.zeros((2, 3)))


def test_token_kernels_lie_as_in_the_official_files():
    kernels = {v.path: v.shape for v in build_mixer(**SIZES).weights}
    assert kernels["mixer_block_0/token_mixing/dense_0/kernel"] == (12, 5)
    assert kernels["mixer_block_0/token_mixing/dense_1/kernel"] == (5, 12)


def test_permuted_patches_with_permuted_token_weights_change_nothing():
    """Paper section 3.4: a Mixer does not care for the order of the patches."""
    model = randomize(build_mixer(**SIZES))
    images = _images()
    expected = model.predict(images, verbose=0)
    order = np.random.default_rng(2).permutation(12)
    grid = images.reshape(2, 2, 4, 6, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 12, 4, 2, 2)
    shuffled = grid[:, order].reshape(2, 2, 6, 4, 2, 2).transpose(0, 1, 3, 2, 4, 5)
    for variable in model.weights:
        value = variable.numpy()
        if "token_mixing/dense_0/kernel" in variable.path:
            variable.assign(value[order])
        elif "token_mixing/dense_1" in variable.path:
            variable.assign(value[..., order])
    result = model.predict(shuffled.reshape(images.shape), verbose=0)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image, patch", [((8, 8), (2, 2)), ((6, 10), (3, 5)), ((4, 4), (4, 4))])
def test_shapes(image, patch, channels):
    model = build_mixer(image, patch, channels=channels, depth=1, dim=4, num_classes=2)
    assert model(_images(image, channels)).shape == (2, 2)


def test_each_activation_gives_its_own_logits():
    results = []
    for activation in ACTIVATIONS:
        model = randomize(build_mixer(**SIZES | {"activation": activation}))
        results.append(model.predict(_images(), verbose=0))
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            assert np.abs(one - other).max() > 1e-6


def test_stochastic_depth_rises_linearly_from_zero():
    model = build_mixer(**SIZES | {"depth": 5}, stochastic_depth=0.2)
    rates = [model.get_layer(f"mixer_block_{i}").stochastic_depth for i in range(5)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2])


def test_dropout_acts_in_training_only():
    model = randomize(build_mixer(**SIZES, dropout=0.5))
    images = _images()
    np.testing.assert_array_equal(model(images), model(images))
    change = model(images, training=True) - model(images, training=True)
    assert keras.ops.max(keras.ops.abs(change)) > 1e-4


def test_bfloat16_body_has_a_float32_head():
    model = randomize(build_mixer(**SIZES, dtype="mixed_bfloat16"))
    expected = build_mixer(**SIZES)
    expected.set_weights(model.get_weights())
    logits = model(_images())
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_allclose(logits, expected(_images()), atol=0.1)


def test_arguments_are_those_of_an_architecture():
    """Whose own messages come back; see test_architecture.py."""
    with pytest.raises(InputError, match="patch_shape=3,2 does not divide image_shape=8,12"):
        build_mixer(**SIZES | {"patch_shape": (3, 2)})
    with pytest.raises(InputError, match="num_classes"):
        build_mixer(**SIZES | {"num_classes": None})
    with pytest.raises(TypeError, match="takes from 0 to 2 positional arguments"):
        build_mixer((8, 12), (4, 2), 1, depth=1, dim=4, num_classes=2)


def test_given_values_win_over_the_variant():
    model = build_mixer((64, 64), variant="S/32", depth=1, num_classes=0)
    assert model.get_layer("tokens").output.shape == (None, 4, 512)
    assert model.output_shape == (None, 512)
    assert len([layer for layer in model.layers if layer.name.startswith("mixer_block")]) == 1


@pytest.mark.parametrize("model", ["mixer", "cnn"])
def test_channels_are_last_whatever_keras_is_set_to(model):
    architecture = SMALL if model == "mixer" else Baseline(**SIZES, model="cnn")
    expected = randomize(build_model(architecture))
    keras.config.set_image_data_format("channels_first")
    try:
        other = build_model(architecture)
        other.set_weights(expected.get_weights())
        np.testing.assert_array_equal(other(_images()), expected(_images()))
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_logits_are_nearly_the_same():
    model = randomize(build_mixer(**SIZES, stochastic_depth=0.1))
    expected = keras.ops.convert_to_numpy(model(_images()))
    fresh = build_mixer(**SIZES, stochastic_depth=0.1)
    fresh.set_weights(model.get_weights())
    fresh.quantize("int8")
    difference = np.abs(keras.ops.convert_to_numpy(fresh(_images())) - expected).max()
    assert 0 < difference < 0.1 * np.abs(expected).max()
