"""Rematerialization (gradient checkpointing): mixer layers keep their inputs alone, to save memory.

The backward pass computes the rest again. Dropout and stochastic depth use the same random numbers
again; with Keras's own `RematScope` they would use others (3.15.1), and the gradient would be that
of another function.
"""

import contextlib

import keras

from keras_mixer.compute.private_apis import private
from keras_mixer.model.layers import MixerBlock
from keras_mixer.model.mixer import computed_by


class _Rematerialization:
    """Mixin: a functional Mixer that keeps the inputs of its mixer layers alone."""

    def call(self, inputs, training=None, mask=None):
        if not training:
            return super().call(inputs, training=training, mask=mask)
        x = inputs
        for layer in self.layers[1:]:  # a chain; the first is the input
            is_block = isinstance(layer, MixerBlock)
            x = _compute_twice(layer, x) if is_block else layer(x, training=True)
        return x


def rematerialize(model):
    """Returns a Mixer with the same layers and weights that needs less memory in training."""
    return computed_by(_Rematerialization, model)


def _compute_twice(layer, inputs):
    layers = private(layer, "_flatten_layers")()
    generators = (getattr(part, "seed_generator", None) for part in layers)
    seeds = {generator: generator.next() for generator in filter(None, generators)}

    def compute(x):
        with _replaying(seeds):
            return layer(x, training=True)

    return keras.remat(compute)(inputs)


@contextlib.contextmanager
def _replaying(seeds):
    """Makes seed generators return these seeds; a layer calls each once."""
    for generator, seed in seeds.items():
        generator.next = lambda ordered=True, seed=seed: seed
    try:
        yield
    finally:
        for generator in seeds:
            del generator.next
