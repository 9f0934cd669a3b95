"""Tests `keras_mixer/model/variants.py`: the paper's Table 1, exactly."""

import keras
import pytest

from keras_mixer import build_mixer
from keras_mixer.model.layers import _FUNCTIONS
from keras_mixer.model.variants import ACTIVATIONS, VARIANTS


@pytest.mark.parametrize("name", VARIANTS)  # no variant can escape
def test_parameter_counts_are_exact(name):
    row = VARIANTS[name]
    model = build_mixer(variant=name, num_classes=1000)
    assert model.count_params() == row.params_1000
    headless = keras.Model(model.inputs, model.get_layer("pre_logits").output)
    assert headless.count_params() == row.params_headless
    keras.backend.clear_session()


def test_widths_are_those_of_the_paper():
    for row in VARIANTS.values():
        assert row.tokens_mlp_dim == row.dim // 2
        assert row.channels_mlp_dim == 4 * row.dim


def test_headless_model_has_the_headless_count():
    model = build_mixer(variant="S/32", num_classes=0)
    assert model.count_params() == VARIANTS["S/32"].params_headless
    assert model.output_shape == (None, 512)


def test_every_activation_has_its_function():
    assert set(ACTIVATIONS) == set(_FUNCTIONS)
