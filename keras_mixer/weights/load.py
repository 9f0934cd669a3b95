"""From a path to a model with its weights, or a refusal that says what does not fit."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer import console
from keras_mixer.errors import InputError, path_errors
from keras_mixer.weights import native, official
from keras_mixer.weights.resize import resize_checkpoint

HEAD = ("head/kernel", "head/bias")


class Checkpoint(NamedTuple):
    """A model as it was read: what it is, and its weights.

    Attributes:
        description: `native.Description`.
        arrays: dict from variable path to array.
    """

    description: native.Description
    arrays: dict[str, np.ndarray]


def read_checkpoint(path, image_shape=None):
    """Recognises a checkpoint and reads it, without TensorFlow.

    Args:
        path: A run directory, its best/, or an official .npz file.
        image_shape: (height, width) in pixels, where the file cannot tell it.

    Returns:
        A `Checkpoint`.

    Raises:
        InputError: If nothing is there, or it is of no known format, or damaged.
    """
    _refuse_remote(path)
    with path_errors(path):
        return _recognise(Path(path), image_shape)


def _recognise(path, image_shape):
    for folder in (path / "best", path):
        if native.is_native(folder):
            return Checkpoint(native.read_description(folder), native.read_weights(folder)[0])
    if path.is_file() and path.suffix == ".npz":
        architecture, arrays = official.read(path, image_shape)
        return Checkpoint(native.Description(architecture, None), arrays)
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    raise InputError(f"{path}: not a checkpoint; expected a run directory or an official .npz file")


def _refuse_remote(path):
    if re.match(r"[a-zA-Z][\w+.-]+://|\\\\", str(path)):
        raise InputError(f"{path}: only local files are read; download it first")


def load_mixer(path, image_shape=None, patch_shape=None, resize_tokens="auto", **overrides):
    """Loads a Mixer with its weights, adapted to other images or patches if asked for.

    Args:
        path: A run directory, its best/, or an official .npz file.
        image_shape: (height, width) of the images to come, in pixels. Where it is another than the
            checkpoint's, the weights are adapted, and what was done is printed. Needed where the
            file cannot tell its own, which is when the number of its patches is no square.
            Defaults to the checkpoint's.
        patch_shape: (height, width) of the patches to come, in pixels, likewise.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`. How token mixing is adapted:
            `"tile"` as in the paper's appendix C, to be trained further; `"interpolate"`, to be
            used as it is; or `"auto"`, which tiles where the grid grows by whole factors.
        **overrides: Further arguments for `build_mixer` that leave the weights as they are, such
            as `dtype` or `dropout`.

    Returns:
        A functional `keras.Model`, as `build_mixer` describes it.

    Raises:
        InputError: If the checkpoint cannot be read, does not fit the model it describes, or
            cannot be adapted as asked for.
    """
    checkpoint = read_checkpoint(path, image_shape)
    adapted = adapt_checkpoint(checkpoint, image_shape, patch_shape, resize_tokens)
    return model_of(adapted, path, **overrides)


def adapt_checkpoint(checkpoint, image_shape=None, patch_shape=None, resize_tokens="auto"):
    """Adapts a checkpoint to other images or patches, and says aloud what was done.

    Args:
        checkpoint: `Checkpoint`.
        image_shape: (height, width) in pixels, or None for the checkpoint's.
        patch_shape: (height, width) in pixels, or None for the checkpoint's.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`.

    Returns:
        A `Checkpoint`.

    Raises:
        InputError: As `resize.resize_checkpoint` does.
    """
    description = checkpoint.description
    architecture, arrays, done = resize_checkpoint(
        description.architecture, checkpoint.arrays, image_shape, patch_shape, resize_tokens
    )
    for sentence in done:
        console.say(sentence)
    return checkpoint._replace(
        description=description._replace(architecture=architecture), arrays=arrays
    )


def model_of(checkpoint, path, **overrides):
    """Builds the model of a checkpoint that was read, with its weights. See `load_mixer`.

    Args:
        checkpoint: `Checkpoint`.
        path: Where it comes from, for the message.
        **overrides: Further arguments for `build_mixer`.
    """
    from keras_mixer.model.mixer import build_mixer

    model = build_mixer(**checkpoint.description.architecture, **overrides)
    assign_weights(model, checkpoint.arrays, path)
    return model


def model_weights(model):
    """Returns the model's weights as a dict from variable path to array, without random states."""
    from keras.ops import convert_to_numpy

    return {variable.path: convert_to_numpy(variable.value) for variable in model.weights}


def assign_weights(model, arrays, path, fresh_head=False):
    """Fills every weight of a model from arrays of the same names and shapes.

    Args:
        model: `keras.Model` from `build_mixer`.
        arrays: dict from variable path to array.
        path: Where the arrays come from, for the message.
        fresh_head: bool. Leave the model's own head as it is.

    Raises:
        InputError: Lists what is missing (-), extra (+) and of another shape (!).
    """
    wanted = {variable.path: variable for variable in model.weights}
    if fresh_head:
        wanted = {name: variable for name, variable in wanted.items() if name not in HEAD}
        arrays = {name: array for name, array in arrays.items() if name not in HEAD}
    faults = [f"- {name}" for name in wanted if name not in arrays]
    faults += [f"+ {name}" for name in arrays if name not in wanted]
    faults += [
        f"! {name} {arrays[name].shape}, expected {tuple(variable.shape)}"
        for name, variable in wanted.items()
        if name in arrays and arrays[name].shape != tuple(variable.shape)
    ]
    if faults:
        raise InputError(f"{path} does not fit the model: {'; '.join(faults)}")
    for name, variable in wanted.items():
        variable.assign(arrays[name])
