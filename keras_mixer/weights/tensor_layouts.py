"""What the tensors of a Mixer are called and how they are shaped, here and in other files.

A file is understood from the names, shapes and types that its header declares, and held against the
model they describe, before any tensor is read.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError, named
from keras_mixer.model.architecture import Architecture

FLOATS = ("float16", "bfloat16", "float32")  # every value of theirs is a float32, too
_LISTED = 12  # faults told in one message
_MOST_LAYERS = 1000


class Layout(NamedTuple):
    """How a format calls and stores the weights.

    Attributes:
        source: What such a file is, for messages.
        rename: From the name of one of our variables to its name in the file.
        axes: From such a name and the number of its axes to the order of axes in the file.
    """

    source: str
    rename: Callable[[str], str]
    axes: Callable[[str, int], tuple[int, ...]] = lambda name, rank: tuple(range(rank))


class Tensor(NamedTuple):
    """What a file declares of a tensor: shape, and type as a string such as `"float32"`."""

    shape: tuple[int, ...]
    type: str


# === Names and shapes ===


def expected_shapes(architecture):
    """Returns a dict from the name of every variable to its shape, in the model's order.

    Args:
        architecture: `Architecture`.
    """
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
    """Returns the `Architecture` that the shapes of a file's tensors amount to.

    Args:
        path: The file, for messages.
        layout: `Layout`.
        tensors: dict from name in the file to `Tensor`.
        image_shape: (height, width) in pixels, or None: images, and the grid, are square.
        activation: string, which no file says.

    Raises:
        InputError: If they are not a Mixer's, or leave the shape of its images open.
    """
    rows, columns, channels, dim = _shape(path, layout, tensors, "stem/kernel", 4)
    blocks = [f"mixer_block_{index}" for index in range(min(len(tensors), _MOST_LAYERS))]
    hidden, patches, depth = {}, None, 0
    for mixing in ("token_mixing", "channel_mixing"):
        kernels = [f"{block}/{mixing}/dense_0/kernel" for block in blocks]
        there = [i for i, kernel in enumerate(kernels) if layout.rename(kernel) in tensors]
        if there:
            depth = max(depth, there[-1] + 1)
            features, hidden[mixing] = _shape(path, layout, tensors, kernels[there[0]], 2)
            patches = features if mixing == "token_mixing" else patches
    head = layout.rename("head/bias")
    classes = _shape(path, layout, tensors, "head/bias", 1)[0] if head in tensors else 0
    with named(path):
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
    theirs = layout.rename(name)
    if theirs not in tensors:
        some = ", ".join(f"{name:.60}" for name in list(tensors)[:3]) or "nothing"
        raise InputError(
            f"{path}: not {layout.source}: - {theirs}; it holds {some}"
            f"{f' and {len(tensors) - 3} more' if len(tensors) > 3 else ''}"
        )
    shape = tensors[theirs].shape
    if len(shape) != rank or min(shape) < 1:
        raise InputError(
            f"{path}: not {layout.source}: ! {theirs} {shape!s:.60}, expected {rank} positive sizes"
        )
    return tuple(shape[axis] for axis in np.argsort(layout.axes(name, rank)))


def _image_shape(path, image_shape, patches, patch_shape):
    rows, columns = patch_shape
    if patches is not None:
        side = round(patches**0.5)
        if side * side == patches:
            return side * rows, side * columns
    if image_shape is None:
        what = "without token mixing" if patches is None else f"its {patches} patches are no square"
        raise InputError(
            f"{path}: {what} grid, so the file cannot tell the shape of its images; load_mixer and "
            f"train.py take it as image_shape"
        )
    height, width = image_shape
    count = (height // rows) * (width // columns)
    if height % rows or width % columns or patches not in (None, count):
        raise InputError(
            f"{path}: image_shape={height},{width} does not fit: its patches are {rows}×{columns} "
            f"pixels, and there are {patches} of them"
        )
    return height, width


# === Holding a file against its architecture ===


def check_fit(path, found, wanted):
    """Refuses tensors that are not exactly those of a model.

    Args:
        path: Where they come from, for the message.
        found: dict from name to shape.
        wanted: dict from name to shape.

    Raises:
        InputError: Lists what is missing (-), extra (+) and of another shape (!).
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
    """Reads the weights of a Mixer, every one that it needs and none besides.

    Args:
        path: The file, for messages.
        layout: `Layout`.
        architecture: `Architecture`.
        tensors: dict from name in the file to `Tensor`: all that is in it.
        read: Function from such a name to an array of the shape declared.

    Returns:
        dict from the name of a variable to a float32 array in our layout.

    Raises:
        InputError: If a tensor is missing, extra, of another shape or type, or not finite.
    """
    shapes = expected_shapes(architecture)
    stored = {
        layout.rename(name): tuple(shape[axis] for axis in layout.axes(name, len(shape)))
        for name, shape in shapes.items()
    }
    check_fit(path, {name: tensor.shape for name, tensor in tensors.items()}, stored)
    for name, tensor in tensors.items():
        if tensor.type not in FLOATS:
            raise InputError(
                f"{path}: {name} is {tensor.type:.20}, expected one of {', '.join(FLOATS)}"
            )
    arrays = {}
    for name, shape in shapes.items():
        array = np.asarray(read(layout.rename(name)), np.float32)
        if not np.isfinite(array).all():
            raise InputError(
                f"{path}: {layout.rename(name)} holds NaN or infinity: the file is damaged, or "
                f"its training diverged; take an earlier one"
            )
        arrays[name] = np.ascontiguousarray(
            array.transpose(np.argsort(layout.axes(name, len(shape))))
        )
    return arrays


def store(layout, arrays):
    """Returns our arrays under the names and in the layout of a format; see `restore`."""
    return {
        layout.rename(name): np.ascontiguousarray(array.transpose(layout.axes(name, array.ndim)))
        for name, array in arrays.items()
    }


def renamer(rules):
    """Returns a function that applies regular expressions to a name, one after the other.

    Args:
        rules: Pairs of a pattern and its replacement.
    """

    def rename(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return rename
