"""Tests `keras_mixer/model/layers.py`."""

import keras
import numpy as np
import pytest

from keras_mixer.model.layers import MixerBlock, MlpBlock, StochasticDepth

INPUTS = (
    np.random.default_rng(0).normal(size=(4, 6, 8)).astype("float32")
)  # batch, patches, channels

LAYERS = {
    "mlp": (MlpBlock, {"hidden_dim": 5, "activation": "relu", "dropout": 0.1}),
    "depth": (StochasticDepth, {"rate": 0.3, "seed": 1}),
    "mixer": (
        MixerBlock,
        {"tokens_mlp_dim": 3, "channels_mlp_dim": 7, "dropout": 0.1, "stochastic_depth": 0.2},
    ),
    "tokens only": (
        MixerBlock,
        {"tokens_mlp_dim": 3, "channels_mlp_dim": 7, "channel_mixing": False},
    ),
    "channels only": (
        MixerBlock,
        {"tokens_mlp_dim": 3, "channels_mlp_dim": 7, "token_mixing": False},
    ),
}
each_layer = pytest.mark.parametrize("layer_class, arguments", LAYERS.values(), ids=LAYERS.keys())


@each_layer
def test_config_round_trip(layer_class, arguments):
    layer = layer_class(**arguments, name="here", dtype="mixed_bfloat16")
    again = layer_class.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert arguments.items() <= again.get_config().items()
    assert again.dtype_policy.name == "mixed_bfloat16"


@each_layer
def test_eager_and_symbolic_calls_agree(layer_class, arguments):
    layer = layer_class(**arguments)
    eager = layer(INPUTS)
    inputs = keras.Input(INPUTS.shape[1:])
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, *INPUTS.shape[1:])
    np.testing.assert_allclose(model.predict(INPUTS, verbose=0), eager, atol=1e-6)


@each_layer
def test_saved_and_loaded_layer_computes_the_same(layer_class, arguments, tmp_path):
    inputs = keras.Input(INPUTS.shape[1:])
    model = keras.Model(inputs, layer_class(**arguments)(inputs))
    for variable in model.weights:  # biases start at 0 and would hide a mix-up
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        again.predict(INPUTS, verbose=0), model.predict(INPUTS, verbose=0)
    )


@each_layer
def test_bfloat16_is_close_to_float32(layer_class, arguments):
    layer = layer_class(**arguments)
    expected = np.asarray(layer(INPUTS))
    half = layer_class(**arguments, dtype="mixed_bfloat16")
    half.build(INPUTS.shape)
    for mine, other in zip(half.weights, layer.weights, strict=True):
        assert mine.dtype == "float32"
        mine.assign(other)
    result = half(INPUTS)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    np.testing.assert_allclose(keras.ops.cast(result, "float32"), expected, atol=0.1)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    layer = StochasticDepth(0.3, seed=5)
    outputs = np.asarray(layer(np.ones((4000, 2, 3), "float32"), training=True))
    assert np.all(outputs == outputs[:, :1, :1]), "one draw per sample"
    np.testing.assert_allclose(np.unique(outputs), [0, 1 / 0.7], rtol=1e-6)
    assert abs(outputs.mean() - 1) < 0.03  # 4000 draws: 4 standard errors are 0.04


@pytest.mark.parametrize("training, rate", [(False, 0.3), (True, 0.0)])
def test_stochastic_depth_is_the_identity_without_training_or_rate(training, rate):
    np.testing.assert_array_equal(StochasticDepth(rate)(INPUTS, training=training), INPUTS)


def test_block_with_silent_outputs_is_the_identity():
    block = MixerBlock(3, 7)
    block.build(INPUTS.shape)
    for variable in block.weights:
        if "dense_1" in variable.path:
            variable.assign(np.zeros(variable.shape))
    np.testing.assert_array_equal(block(INPUTS), INPUTS)


def _affected(block):
    """Which patches and channels of the output change with patch 2, channel 5 of the input."""
    changed = INPUTS.copy()
    changed[:, 2, 5] += 1
    difference = np.abs(np.asarray(block(changed)) - np.asarray(block(INPUTS))).sum(axis=0) > 1e-6
    return set(np.flatnonzero(difference.any(axis=1))), set(np.flatnonzero(difference.any(axis=0)))


def test_without_token_mixing_patches_do_not_see_each_other():
    patches, channels = _affected(MixerBlock(3, 7, token_mixing=False))
    assert patches == {2}
    assert len(channels) == 8


def test_without_channel_mixing_patches_see_each_other():
    patches, _ = _affected(MixerBlock(3, 7, channel_mixing=False))
    assert len(patches) == 6


def test_token_mlp_is_the_same_for_all_channels():
    """Paper section 2: token mixing is tied across channels, so permuting channels commutes."""
    mlp = MlpBlock(5)
    swapped = INPUTS.transpose(0, 2, 1)  # (batch, channels, patches)
    order = np.random.default_rng(2).permutation(8)
    np.testing.assert_allclose(
        mlp(swapped[:, order]), np.asarray(mlp(swapped))[:, order], atol=1e-6
    )


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"Expected one of gelu, gelu_erf.* Received: 'geluu'"):
        MlpBlock(4, activation="geluu")
