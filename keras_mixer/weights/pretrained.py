"""Reads pretrained weights of any format into a `ModelSpec` and arrays.

TensorFlow is not imported, so that errors are reported within a second.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import logger
from keras_mixer.model.architecture import ModelSpec, format_shape, variant_values
from keras_mixer.model.variants import MIXER, VARIANTS
from keras_mixer.weights import model_folder
from keras_mixer.weights.download import fetch
from keras_mixer.weights.formats import find_format, list_formats
from keras_mixer.weights.registry import SCHEME, release_of
from keras_mixer.weights.resize import resize_weights

PRESET = "preset:"
INCLUDED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}

# What failed downloads contain instead of weights: start of the file, what it is and how to fix it.
_FAILED_DOWNLOADS = {
    rb"\s*<(!doctype|html|\?xml)": "a web page; download the file itself",
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    rb"$": "empty; download it again",
}


class Pretrained(NamedTuple):
    """Pretrained weights and the spec of their model.

    Attributes:
        spec: `ModelSpec`.
        arrays: dict from variable path to array.
        source: Description of the file; empty for a model folder.
    """

    spec: ModelSpec
    arrays: dict[str, np.ndarray]
    source: str = ""


def read_pretrained(path, image_shape=None):
    """Reads pretrained weights of any format, without executing code from the file.

    Args:
        path: As in `load_mixer`.
        image_shape: As in `formats.Format`.

    Returns:
        A `Pretrained`.

    Raises:
        InputError: If the path does not exist, or is damaged or of an unknown format.
    """
    text = str(path)
    if text.startswith(SCHEME):
        file = fetch(text.removeprefix(SCHEME))
        try:
            return _read(file, image_shape)
        except InputError as error:
            raise InputError(f"{error}; delete {file} to download it again") from error
    if text.startswith(PRESET):
        if (name := text.removeprefix(PRESET)) not in INCLUDED:
            raise InputError(f"{path}: expected one of {', '.join(INCLUDED)}")
        return _read(INCLUDED[name], image_shape)
    if re.match(r"[a-zA-Z][\w+.-]+://|\\\\", text):
        raise InputError(f"{path}: only local files are read; download it first")
    with path_errors(path):
        return _read(Path(path), image_shape)


def _read(path, image_shape):
    for folder in (path / "best", path):
        if model_folder.is_model_folder(folder):
            return Pretrained(*model_folder.read(folder))
    if (path / "config.json").is_file() and (path / model_folder.WEIGHTS).is_file():
        path = path / model_folder.WEIGHTS  # a folder as the Hugging Face hub has it
    if not path.exists():
        hint = f"; did you mean {PRESET}{path}?" if str(path) in INCLUDED else ""
        raise InputError(f"{path}: no such checkpoint{hint}")
    form = find_format(path) if path.is_file() and path.suffix else None
    if form is None:
        hint = "; a whole model in HDF5 can execute code: save it with model.save_weights"
        raise InputError(
            f"{path}: not a checkpoint; expected a run directory, {list_formats()}, "
            f"{SCHEME}NAME (downloaded) or {PRESET}NAME (part of the package)"
            f"{hint if path.suffix in ('.h5', '.hdf5') else ''}"
        )
    _check_start(path)
    pretrained, release = Pretrained(*form.read(path, image_shape)), release_of(path)
    if release:
        return pretrained._replace(source=f"{pretrained.source} ({release.provenance})")
    return pretrained


def _check_start(path):
    with open(path, "rb") as file:
        start = file.read(512)
    for pattern, what in _FAILED_DOWNLOADS.items():
        if re.match(pattern, start, re.IGNORECASE):
            raise InputError(f"{path}: not weights, but {what}")


def read_unadapted(path, image_shape=None):
    """Reads pretrained weights that are used as they are, whose images must have the given shape.

    Args, Returns, Raises: As `read_pretrained`; also InputError if their images have another shape.
    """
    pretrained = read_pretrained(path, image_shape)
    own = pretrained.spec.architecture.image_shape
    if image_shape is not None and tuple(image_shape) != own:
        raise InputError(
            f"{path}: its images have the shape {format_shape(own)}, received --image_shape="
            f"{format_shape(image_shape)}, to which this command does not adapt weights; leave it "
            f"out, or train with --checkpoint"
        )
    return pretrained


def adapt_pretrained(pretrained, image_shape=None, patch_shape=None, resize_tokens="auto"):
    """Returns a `Pretrained` adapted to another image or patch shape, and logs the changes.

    Args, Raises: As `resize.resize_weights`.
    """
    architecture, arrays, changes = resize_weights(
        pretrained.spec.architecture, pretrained.arrays, image_shape, patch_shape, resize_tokens
    )
    for change in changes:
        logger.info(change)
    spec = pretrained.spec.replace(architecture=architecture)
    return pretrained._replace(spec=spec, arrays=arrays)


def log_pretrained(pretrained, path):
    """Logs the summary of a `Pretrained` unless it is a model folder; returns it."""
    if pretrained.source:
        logger.info(f"{path}: {summary(pretrained)}")
    return pretrained


def summary(pretrained):
    """Returns one line on a `Pretrained`: its source, variant, images, classes and activation."""
    spec, _, source = pretrained
    sizes, shape = spec.architecture, "×".join(map(str, spec.architecture.image_shape))
    return (
        f"{source or 'a Mixer'}: {_describe_sizes(sizes)}, images of {shape} "
        f"({spec.preprocessing}), {sizes.num_classes} classes, {sizes.activation}, "
        f"LayerNorm epsilon 1e-06"
    )


def _describe_sizes(sizes):
    """Returns the name of the variant of an architecture, or its sizes."""
    if sizes.model != MIXER:
        return f"a baseline ({sizes.model}), {sizes.depth} dense layers of {sizes.dim} units"
    for name in VARIANTS:
        values = variant_values(name)
        if all(getattr(sizes, field) == values[field] for field in values.keys() - {"image_shape"}):
            return name
    height, width = sizes.patch_shape
    return f"{sizes.depth} layers of {sizes.dim} channels, patches of {height}×{width}"
