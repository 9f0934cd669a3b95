"""Freezing and layer-wise learning rates."""

import math
import re

HEAD = "head"


def freeze_backbone(model):
    """Leaves nothing but the head to be trained: a linear probe.

    Args:
        model: `keras.Model` from `build_mixer`, not compiled yet.
    """
    for layer in model.layers:
        layer.trainable = layer.name == HEAD


def layer_rates(weights, depth, layer_decay):
    """Returns the share of the learning rate that each weight is trained at.

    The head and the LayerNorm before it have the whole of it, every mixer layer `layer_decay`
    times that of the layer above, the stem `layer_decay` times that of the first mixer layer.

    Args:
        weights: list of the variables of a model from `build_mixer`.
        depth: int. Number of its mixer layers.
        layer_decay: float in (0, 1].

    Returns:
        list of floats in (0, 1], in the order of the weights.

    Reference:
        `LayerDecayValueAssigner` of BEiT (unilm/beit/optim_factory.py), which timm's
        `param_groups_layer_decay` follows.
    """
    return [layer_decay ** _layers_above(_layer(weight), depth) for weight in weights]


def _layers_above(layer, depth):
    if layer == "stem":
        return depth + 1
    block = re.fullmatch(r"mixer_block_(\d+)", layer)
    return depth - int(block[1]) if block else 0


def _layer(weight):
    return weight.path.split("/")[0]


def describe_trained(model, rates=None):
    """Tells which weights are trained and at which rates, for the person at the terminal.

    Args:
        model: `keras.Model`, frozen as it will be trained.
        rates: list of the trained weights' shares of the learning rate; None for all of it.

    Returns:
        string: a line, and with rates another per layer, from the head down.
    """
    everything, trained = model.weights, model.trainable_weights
    if len(trained) < len(everything):
        return (
            f"training the head alone: {len(trained)} of {len(everything)} weights, "
            f"{_size(trained):,} of {_size(everything):,} parameters; the rest is frozen"
        )
    summary = f"training all {len(everything)} weights, {_size(everything):,} parameters"
    return (
        summary
        if rates is None
        else "\n".join([f"{summary}; share of --lr:", *_table(trained, rates)])
    )


def _size(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def _table(weights, rates):
    """A line per layer, from the head down: its share of the learning rate and its size."""
    layers = {}
    for weight, rate in zip(weights, rates, strict=True):
        layers.setdefault((_layer(weight), rate), []).append(weight)
    return [
        f"  {layer:20}{rate:<10.4g}{_size(found):>15,} parameters"
        for (layer, rate), found in reversed(layers.items())
    ]
