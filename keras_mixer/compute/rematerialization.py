"""Rematerialization: the inside of mixer layers is computed again in the backward pass, not kept.

Dropout and stochastic depth draw the same numbers again. Keras's own `RematScope` would draw others
(3.15.1), so that the gradient would be that of another function.
"""

import contextlib

import keras

from keras_mixer.model.layers import MixerBlock


class _Rematerialization:
    """Mixin: a functional model with the layers of a Mixer, of which it keeps the inputs only."""

    def call(self, inputs, training=None, mask=None):
        if not training:
            return super().call(inputs, training=training, mask=mask)
        x = inputs
        for layer in self.layers[1:]:  # a chain; the first is the input
            is_block = isinstance(layer, MixerBlock)
            x = _compute_twice(layer, x) if is_block else layer(x, training=True)
        return x


def rematerialize(model):
    """Returns a model that needs less memory in training, and shares layers and weights of another.

    Args:
        model: `keras.Model` from `build_mixer`.
    """
    kind = type("RematerializedMixer", (_Rematerialization, type(model)), {})
    return kind(model.inputs, model.outputs, name=model.name)


def _compute_twice(layer, inputs):
    generators = (getattr(part, "seed_generator", None) for part in layer._flatten_layers())
    seeds = {generator: generator.next() for generator in filter(None, generators)}

    def compute(x):
        with _replaying(seeds):
            return layer(x, training=True)

    return keras.remat(compute)(inputs)


@contextlib.contextmanager
def _replaying(seeds):
    """Has seed generators return these seeds; each is asked once in a layer."""
    for generator, seed in seeds.items():
        generator.next = lambda ordered=True, seed=seed: seed
    try:
        yield
    finally:
        for generator in seeds:
            del generator.next
