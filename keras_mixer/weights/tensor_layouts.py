"""Names and shapes of a Mixer's weights, in our variables and in files of other formats.

The architecture is inferred from names and shapes in a file's header, and the header is compared
with that architecture before any tensor is read.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError, errors_about
from keras_mixer.model.architecture import Architecture
from keras_mixer.model.variants import MIXER

FLOATS = ("float16", "bfloat16", "float32")  # convertible to float32 without loss
_LISTED = 12  # differences listed in one message
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


# === Names and shapes ===


def expected_shapes(architecture):
    """Returns a dict from variable path to shape of an `Architecture`, in the model's order."""
    if architecture.model != MIXER:
        return architecture.shapes
    dim = architecture.dim
    shapes = {
        "stem/kernel": (*architecture.patch_shape, architecture.channels, dim),
        "stem/bias": (dim,),
    }
    mixings = (
        ("token_mixing", "layer_norm_0", architecture.patches, architecture.tokens_mlp_dim),
        ("channel_mixing", "layer_norm_1", dim, architecture.channels_mlp_dim),
    )
    for index in range(architecture.depth):
        for mixing, norm, features, hidden in mixings:
            if getattr(architecture, mixing):
                block = f"mixer_block_{index}"
                shapes |= {f"{block}/{norm}/gamma": (dim,), f"{block}/{norm}/beta": (dim,)}
                shapes |= _dense(f"{block}/{mixing}/dense_0", features, hidden)
                shapes |= _dense(f"{block}/{mixing}/dense_1", hidden, features)
    shapes |= {"pre_head_layer_norm/gamma": (dim,), "pre_head_layer_norm/beta": (dim,)}
    classes = architecture.num_classes
    return shapes | (_dense("head", dim, classes) if classes else {})


def _dense(name, features, units):
    return {f"{name}/kernel": (features, units), f"{name}/bias": (units,)}


# === From a header to an architecture ===


def infer_architecture(path, layout, tensors, image_shape, activation):
    """Infers the `Architecture` from the names and shapes of a file's tensors.

    Args:
        path: The file, for messages.
        layout: `Layout`.
        tensors: dict from name in the file to `Tensor`.
        image_shape: (height, width) in pixels, or None. It is taken where it fits the patches;
            else the patch grid is square.
        activation: string, since no file contains it.

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
        some = ", ".join(f"{name:.60}" for name in list(tensors)[:3]) or "nothing"
        raise InputError(
            f"{path}: not {layout.source}: - {stored}; it holds {some}"
            f"{f' and {len(tensors) - 3} more' if len(tensors) > 3 else ''}"
        )
    shape = tensors[stored].shape
    if len(shape) != rank or min(shape) < 1:
        raise InputError(
            f"{path}: not {layout.source}: ! {stored} {shape!s:.60}, expected {rank} positive sizes"
        )
    return tuple(shape[axis] for axis in np.argsort(layout.axes(name, rank)))


def _image_shape(path, image_shape, patches, patch_shape):
    """Returns the given shape if it fits the patches, else that of a square grid of them.

    One that does not fit a square grid is what the weights are to be adapted to, later.
    """
    if _fits(image_shape, patches, patch_shape):
        return image_shape
    (rows, columns), side = patch_shape, math.isqrt(patches or 0)
    if patches and side * side == patches:
        return side * rows, side * columns
    if image_shape is None:
        what = "without token mixing" if patches is None else f"its {patches} patches are no square"
        raise InputError(
            f"{path}: {what} grid, so the file cannot tell the shape of its images; load_mixer and "
            f"train.py take it as image_shape; convert with --image_shape writes a folder that has "
            f"it"
        )
    count = f", and there are {patches} of them" if patches else ""
    raise InputError(
        f"{path}: image_shape={_text(image_shape)} does not fit: its patches are {rows}×{columns} "
        f"pixels{count}"
    )


def _fits(image_shape, patches, patch_shape):
    try:
        counts = [divmod(side, patch) for side, patch in zip(image_shape, patch_shape, strict=True)]
    except (TypeError, ValueError):  # no pair of numbers, which others report
        return False
    (rows, below), (columns, right) = counts
    return not (below or right) and patches in (None, rows * columns)


def _text(shape):
    return re.sub(r"[\s()\[\]]", "", f"{shape!s:.60}")


# === Reading and writing weights ===


def check_fit(path, found, wanted):
    """Checks that two dicts from name to shape are equal.

    Raises:
        InputError: Lists missing (-) and extra (+) names and differing shapes (!); starts with
            `path`.
    """
    faults = [f"- {name}" for name in wanted if name not in found]
    faults += [f"+ {name:.100}" for name in found if name not in wanted]
    faults += [
        f"! {name} {tuple(found[name])!s:.60}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        listed = "; ".join(faults[:_LISTED])
        raise InputError(f"{path} does not fit the model: {listed}{more}")


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
    shapes = expected_shapes(architecture)
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
    """Raises an `InputError` for weights in our layout that are no floats, or not finite."""
    for name, array in arrays.items():
        _check_type(path, name, array.dtype.name)
        _check_finite(path, name, array)


def _check_type(path, name, kind):
    if kind not in FLOATS:
        raise InputError(f"{path}: {name} is {kind:.20}, expected one of {', '.join(FLOATS)}")


def _check_finite(path, name, array):
    if not np.isfinite(array).all():
        raise InputError(
            f"{path}: {name} holds NaN or infinity: the file is damaged, or its training diverged; "
            f"take an earlier one"
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
