"""Reads timm's Mixers from .safetensors and .pth (with torch), and writes .safetensors.

Source of names and shapes: huggingface/pytorch-image-models, `timm/models/mlp_mixer.py`. Kernels
have the output axis first, and GELU is exact. The preprocessing is in the config.json of the
Hugging Face hub beside the file; `source` lists values that it lacks and that are assumed. A mean
or std other than 0.5 is folded into the stem, so that the model's inputs are always in [-1, 1].
"""

import contextlib
import json

import ml_dtypes  # noqa: F401  # adds bfloat16 to NumPy
import numpy as np
from safetensors import SafetensorError, safe_open

from keras_mixer.errors import InputError, errors_about
from keras_mixer.files import pack, write_atomically
from keras_mixer.model.architecture import DEFAULTS, ModelSpec, Preprocessing
from keras_mixer.weights.archives import open_archive
from keras_mixer.weights.tensor_layouts import (
    Layout,
    Tensor,
    infer_architecture,
    renamer,
    restore,
    store,
)

# Values of timm's Mixers, except those called miil, by key in config.json.
_ASSUMED = {"mean": 0.5, "std": 0.5, "crop_pct": 0.875, "interpolation": "bicubic"}
_METADATA = "keras_mixer"  # key of the spec, as JSON, in files by `write`
_WRITTEN_HERE = "a Mixer of keras_mixer in timm's format"
_OLDEST_TORCH = (2, 10)  # weights_only is unsafe before: CVE-2025-32434, CVE-2026-24747
_WRAPPERS = ("state_dict", "model")
_LARGEST_JSON = 4 << 20  # bytes; the header of H/14 has 40 kB
_BOUNDS = {"mean": (-1000, 1000), "std": (0.001, 1000)}  # for pixels from 0 to 255: 127.5
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def _axes(name, rank):
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(rank, (0,))


LAYOUT = Layout(
    "a Mixer of timm",
    renamer(
        (
            ("^stem/", "stem.proj."),
            (r"^mixer_block_(\d+)/", r"blocks.\1."),
            (r"layer_norm_0/", "norm1."),
            (r"layer_norm_1/", "norm2."),
            (r"^pre_head_layer_norm/", "norm."),
            (r"token_mixing/", "mlp_tokens."),
            (r"channel_mixing/", "mlp_channels."),
            (r"dense_0/", "fc1."),
            (r"dense_1/", "fc2."),
            (r"^head/", "head."),
            (r"(kernel|gamma)$", "weight"),
            (r"beta$", "bias"),
        )
    ),
    _axes,
)


# === .safetensors ===


def read_safetensors(path, image_shape=None):
    """Reads a .safetensors file by timm or `write`; see `formats.Format`."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: Tensor(tuple(s.get_shape()), _TYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            }
            written_here = (file.metadata() or {}).get(_METADATA)
            if written_here:
                with errors_about(f"{path}: its metadata does not describe a Mixer"):
                    spec = ModelSpec.from_json(json.loads(written_here))
            else:
                spec = ModelSpec(
                    infer_architecture(path, LAYOUT, tensors, image_shape, activation="gelu_erf")
                )
            arrays = restore(path, LAYOUT, spec.architecture, tensors, file.get_tensor)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable .safetensors checkpoint ({error})") from error
    return (spec, arrays, _WRITTEN_HERE) if written_here else _apply_config(path, spec, arrays)


def write(path, spec, arrays):
    """Writes a .safetensors file that timm can load, with the spec in its metadata.

    See `formats.Format`. timm uses the exact GELU unless given another `act_layer`.
    """
    for name in sorted(DEFAULTS.keys() - {"channels", "activation"}):
        value = getattr(spec.architecture, name)
        if value != DEFAULTS[name]:
            raise InputError(
                f"{path}: timm has no Mixer with {name}={str(value).lower()}; convert it to a "
                f"model folder"
            )
    metadata = {_METADATA: json.dumps(spec.to_json())}
    write_atomically(path, pack(store(LAYOUT, arrays), metadata))


# === config.json ===


def _apply_config(path, spec, arrays):
    """Returns (spec, arrays, source) after applying the config.json beside a file, if any."""
    config = path.with_name("config.json")
    try:
        values, source = _read_config(config) if config.is_file() else ({}, UNCONFIGURED)
        values = _ASSUMED | values
        crop, interpolation = float(values["crop_pct"]), values["interpolation"]
        spec = spec.replace(preprocessing=Preprocessing(crop, interpolation))
        return spec, fold_normalization(arrays, values["mean"], values["std"]), source
    except (OSError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{config}: invalid timm config ({error}); fix or remove it") from error


def _read_config(config):
    """Returns (values, source): the values of a config.json that are used, as a dict."""
    if config.stat().st_size > _LARGEST_JSON:
        raise ValueError("it is too large")
    content = json.loads(config.read_text())
    values = content.get("pretrained_cfg", content)  # older files have the values at the top
    if not isinstance(values, dict):
        raise ValueError("its pretrained_cfg is not an object")
    known = {name: values[name] for name in _ASSUMED if values.get(name) is not None}
    source = f"{LAYOUT.source} with its config.json"
    return known, source if len(known) == len(_ASSUMED) else f"{source} ({_assumed(known)})"


def _assumed(known):
    """Returns the values that are assumed beside known ones, as text."""
    values = [f"{name} {value}" for name, value in _ASSUMED.items() if name not in known]
    return f"assumed: {', '.join(values)}"


# The source of files without a mean and std.
UNCONFIGURED = (
    f"{LAYOUT.source} without the config.json of the Hugging Face hub beside it ({_assumed({})}; "
    f"otherwise put it there, or use keras-mixer convert FILE FOLDER --mean=M --std=S)"
)


def fold_normalization(arrays, mean, std):
    """Folds timm's normalization into the stem, which then takes images in [-1, 1].

    Args:
        arrays: dict from variable path to array, not modified.
        mean, std: Subtracted from images in [0, 1], and divided by: a sequence of one number for
            each channel, or a number for all.

    Returns:
        dict of arrays; the same if mean and std are 0.5.

    Raises:
        InputError: If they are not one number for each channel, or out of bounds.
    """
    kernel = arrays["stem/kernel"].astype(np.float64)
    mean = _per_channel("mean", mean, kernel.shape[2])
    std = _per_channel("std", std, kernel.shape[2])
    if (mean == 0.5).all() and (std == 0.5).all():
        return arrays
    shift = (kernel * ((0.5 - mean) / std)[:, None]).sum((0, 1, 2))
    return arrays | {
        "stem/kernel": (kernel * (0.5 / std)[:, None]).astype(np.float32),
        "stem/bias": (arrays["stem/bias"] + shift).astype(np.float32),
    }


def _per_channel(name, values, channels):
    low, high = _BOUNDS[name]
    array = np.array(values, np.float64)
    array = np.repeat(array, channels) if array.ndim == 0 else array
    if array.shape != (channels,) or not ((low <= array) & (array <= high)).all():
        received = ",".join(map("{:g}".format, array.ravel()))
        raise InputError(
            f"{name}={received:.60}: expected one number for each of {channels} channels, from "
            f"{low} to {high}"
        )
    return array


# === .pth ===


def read_torch(path, image_shape=None):
    """Reads a state dict saved by torch, with `torch.load(weights_only=True)`.

    See `formats.Format`. An `InputError` is also raised if torch is missing or too old, or if the
    file contains more than weights.
    """
    torch = _import_torch(path)
    with open_archive(path, "a .pth file of torch 1.6 or later") as (_, members):
        size = sum(info.file_size for info in members.values())
    with _torch_errors(path):
        state = _unwrap(path, torch.load(path, map_location="cpu", weights_only=True))
        tensors = {
            name: Tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in state.items()
        }
        declared = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if declared > size:  # expanded views of a few values can have any shape
            raise InputError(f"{path}: declares {declared:,} bytes of weights, holds {size:,}")
        architecture = infer_architecture(path, LAYOUT, tensors, image_shape, "gelu_erf")
        arrays = restore(
            path, LAYOUT, architecture, tensors, lambda name: state[name].detach().float().numpy()
        )
    return _apply_config(path, ModelSpec(architecture), arrays)


def _import_torch(path):
    advice = "or convert the file to .safetensors on a machine with torch"
    oldest = ".".join(map(str, _OLDEST_TORCH))
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: .pth files are read by torch, which is not installed: "
            f"pip install 'keras_mixer[torch]', {advice}"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        raise InputError(
            f"{path}: .pth files can execute code in older versions of torch; expected torch >= "
            f"{oldest}, found {torch.__version__}: pip install -U 'torch>={oldest}', {advice}"
        )
    return torch


@contextlib.contextmanager
def _torch_errors(path):
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch does not document what its unpickler raises
        first = "".join(str(error).strip().splitlines()[:1])
        raise InputError(
            f"{path}: holds more than weights, or is damaged, and was not loaded; if you trust "
            f"it, save its state_dict as .safetensors ({type(error).__name__}: {first:.200})"
        ) from error


def _unwrap(path, content):
    """Returns the state dict, which training scripts wrap in a dict under one of two keys."""
    if isinstance(content, dict):
        inner = [v for k, v in content.items() if k in _WRAPPERS and isinstance(v, dict)]
        content = inner[0] if len(inner) == 1 else content
    names = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not names or not all(hasattr(value, "untyped_storage") for value in content.values()):
        raise InputError(f"{path}: not {LAYOUT.source}: expected a dict from names to tensors")
    return content
