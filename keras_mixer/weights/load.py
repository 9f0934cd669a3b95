"""From a path to a model with its weights, or a refusal that says what does not fit."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer import console
from keras_mixer.errors import InputError, path_errors
from keras_mixer.model.variants import VARIANTS
from keras_mixer.weights import keras_files, native, official, timm
from keras_mixer.weights.download import fetch, release_named
from keras_mixer.weights.layouts import check_fit, expected_shapes
from keras_mixer.weights.registry import SCHEME, release_of
from keras_mixer.weights.resize import resize_checkpoint

HEAD = ("head/kernel", "head/bias")

# By the end of a file's name: from (path, image_shape) to (description, arrays, source).
READERS = {
    ".npz": official.read,
    ".safetensors": timm.read_safetensors,
    ".pth": timm.read_torch,
    ".pt": timm.read_torch,
    ".bin": timm.read_torch,
    ".keras": keras_files.read_archive,
    ".weights.h5": keras_files.read_weights,
}
KNOWN = (
    "a run directory, an official .npz, timm's .safetensors or .pth, our .keras or .weights.h5, or "
    "official:NAME for a released file"
)

# What is saved in place of weights when a download goes wrong, by how it begins.
_DISGUISES = (
    (rb"\s*<(!doctype|html|\?xml)", "a web page", "download the file itself"),
    (
        rb"version https://git-lfs",
        "the pointer that git keeps of a large file",
        "run `git lfs pull`",
    ),
    (rb"$", "empty", "download it again"),
)


class Checkpoint(NamedTuple):
    """A model as it was read: what it is, and its weights.

    Attributes:
        description: `native.Description`.
        arrays: dict from variable path to array.
        source: What the file is; empty for our own format, whose description says all.
    """

    description: native.Description
    arrays: dict[str, np.ndarray]
    source: str = ""


def read_checkpoint(path, image_shape=None):
    """Recognises a checkpoint and reads it, without TensorFlow and without running anything in it.

    Args:
        path: A run directory, its best/, an official .npz of either layout, timm's .safetensors or
            .pth (which needs torch), a .keras or .weights.h5 of a model of `build_mixer`, or
            `official:NAME`, a key of `registry.OFFICIAL`, which is downloaded once.
        image_shape: (height, width) in pixels, where the file cannot tell it.

    Returns:
        A `Checkpoint`.

    Raises:
        InputError: If nothing is there, or it is of no known format, or damaged.
    """
    if str(path).startswith(SCHEME):
        return _released(release_named(str(path).removeprefix(SCHEME)), image_shape)
    _refuse_remote(path)
    with path_errors(path):
        return _recognise(Path(path), image_shape)


def _released(release, image_shape):
    """The checkpoint of a released file, downloaded if it is not in the cache yet."""
    file = fetch(release.name)
    try:
        return _recognise(file, image_shape)
    except InputError as error:
        raise InputError(f"{error}; delete {file} to have it downloaded again") from error


def _recognise(path, image_shape):
    for folder in (path / "best", path):
        if native.is_native(folder):
            return _read_native(folder)
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    read = next((read for end, read in READERS.items() if path.name.endswith(end)), None)
    if not path.is_file() or read is None:
        raise InputError(f"{path}: not a checkpoint; expected {KNOWN}{_hint(path)}")
    _refuse_disguised(path)
    checkpoint, release = Checkpoint(*read(path, image_shape)), release_of(path)
    if release:
        return checkpoint._replace(source=f"{checkpoint.source} ({release.provenance})")
    return checkpoint


def _read_native(folder):
    description, (arrays, _) = native.read_description(folder), native.read_weights(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    check_fit(folder, shapes, expected_shapes(description.architecture))
    return Checkpoint(description, arrays)


def _hint(path):
    if path.suffix in (".h5", ".hdf5"):
        return "; whole models in HDF5 are programs: save it with model.save_weights"
    return ""


def _refuse_remote(path):
    if re.match(r"[a-zA-Z][\w+.-]+://|\\\\", str(path)):
        raise InputError(f"{path}: only local files are read; download it first")


def _refuse_disguised(path):
    with open(path, "rb") as file:
        head = file.read(512)
    for beginning, what, mend in _DISGUISES:
        if re.match(beginning, head, re.IGNORECASE):
            raise InputError(f"{path}: not weights, but {what}; {mend}")


def load_mixer(path, image_shape=None, patch_shape=None, resize_tokens="auto", **overrides):
    """Loads a Mixer with its weights, adapted to other images or patches if asked for.

    Args:
        path: A run directory, its best/, an official .npz of either layout, timm's .safetensors or
            .pth (which needs torch), a .keras or .weights.h5 of a model of `build_mixer`, or
            `official:NAME`, a key of `registry.OFFICIAL`, which is downloaded once.
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
    checkpoint = introduced(read_checkpoint(path, image_shape), path)
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

    model = build_mixer(**introduced(checkpoint, path).description.architecture, **overrides)
    assign_weights(model, checkpoint.arrays, path)
    return model


def introduced(checkpoint, path):
    """Says what a file of others was taken to be, once; returns the checkpoint.

    Args:
        checkpoint: `Checkpoint`.
        path: Where it comes from.
    """
    if checkpoint.source:
        console.say(f"{path}: {summary(checkpoint)}")
    return checkpoint._replace(source="")


def summary(checkpoint):
    """Returns one line on what a checkpoint is, and how its source computes and sees images.

    Args:
        checkpoint: `Checkpoint`.
    """
    description, _, source = checkpoint
    a = description.architecture
    sizes = (a["depth"], a["dim"], a["tokens_mlp_dim"], a["channels_mlp_dim"], a["patch_shape"])
    known = (
        name
        for name, row in VARIANTS.items()
        if sizes == (*row[:2], row.tokens_mlp_dim, row.channels_mlp_dim, (row.patch, row.patch))
    )
    (height, width), (rows, columns) = a["image_shape"], a["patch_shape"]
    variant = next(
        known, f"{a['depth']} layers of {a['dim']} channels, patches of {rows}×{columns}"
    )
    return (
        f"{source or 'a Mixer'}: {variant}, images of {height}×{width} in [-1, 1] "
        f"(eval_crop {description.eval_crop}), {a['num_classes']} classes, "
        f"{a['activation']}, LayerNorm epsilon 1e-06"
    )


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
    check_fit(
        path,
        {name: array.shape for name, array in arrays.items()},
        {name: tuple(variable.shape) for name, variable in wanted.items()},
    )
    for name, variable in wanted.items():
        variable.assign(arrays[name])
