"""Converts the names and shapes of a Mixer's weights between our variables and file formats.

The architecture is inferred from the names and shapes in a file's header, and the header is
compared with that architecture before any tensor is read.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError, errors_about, join_names
from keras_mixer.model.architecture import Architecture

FLOATS = ("float16", "bfloat16", "float32")  # exact in float32
_MOST_LISTED = 12  # differences in one message
_MOST_LAYERS = 1000


class Layout(NamedTuple):
    """Names and axes of the weights in a file format.

    Attributes:
        source: Description of such a file, for messages.
        rename: Function from variable path to name in the file.
        axes: Function from variable path and rank to the order of its axes in the file.
    """

    source: str
    rename: Callable[[str], str]
    axes: Callable[[str, int], tuple[int, ...]] = lambda name, rank: tuple(range(rank))


class Tensor(NamedTuple):
    """Shape and type, such as `"float32"`, of a tensor in a file's header."""

    shape: tuple[int, ...]
    type: str


# === From a header to an architecture ===


def find_weights(names, stem, wrappers, left_out=()):
    """Finds the weights of a Mixer among the names of tensors that a training program saved.

    Args:
        names: Names of all tensors in the file.
        stem: Name of the stem's kernel in the format.
        wrappers: Prefixes that names may have, also several; earlier ones are preferred.
        left_out: Tuple of prefixes of what is left out beside weights with a prefix.

    Returns:
        (found, note): dict from name in the format to name in the file, which also has all names
        that belong to nothing; and what was done, as text, empty if nothing was.
    """
    pattern = f"((?:{'|'.join(map(re.escape, wrappers))})*){re.escape(stem)}"
    prefixes = [match[1] for name in names if (match := re.fullmatch(pattern, name))]
    rank = lambda p: next((i for i, w in enumerate(wrappers) if p.startswith(w)), len(wrappers))  # noqa: E731
    prefix, *others = sorted(prefixes, key=rank) or [""]
    if not prefix:
        return {name: name for name in names}, ""
    found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    known = {*found.values(), *(other + name for other in others for name in found)}
    state = {name for name in names if name not in known and name.startswith(left_out)}
    found |= {name: name for name in names if name not in known | state}
    note = f", {'EMA weights' if '_ema.' in prefix else 'weights'} under {prefix}"
    note += f", not {', '.join(other or 'those without' for other in others)}" if others else ""
    return found, note + (", without the optimizer's state" if state else "")


def infer_architecture(path, layout, tensors, image_shape, activation):
    """Infers the `Architecture` from the names and shapes of a file's tensors.

    Args:
        path: The file, for messages.
        layout: `Layout`.
        tensors: dict from name in the file to `Tensor`.
        image_shape: As in `formats.Format`.
        activation: string; no file contains it.

    Raises:
        InputError: If they are not those of a Mixer, or an `image_shape` is needed.
    """
    rows, columns, channels, dim = _shape(path, layout, tensors, "stem/kernel", 4)
    blocks = [f"mixer_block_{index}" for index in range(min(len(tensors), _MOST_LAYERS))]
    hidden, patches, depth = {}, None, 0
    for mixing in ("token_mixing", "channel_mixing"):
        kernels = [f"{block}/{mixing}/dense_0/kernel" for block in blocks]
        present = [i for i, kernel in enumerate(kernels) if layout.rename(kernel) in tensors]
        if present:
            depth = max(depth, present[-1] + 1)
            features, hidden[mixing] = _shape(path, layout, tensors, kernels[present[0]], 2)
            patches = features if mixing == "token_mixing" else patches
    head = layout.rename("head/bias")
    classes = _shape(path, layout, tensors, "head/bias", 1)[0] if head in tensors else 0
    with errors_about(path):
        return Architecture(
            image_shape=_image_shape(path, image_shape, patches, (rows, columns)),
            patch_shape=(rows, columns),
            channels=channels,
            depth=depth,
            dim=dim,
            tokens_mlp_dim=hidden.get("token_mixing"),
            channels_mlp_dim=hidden.get("channel_mixing"),
            num_classes=classes,
            activation=activation,
            token_mixing="token_mixing" in hidden,
            channel_mixing="channel_mixing" in hidden,
        )


def _shape(path, layout, tensors, name, rank):
    """Returns the shape of a tensor with its axes in our order."""
    stored = layout.rename(name)
    if stored not in tensors:
        names = join_names([f"{name:.60}" for name in tensors], most=3) or "nothing"
        raise InputError(f"{path}: not {layout.source}: - {stored}; it contains {names}")
    shape = tensors[stored].shape
    if len(shape) != rank or min(shape) < 1:
        raise InputError(
            f"{path}: not {layout.source}: ! {stored} {shape!s:.60}, expected {rank} positive sizes"
        )
    return tuple(shape[axis] for axis in np.argsort(layout.axes(name, rank)))


def _image_shape(path, image_shape, patches, patch_shape):
    """Returns the given shape if it fits the patches, else that of a square grid of them.

    A given shape that does not fit a square grid is the one that the weights are adapted to later.
    """
    if _fits(image_shape, patches, patch_shape):
        return image_shape
    (height, width), side = patch_shape, math.isqrt(patches or 0)
    if patches and side * side == patches:
        return side * height, side * width
    if image_shape is None:
        what = "no token mixing" if patches is None else f"{patches} patches, not a square number,"
        raise InputError(
            f"{path}: it has {what} so the file does not determine the shape of its images; give "
            f"image_shape to load_mixer or train.py, or make a folder that contains it with "
            f"convert --image_shape"
        )
    count = f", and there are {patches} of them" if patches else ""
    given = f"{image_shape!s:.60}".strip("()[]").replace(" ", "")
    raise InputError(
        f"{path}: image_shape={given} does not fit: its patches are {height}×{width} pixels{count}"
    )


def _fits(image_shape, patches, patch_shape):
    try:
        counts = [divmod(side, patch) for side, patch in zip(image_shape, patch_shape, strict=True)]
    except (TypeError, ValueError):  # not two numbers; `Architecture` reports it
        return False
    (rows, below), (columns, right) = counts
    return not (below or right) and patches in (None, rows * columns)


# === Reading and writing weights ===


def check_fit(path, found, expected):
    """Checks that two dicts from name to shape are equal.

    Raises:
        InputError: Lists missing (-) and extra (+) names and differing shapes (!); starts with
            `path`.
    """
    differences = [f"- {name}" for name in expected if name not in found]
    differences += [f"+ {name:.100}" for name in found if name not in expected]
    differences += [
        f"! {name} {tuple(found[name])!s:.60}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if differences:
        more = (
            f"; and {len(differences) - _MOST_LISTED} more"
            if len(differences) > _MOST_LISTED
            else ""
        )
        raise InputError(
            f"{path} does not fit the model: {'; '.join(differences[:_MOST_LISTED])}{more}"
        )


def restore(path, layout, architecture, tensors, read):
    """Reads the weights of a Mixer and converts them to our layout.

    Args:
        path: The file, for messages.
        layout: `Layout` of the file.
        architecture: `Architecture`.
        tensors: dict from name in the file to `Tensor`, of all tensors in the file.
        read: Function from name in the file to array.

    Returns:
        dict from variable path to float32 array.

    Raises:
        InputError: If tensors are missing, extra, not finite, or of another shape or type.
    """
    shapes = architecture.shapes
    stored = {
        layout.rename(name): tuple(shape[axis] for axis in layout.axes(name, len(shape)))
        for name, shape in shapes.items()
    }
    check_fit(path, {name: tensor.shape for name, tensor in tensors.items()}, stored)
    for name, tensor in tensors.items():
        _check_type(path, name, tensor.type)
    arrays = {}
    for name, shape in shapes.items():
        array = np.asarray(read(layout.rename(name)), np.float32)
        _check_finite(path, layout.rename(name), array)
        arrays[name] = np.ascontiguousarray(
            array.transpose(np.argsort(layout.axes(name, len(shape))))
        )
    return arrays


def check_values(path, arrays):
    """Raises an `InputError` for weights in our layout that are not finite floats."""
    for name, array in arrays.items():
        _check_type(path, name, array.dtype.name)
        _check_finite(path, name, array)


def _check_type(path, name, kind):
    if kind not in FLOATS:
        raise InputError(f"{path}: {name} is {kind:.20}, expected one of {', '.join(FLOATS)}")


def _check_finite(path, name, array):
    if not np.isfinite(array).all():
        raise InputError(
            f"{path}: {name} contains NaN or infinity: the file is damaged, or its training "
            f"diverged; use an earlier checkpoint"
        )


def store(layout, arrays):
    """Converts arrays from our layout to that of a format: the inverse of `restore`."""
    return {
        layout.rename(name): np.ascontiguousarray(array.transpose(layout.axes(name, array.ndim)))
        for name, array in arrays.items()
    }


def renamer(rules):
    """Returns a function that applies (pattern, replacement) pairs to a name, in order."""

    def rename(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return rename
