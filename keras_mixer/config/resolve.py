"""Fills the values that a Config leaves open, and checks values that depend on each other.

Precedence: the values given, then the checkpoint, the variant, and the dataset's defaults.
"""

import dataclasses
import math
import re

from keras_mixer.config.options import format_value, named_as_flags
from keras_mixer.config.presets import OF_MIXER_TRAINING
from keras_mixer.config.training import DEFAULT_DEPTH, DEFAULT_DIM, DEFAULT_WARMUP, Config
from keras_mixer.data.datasets import dataset_row
from keras_mixer.errors import InputError
from keras_mixer.model.architecture import (
    DEFAULTS,
    MIXER_FIELDS,
    Architecture,
    ModelSpec,
    variant_values,
)
from keras_mixer.model.variants import MIXER
from keras_mixer.weights.resize import resized_architecture


def resolve(config, dataset, checkpoint=None):
    """Fills a Config from the checkpoint, the variant and the data.

    Args:
        config: `Config`, as given.
        dataset: `Dataset`.
        checkpoint: `Architecture` of the weights to start from, or None.

    Returns:
        (config, spec): a `Config` with every value filled, and the `ModelSpec` of its model.

    Raises:
        InputError: If values contradict each other; the message names the flags.
    """
    with named_as_flags(Config):
        num_classes, channels = len(dataset.class_names), dataset.channels
        _check_data(config, num_classes, channels, checkpoint)
        filled = {
            "num_classes": num_classes,
            "eval_split": dataset.split_to_score(config.eval_split),
        }
        for values in (
            _from_checkpoint(config, checkpoint),
            variant_values(config.variant),
            _defaults(config, num_classes),
        ):
            for name, value in values.items():
                if getattr(config, name) is None and name not in filled:
                    filled[name] = value
        given, config = config, dataclasses.replace(config, **filled)
        architecture = Architecture.of_model(**config.architecture(), channels=channels)
        _check_baseline(given, architecture)
        spec = ModelSpec(architecture, dataset.class_names, config.preprocessing(), config.loss)
        sizes = {name: getattr(architecture, name) for name in config.architecture()}
        return _consistent(dataclasses.replace(config, **sizes)), spec


def _check_data(config, num_classes, channels, checkpoint):
    if config.num_classes not in (None, num_classes):
        raise InputError(
            f"--num_classes={config.num_classes}: the data hold {num_classes} classes; "
            f"leave the flag out, or give {num_classes}"
        )
    if checkpoint and checkpoint.channels != channels:
        raise InputError(
            f"--checkpoint={config.checkpoint}: it was trained on images of "
            f"{checkpoint.channels} channels, --dataset={config.dataset} has {channels}"
        )


def _check_baseline(given, architecture):
    """Refuses options of mixer layers for a baseline, unless they have the values it is given."""
    if architecture.model == MIXER:
        return
    neutral = {name: getattr(architecture, name) for name in MIXER_FIELDS}
    for name in (*neutral, *OF_MIXER_TRAINING):
        value = neutral.get(name, getattr(Config, name, None))
        if getattr(given, name) not in (None, value):
            raise InputError(
                f"--{name}={format_value(getattr(given, name))} is for mixer layers and would "
                f"change nothing with --model={architecture.model}; leave it out"
            )


def _from_checkpoint(config, checkpoint):
    """Returns the checkpoint's architecture as a dict; raises if the flags contradict it.

    Only the shapes of images and patches may differ, as the weights are adapted to them.
    """
    if checkpoint is None:
        return {}
    names = config.architecture().keys() - {"num_classes"}
    adapted = resized_architecture(
        checkpoint, config.image_shape, config.patch_shape, config.resize_tokens
    )
    for name in names:
        given, value = getattr(config, name), getattr(adapted, name)
        if given is not None and given != value:
            resized = "" if value == getattr(checkpoint, name) else " once it is resized"
            raise InputError(
                f"--{name}={format_value(given)}: the checkpoint {config.checkpoint} has "
                f"{name} {format_value(value)}{resized}; leave the flag out to take that over"
            )
    for name, value in variant_values(config.variant).items():
        if getattr(checkpoint, name) != value and getattr(config, name) is None:
            raise InputError(
                f"--variant={config.variant} has {name} {format_value(value)}, the checkpoint "
                f"{config.checkpoint} {name} {format_value(getattr(checkpoint, name))}; leave "
                f"--variant out"
            )
    return {name: getattr(adapted, name) for name in names}


def _defaults(config, num_classes):
    row = dataset_row(config.dataset)
    return {
        "image_shape": row.image_shape,
        "patch_shape": row.patch_shape,
        "model": MIXER,
        "depth": DEFAULT_DEPTH,
        "dim": DEFAULT_DIM,
        **{name: value for name, value in DEFAULTS.items() if hasattr(config, name)},
        "head_bias": -math.log(num_classes) if config.loss == "sigmoid" else 0.0,
        "warmup_step": min(DEFAULT_WARMUP, config.num_steps // 3),
        "drop_every": math.ceil(config.num_steps / 3) if config.scheduler == "step" else None,
    }


def _consistent(config):
    """Returns the config, after checking values that depend on each other."""
    for refused, message in (*_contradictions(config), *_options_without_effect(config)):
        if refused:
            raise InputError(message)
    return config


def _contradictions(config):
    """Yields (whether it is refused, message) for values that cannot be right together."""
    epochs = config.schedule_unit == "epoch"
    warmup, length = ("warmup_epochs", "epochs") if epochs else ("warmup_step", "num_steps")
    yield (
        config.warmup_step >= config.num_steps,
        f"--{warmup}={config.warmup_step} must be below --{length}={config.num_steps}; "
        f"give one of them another value",
    )
    yield (
        config.randaugment and config.randaugment[0] == 0,
        f"--randaugment={format_value(config.randaugment)}: expected n,m with n at least 1; "
        f"leave the flag out for none",
    )
    yield (
        config.randaugment and min(config.image_shape) < 3,
        f"--randaugment needs images of at least 3 pixels a side, "
        f"--image_shape={format_value(config.image_shape)}",
    )
    yield (
        config.batch_size % config.accumulation,
        f"--accumulation={config.accumulation} must divide --batch_size={config.batch_size}, "
        f"which counts the images of a whole step",
    )
    yield (
        not re.fullmatch("all|[1-9][0-9]{0,3}|[0-9]{1,4}(,[0-9]{1,4})+", config.devices),
        f"--devices={config.devices}: expected all, a number of devices, or indices, as in 0,2",
    )
    yield (
        config.freeze != "none" and config.checkpoint is None,
        f"--freeze={config.freeze} without --checkpoint would train a head on the features of "
        f"random weights; give a checkpoint, or leave --freeze out",
    )
    yield (
        not (config.token_mixing or config.channel_mixing),
        "--token_mixing=false and --channel_mixing=false together leave nothing to train in "
        "the mixer layers; leave one of them out",
    )


def _options_without_effect(config):
    """Yields (whether it is refused, message) for options that would change nothing."""
    yield (
        config.resize_tokens != Config.resize_tokens and config.checkpoint is None,
        f"--resize_tokens={config.resize_tokens} is for a --checkpoint of other images or "
        f"patches and would change nothing without one; leave it out",
    )
    yield (
        config.optimizer != "sgd" and config.momentum != Config.momentum,
        f"--momentum={config.momentum} is for --optimizer=sgd and would change nothing "
        f"with --optimizer={config.optimizer}; leave it out",
    )
    drops, no_drops = ((options.drop_every, options.drop_factor) for options in (config, Config))
    yield (
        config.scheduler != "step" and drops != no_drops,
        f"--drop_every and --drop_factor are for --scheduler=step and would change nothing "
        f"with --scheduler={config.scheduler}; leave them out",
    )
    for name in ("layer_decay", "dropout", "stochastic_depth"):
        yield (
            config.freeze != "none" and getattr(config, name) != getattr(Config, name),
            f"--{name}={getattr(config, name)} is for training the backbone, which "
            f"--freeze={config.freeze} does not; leave one of them out",
        )
