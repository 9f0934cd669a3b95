"""Pretrained weights: from a file of any known format to a `ModelSpec` and arrays.

Nothing here imports TensorFlow, so a file that cannot be read is refused within a second.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer import console
from keras_mixer.errors import InputError, path_errors
from keras_mixer.model.architecture import ModelSpec, variant_values
from keras_mixer.model.variants import VARIANTS
from keras_mixer.weights import keras_files, model_folder, official, timm
from keras_mixer.weights.download import fetch, release_named
from keras_mixer.weights.registry import SCHEME, release_of
from keras_mixer.weights.resize import resize_weights
from keras_mixer.weights.tensor_layouts import check_fit, expected_shapes

# By the end of a file's name: from (path, image_shape) to (spec, arrays, source).
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

# What is found in place of weights when a download went wrong, by how it begins.
_DISGUISES = (
    (rb"\s*<(!doctype|html|\?xml)", "a web page", "download the file itself"),
    (
        rb"version https://git-lfs",
        "the pointer that git keeps of a large file",
        "run `git lfs pull`",
    ),
    (rb"$", "empty", "download it again"),
)


class Pretrained(NamedTuple):
    """Pretrained weights and the spec of their model.

    Attributes:
        spec: `ModelSpec`.
        arrays: dict from variable path to array.
        source: What the file is; empty for a model folder, whose spec says all.
    """

    spec: ModelSpec
    arrays: dict[str, np.ndarray]
    source: str = ""


def read_pretrained(path, image_shape=None):
    """Recognizes pretrained weights and reads them, without running anything in the file.

    Args:
        path: A run directory, its best/, an official .npz of either layout, timm's .safetensors or
            .pth (which needs torch), a .keras or .weights.h5 of a model of `build_mixer`, or
            `official:NAME`, a key of `registry.OFFICIAL`, which is downloaded once.
        image_shape: (height, width) in pixels, where the file cannot tell it.

    Returns:
        A `Pretrained`.

    Raises:
        InputError: If nothing is there, or it is of no known format, or damaged.
    """
    if str(path).startswith(SCHEME):
        return _released(release_named(str(path).removeprefix(SCHEME)), image_shape)
    _refuse_remote(path)
    with path_errors(path):
        return _recognize(Path(path), image_shape)


def _released(release, image_shape):
    """The weights of a released file, downloaded if it is not in the cache yet."""
    file = fetch(release.name)
    try:
        return _recognize(file, image_shape)
    except InputError as error:
        raise InputError(f"{error}; delete {file} to have it downloaded again") from error


def _recognize(path, image_shape):
    for folder in (path / "best", path):
        if model_folder.is_model_folder(folder):
            return _read_folder(folder)
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    read = next((read for end, read in READERS.items() if path.name.endswith(end)), None)
    if not path.is_file() or read is None:
        raise InputError(f"{path}: not a checkpoint; expected {KNOWN}{_hint(path)}")
    _refuse_disguised(path)
    pretrained, release = Pretrained(*read(path, image_shape)), release_of(path)
    if release:
        return pretrained._replace(source=f"{pretrained.source} ({release.provenance})")
    return pretrained


def _read_folder(folder):
    spec, (arrays, _) = model_folder.read_spec(folder), model_folder.read_weights(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    check_fit(folder, shapes, expected_shapes(spec.architecture))
    return Pretrained(spec, arrays)


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
    for beginning, what, advice in _DISGUISES:
        if re.match(beginning, head, re.IGNORECASE):
            raise InputError(f"{path}: not weights, but {what}; {advice}")


def adapt_pretrained(pretrained, image_shape=None, patch_shape=None, resize_tokens="auto"):
    """Adapts pretrained weights to other images or patches, and prints what was done.

    Args:
        pretrained: `Pretrained`.
        image_shape: (height, width) in pixels, or None for the checkpoint's.
        patch_shape: (height, width) in pixels, or None for the checkpoint's.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`.

    Returns:
        A `Pretrained`.

    Raises:
        InputError: As `resize.resize_weights` does.
    """
    architecture, arrays, done = resize_weights(
        pretrained.spec.architecture, pretrained.arrays, image_shape, patch_shape, resize_tokens
    )
    for sentence in done:
        console.say(sentence)
    spec = pretrained.spec.replace(architecture=architecture)
    return pretrained._replace(spec=spec, arrays=arrays)


def announce(pretrained, path):
    """Prints what a file from elsewhere was taken to be; returns the weights.

    Args:
        pretrained: `Pretrained`.
        path: Where it comes from.
    """
    if pretrained.source:
        console.say(f"{path}: {summary(pretrained)}")
    return pretrained


def summary(pretrained):
    """Returns one line: which Mixer it is, its images, classes, activation and LayerNorm epsilon.

    Args:
        pretrained: `Pretrained`.
    """
    spec, _, source = pretrained
    sizes, shape = spec.architecture, "×".join(map(str, spec.architecture.image_shape))
    return (
        f"{source or 'a Mixer'}: {_variant_of(sizes)}, images of {shape} in [-1, 1] "
        f"({spec.preprocessing}), {sizes.num_classes} classes, {sizes.activation}, "
        f"LayerNorm epsilon 1e-06"
    )


def _variant_of(sizes):
    """The name of a variant that has these sizes, or the sizes."""
    for name in VARIANTS:
        values = variant_values(name)
        if all(getattr(sizes, field) == values[field] for field in values.keys() - {"image_shape"}):
            return name
    rows, columns = sizes.patch_shape
    return f"{sizes.depth} layers of {sizes.dim} channels, patches of {rows}×{columns}"
