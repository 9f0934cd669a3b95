"""Reads pretrained weights of any known format into a `ModelSpec` and arrays.

TensorFlow is not imported, so that errors are reported within a second.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import logger
from keras_mixer.model.architecture import ModelSpec, variant_values
from keras_mixer.model.variants import MIXER, VARIANTS
from keras_mixer.weights import keras_files, model_folder, official, timm
from keras_mixer.weights.download import fetch, release_named
from keras_mixer.weights.registry import SCHEME, release_of
from keras_mixer.weights.resize import resize_weights
from keras_mixer.weights.tensor_layouts import check_fit, check_values, expected_shapes

# From file name ending to function of (path, image_shape) that returns (spec, arrays, source).
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
    "a run directory, an official .npz, timm's .safetensors or .pth, our .keras or .weights.h5, "
    "official:NAME for a released file, or preset:NAME for one that is included"
)
PRESET = "preset:"
INCLUDED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}

# What failed downloads contain instead of weights: (start of the file, what it is, advice).
_FAILED_DOWNLOADS = (
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
        source: Description of the file; empty for a model folder.
    """

    spec: ModelSpec
    arrays: dict[str, np.ndarray]
    source: str = ""


def read_pretrained(path, image_shape=None):
    """Reads pretrained weights of any known format, without executing code from the file.

    Args:
        path: As in `load_mixer`.
        image_shape: (height, width) in pixels, or None. Only for files that do not have it, but the
            number of patches: it is taken where it fits, else a square grid is.

    Returns:
        A `Pretrained`.

    Raises:
        InputError: If the path does not exist, or is damaged or of an unknown format.
    """
    if str(path).startswith(SCHEME):
        return _read_release(release_named(str(path).removeprefix(SCHEME)), image_shape)
    if str(path).startswith(PRESET):
        return _recognize(_included(str(path).removeprefix(PRESET)), image_shape)
    _refuse_remote(path)
    with path_errors(path):
        return _recognize(Path(path), image_shape)


def read_unadapted(path, image_shape=None):
    """Reads pretrained weights that are used as they are, so that an image shape must be theirs.

    Args, Returns, Raises: As `read_pretrained`; also InputError if their images have another shape.
    """
    pretrained = read_pretrained(path, image_shape)
    own = pretrained.spec.architecture.image_shape
    if image_shape is not None and tuple(image_shape) != own:
        given, own = (",".join(map(str, shape)) for shape in (image_shape, own))
        raise InputError(
            f"{path}: --image_shape={given} is not that of its images, {own}, and weights are not "
            f"adapted here; leave it out, or train with --checkpoint"
        )
    return pretrained


def _read_release(release, image_shape):
    file = fetch(release.name)
    try:
        return _recognize(file, image_shape)
    except InputError as error:
        raise InputError(f"{error}; delete {file} to have it downloaded again") from error


def _included(name):
    """Returns the path of weights that are part of the package."""
    if name not in INCLUDED:
        raise InputError(f"{PRESET}{name}: expected one of {', '.join(INCLUDED)}")
    return INCLUDED[name]


def _recognize(path, image_shape):
    for folder in (path / "best", path):
        if model_folder.is_model_folder(folder):
            return _read_folder(folder)
    if not path.exists():
        hint = f"; did you mean {PRESET}{path}?" if str(path) in INCLUDED else ""
        raise InputError(f"{path}: no such checkpoint{hint}")
    read = next((read for end, read in READERS.items() if path.name.endswith(end)), None)
    if not path.is_file() or read is None:
        raise InputError(f"{path}: not a checkpoint; expected {KNOWN}{_hint(path)}")
    _refuse_failed_download(path)
    pretrained, release = Pretrained(*read(path, image_shape)), release_of(path)
    if release:
        return pretrained._replace(source=f"{pretrained.source} ({release.provenance})")
    return pretrained


def _read_folder(folder):
    spec, (arrays, _) = model_folder.read_spec(folder), model_folder.read_weights(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    check_fit(folder, shapes, expected_shapes(spec.architecture))
    check_values(folder, arrays)
    return Pretrained(spec, arrays)


def _hint(path):
    if path.suffix in (".h5", ".hdf5"):
        return "; whole models in HDF5 are programs: save it with model.save_weights"
    return ""


def _refuse_remote(path):
    if re.match(r"[a-zA-Z][\w+.-]+://|\\\\", str(path)):
        raise InputError(f"{path}: only local files are read; download it first")


def _refuse_failed_download(path):
    with open(path, "rb") as file:
        head = file.read(512)
    for pattern, what, advice in _FAILED_DOWNLOADS:
        if re.match(pattern, head, re.IGNORECASE):
            raise InputError(f"{path}: not weights, but {what}; {advice}")


def check_order(spec, image_shape=None, patch_shape=None):
    """Refuses other shapes for a model of permuted pixels: their order would be another one.

    Args:
        spec: `ModelSpec` of the weights.
        image_shape: (height, width) of the new images; None for the same.
        patch_shape: The same of the new patches.
    """
    sizes, kind = spec.architecture, spec.preprocessing.permutation
    shapes = sizes.image_shape, sizes.patch_shape
    wanted = tuple(image_shape or shapes[0]), tuple(patch_shape or shapes[1])
    if kind != "none" and wanted != shapes:
        images, patches = ("x".join(map(str, shape)) for shape in shapes)
        raise InputError(
            f"weights of permuted pixels ({kind}) cannot be adapted to another size, where the "
            f"order is another one; expected images of {images} and patches of {patches}"
        )


def adapt_pretrained(pretrained, image_shape=None, patch_shape=None, resize_tokens="auto"):
    """Returns a `Pretrained` adapted to another image or patch shape, and prints the changes.

    Args, Raises: As `resize.resize_weights`, and `check_order`.
    """
    check_order(pretrained.spec, image_shape, patch_shape)
    architecture, arrays, changes = resize_weights(
        pretrained.spec.architecture, pretrained.arrays, image_shape, patch_shape, resize_tokens
    )
    for sentence in changes:
        logger.info(sentence)
    spec = pretrained.spec.replace(architecture=architecture)
    return pretrained._replace(spec=spec, arrays=arrays)


def announce(pretrained, path):
    """Prints the summary of a `Pretrained` unless it is from a model folder; returns it."""
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
    rows, columns = sizes.patch_shape
    return f"{sizes.depth} layers of {sizes.dim} channels, patches of {rows}×{columns}"
