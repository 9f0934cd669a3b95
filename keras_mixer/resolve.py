"""Fills what a Config leaves open, and checks that all of it goes together.

What was given wins, then the checkpoint, then the variant, then the data set's row.
"""

import dataclasses
import math

from keras_mixer.commandline import shown
from keras_mixer.config import ARCHITECTURE, DEFAULT_DEPTH, DEFAULT_DIM, DEFAULT_WARMUP, Config
from keras_mixer.data.datasets import dataset_row
from keras_mixer.errors import InputError
from keras_mixer.model.variants import IMAGE_SHAPE, VARIANTS
from keras_mixer.weights.resize import resized_architecture

SMALLEST_CROP = 0.1


def resolve(config, num_classes, checkpoint=None):
    """Fills everything that was left to the data, the checkpoint, the variant or other fields.

    Args:
        config: `Config`, as given.
        num_classes: int. Number of classes in the data.
        checkpoint: dict of `build_mixer` arguments of the weights to start from, or None.

    Returns:
        A `Config` without open questions.

    Raises:
        InputError: If values contradict each other; the message names both and the mend.
    """
    if config.num_classes not in (None, num_classes):
        raise InputError(
            f"--num_classes={config.num_classes}: the data hold {num_classes} classes; "
            f"leave the flag out, or give {num_classes}"
        )
    filled = {"num_classes": num_classes}
    for source in (
        _from_checkpoint(config, checkpoint),
        _from_variant(config),
        _defaults(config, num_classes),
    ):
        for name, value in source.items():
            if getattr(config, name) is None and name not in filled:
                filled[name] = value
    resolved = dataclasses.replace(config, **filled)
    widths = {
        "tokens_mlp_dim": resolved.tokens_mlp_dim or max(1, resolved.dim // 2),
        "channels_mlp_dim": resolved.channels_mlp_dim or 4 * resolved.dim,
    }
    return _consistent(dataclasses.replace(resolved, **widths))


def _from_checkpoint(config, checkpoint):
    """The checkpoint's architecture; whatever the flags say of it must agree.

    But for the shapes of images and patches, to which the checkpoint is adapted.
    """
    if checkpoint is None:
        return {}
    taken = {name: checkpoint[name] for name in ARCHITECTURE if name != "num_classes"}
    adapted = _adapted(config, checkpoint)
    for name, value in adapted.items():
        given = getattr(config, name)
        if given is not None and given != value:
            raise InputError(
                f"--{name}={shown(given)}: the checkpoint {config.checkpoint} has "
                f"{name}={shown(value)}{'' if value == taken[name] else ' once it is resized'}; "
                f"leave the flag out to take that over"
            )
    for name, value in _from_variant(config).items():
        if taken[name] != value and getattr(config, name) is None:
            raise InputError(
                f"--variant={config.variant} has {name}={shown(value)}, the checkpoint "
                f"{config.checkpoint} {name}={shown(taken[name])}; leave --variant out"
            )
    return adapted


def _adapted(config, checkpoint):
    image_shape = config.image_shape or checkpoint["image_shape"]
    patch_shape = config.patch_shape or checkpoint["patch_shape"]
    _check_division(image_shape, patch_shape)
    adapted = resized_architecture(checkpoint, image_shape, patch_shape, config.resize_tokens)
    return {name: adapted[name] for name in ARCHITECTURE if name != "num_classes"}


def _from_variant(config):
    if config.variant is None:
        return {}
    row = VARIANTS[config.variant]
    return {
        "image_shape": IMAGE_SHAPE,
        "patch_shape": (row.patch, row.patch),
        "depth": row.depth,
        "dim": row.dim,
        "tokens_mlp_dim": row.tokens_mlp_dim,
        "channels_mlp_dim": row.channels_mlp_dim,
    }


def _defaults(config, num_classes):
    row = dataset_row(config.dataset)
    return {
        "image_shape": row.image_shape,
        "patch_shape": row.patch_shape,
        "depth": DEFAULT_DEPTH,
        "dim": DEFAULT_DIM,
        "activation": "gelu",
        "token_mixing": True,
        "channel_mixing": True,
        "head_bias": -math.log(num_classes) if config.loss == "sigmoid" else 0.0,
        "warmup_step": min(DEFAULT_WARMUP, config.num_steps // 3),
    }


def _consistent(config):
    """Checks the values that are right or wrong only together."""
    _check_division(config.image_shape, config.patch_shape)
    if config.resize_tokens != Config.resize_tokens and config.checkpoint is None:
        raise InputError(
            f"--resize_tokens={config.resize_tokens} is for a --checkpoint of other images or "
            f"patches and would change nothing without one; leave it out"
        )
    if config.warmup_step >= config.num_steps:
        raise InputError(
            f"--warmup_step={config.warmup_step} must be below --num_steps={config.num_steps}"
        )
    if config.randaugment and config.randaugment[0] == 0:
        raise InputError(
            f"--randaugment={shown(config.randaugment)}: expected n,m with n at least 1; leave the "
            f"flag out to do without"
        )
    if config.randaugment and min(config.image_shape) < 3:
        raise InputError(
            f"--randaugment needs images of at least 3 pixels a side, "
            f"--image_shape={shown(config.image_shape)}"
        )
    check_eval_crop(config.eval_crop)
    if config.batch_size % config.accumulation:
        raise InputError(
            f"--accumulation={config.accumulation} must divide --batch_size={config.batch_size}, "
            f"which counts the images of a whole step"
        )
    if config.optimizer != "sgd" and config.momentum != Config.momentum:
        raise InputError(
            f"--momentum={config.momentum} is for --optimizer=sgd and would change nothing "
            f"with --optimizer={config.optimizer}; leave it out"
        )
    _check_freezing(config)
    if not (config.token_mixing or config.channel_mixing):
        raise InputError(
            "--token_mixing=false and --channel_mixing=false together leave nothing to train in "
            "the mixer layers; leave one of them out"
        )
    return config


def _check_freezing(config):
    """A frozen backbone has to know something, and what acts on its training would do nothing."""
    if config.freeze == "none":
        return
    if config.checkpoint is None:
        raise InputError(
            f"--freeze={config.freeze} without --checkpoint would train a head on the features of "
            f"random weights; give a checkpoint, or leave --freeze out"
        )
    for name in ("layer_decay", "dropout", "stochastic_depth"):
        if getattr(config, name) != getattr(Config, name):
            raise InputError(
                f"--{name}={getattr(config, name)} is for training the backbone, which "
                f"--freeze={config.freeze} does not; leave one of them out"
            )


def check_eval_crop(eval_crop):
    """Refuses a share of the image so small that scaling it would fill the memory.

    Raises:
        InputError: If it is above 0 and below `SMALLEST_CROP`.
    """
    if 0 < eval_crop < SMALLEST_CROP:
        raise InputError(
            f"--eval_crop={eval_crop}: expected 0, or at least {SMALLEST_CROP}; every image "
            f"is enlarged by its inverse"
        )


def _check_division(image_shape, patch_shape):
    for side, image, patch in zip(("height", "width"), image_shape, patch_shape, strict=True):
        if image % patch:
            nearest = [n for n in (image // patch * patch, -(-image // patch) * patch) if n]
            raise InputError(
                f"--patch_shape={shown(patch_shape)} does not divide "
                f"--image_shape={shown(image_shape)}: the {side} {image} is no multiple of "
                f"{patch}; the nearest that are: {' and '.join(map(str, nearest))}"
            )
