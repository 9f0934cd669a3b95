"""Fine-tuning: frozen backbone (linear probe) and layer-wise learning-rate decay."""

import math

HEAD = "head"


def freeze_backbone(model):
    """Freezes all layers but the head, for a linear probe, before the model is compiled."""
    for layer in model.layers:
        layer.trainable = layer.name == HEAD


def layer_rates(weights, depth, layer_decay):
    """Returns the layer-wise learning-rate decay factor of each weight.

    It is 1 for the head and the LayerNorm before it; every mixer layer has `layer_decay` times that
    of the layer above, the stem `layer_decay` times that of the first mixer layer.

    Args:
        weights: list of the variables of a model from `build_mixer`.
        depth: int. Number of its mixer layers.
        layer_decay: float in (0, 1].

    Reference:
        `LayerDecayValueAssigner` of BEiT (unilm/beit/optim_factory.py), which timm's
        `param_groups_layer_decay` follows.
    """
    layers_above = {f"mixer_block_{index}": depth - index for index in range(depth)}
    layers_above["stem"] = depth + 1
    return [layer_decay ** layers_above.get(_layer(weight), 0) for weight in weights]


def _layer(weight):
    return weight.path.split("/")[0]


def describe_trained(model, rates=None):
    """Returns a line on which weights are trained, and with `layer_rates` another per layer."""
    everything, trained = model.weights, model.trainable_weights
    if len(trained) < len(everything):
        return (
            f"training the head alone: {len(trained)} of {len(everything)} weights, "
            f"{_size(trained):,} of {_size(everything):,} parameters; the rest is frozen"
        )
    summary = f"training all {len(everything)} weights, {_size(everything):,} parameters"
    if rates is None:
        return summary
    return "\n".join([f"{summary}; share of --lr:", *_table(trained, rates)])


def _size(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def _table(weights, rates):
    """Returns a line per layer, from the head down: its factor of the learning rate, its size."""
    layers = {}
    for weight, rate in zip(weights, rates, strict=True):
        layers.setdefault((_layer(weight), rate), []).append(weight)
    return [
        f"  {layer:20}{rate:<10.4g}{_size(group):>15,} parameters"
        for (layer, rate), group in reversed(layers.items())
    ]
