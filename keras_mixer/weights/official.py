"""Reads and writes official checkpoints: .npz files in the two layouts of the Flax code.

Sources of names and shapes: google-research/vision_transformer, `vit_jax/models_mixer.py`; for the
older layout, before Flax linen: google-research/big_vision, `models/mlp_mixer.py`. Kernels have the
same axes as in Keras, so nothing is transposed.
"""

import io
import math
import tokenize

import ml_dtypes  # noqa: F401  # adds bfloat16 to NumPy
import numpy as np

from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically
from keras_mixer.model.architecture import DEFAULTS, ModelSpec, Preprocessing
from keras_mixer.weights.archives import open_archive
from keras_mixer.weights.tensor_layouts import (
    Layout,
    Tensor,
    find_weights,
    infer_architecture,
    renamer,
    restore,
    store,
)

_NORMS = ((r"layer_norm_(\d)/", r"LayerNorm_\1/"), ("/gamma$", "/scale"), ("/beta$", "/bias"))
LINEN = Layout(
    "an official Mixer checkpoint",
    renamer((*_NORMS, (r"mixer_block_(\d+)/", r"MixerBlock_\1/"), (r"dense_(\d)/", r"Dense_\1/"))),
)
BEFORE_LINEN = Layout(
    "an official Mixer checkpoint of the older layout",
    renamer(
        (
            *_NORMS,
            ("^stem/", "embedding/"),
            ("^pre_head_layer_norm/", "Mixer/encoder_norm/"),
            (r"mixer_block_(\d+)/", r"Mixer/encoderblock_\1/"),
            (r"(token|channel)_mixing/dense_0/(\w+)$", r"\1_mixing_phase_0/\g<2>1"),
            (r"(token|channel)_mixing/dense_1/(\w+)$", r"\1_mixing_phase_0/\g<2>2"),
        )
    ),
)

_WRAPPERS = ("params/", "opt/target/", "target/")  # of big_vision and Flax's training states
_BFLOAT16 = np.dtype("V2")  # what NumPy makes of bfloat16 in a file

# Released files are evaluated as in the paper: short side to 256 pixels, center crop of 224
# (big_vision, `configs/load_and_eval.py`); files fine-tuned for other classes are not.
_RELEASED_CLASSES, _RELEASED_CROP = (1000, 21843), 0.875
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What evaluating a header raises; the last two, for one of deep nesting.
_HEADER_ERRORS = (ValueError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)


def read(path, image_shape=None):
    """Reads an official checkpoint; see `formats.Format`."""
    with open_archive(path, "a readable .npz checkpoint") as (archive, members):
        headers = {
            name.removesuffix(".npy"): _read_header(archive, info) for name, info in members.items()
        }
        older = any(f"{prefix}embedding/kernel" in headers for prefix in ("", *_WRAPPERS))
        layout = BEFORE_LINEN if older else LINEN
        stem = layout.rename("stem/kernel")
        names, note = find_weights(headers, stem, _WRAPPERS, left_out=("opt/", "extra/"))
        tensors = {name: _tensor(name, *headers[stored]) for name, stored in names.items()}
        architecture = infer_architecture(path, layout, tensors, image_shape, activation="gelu")

        def load(name):
            with archive.open(members[f"{names[name]}.npy"]) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            array = array.view("bfloat16") if array.dtype == _BFLOAT16 else array
            return array.reshape(tensors[name].shape)

        arrays = restore(path, layout, architecture, tensors, load)
    released = architecture.num_classes in _RELEASED_CLASSES
    preprocessing = Preprocessing(eval_crop=_RELEASED_CROP if released else 0.0)
    return ModelSpec(architecture, preprocessing=preprocessing), arrays, layout.source + note


def _read_header(archive, info):
    """Returns (shape, dtype) of a member, checked against its size, before NumPy allocates it."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{info.filename} is of version {version} of the .npy format")
        try:
            shape, _, dtype = _HEADERS[version](file)
        except _HEADER_ERRORS as error:
            raise ValueError(f"{info.filename} has no readable header") from error
        size = info.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects, which are never unpickled")
    if any(side < 0 for side in shape) or dtype.itemsize * math.prod(shape) != size:
        raise ValueError(f"{info.filename} declares {dtype} {shape}, but holds {size} bytes")
    return shape, dtype


def _tensor(name, shape, dtype):
    kind = "bfloat16" if dtype == _BFLOAT16 else dtype.name
    return Tensor(_without_ones(name, shape), kind)


def _without_ones(name, shape):
    """Removes the leading axes of size 1 that MLP weights have in older files."""
    rank = 2 if "/kernel" in name else 1
    while "_phase_0/" in name and len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape


def write(path, spec, arrays):
    """Writes an official checkpoint in the linen layout; see `formats.Format`."""
    for name in sorted(DEFAULTS.keys() - {"channels"}):
        value = getattr(spec.architecture, name)
        if value != DEFAULTS[name]:
            raise InputError(
                f"{path}: official checkpoints only store a Mixer with {name}={DEFAULTS[name]}, "
                f"received {value}; convert it to a model folder, or .safetensors for an activation"
            )
    content = io.BytesIO()
    np.savez(content, **store(LINEN, arrays))
    write_atomically(path, content.getvalue())
