"""Reads timm's Mixers from .safetensors and .pth (with torch), and writes .safetensors.

Source of names and shapes: huggingface/pytorch-image-models, `timm/models/mlp_mixer.py`. Kernels
have the output axis first, and GELU is exact. The preprocessing is in a config.json beside the
file, see `timm_config`.
"""

import contextlib
import json

import ml_dtypes  # noqa: F401  # adds bfloat16 to NumPy
from safetensors import SafetensorError, safe_open

from keras_mixer.errors import InputError, errors_about
from keras_mixer.files import pack, write_atomically
from keras_mixer.model.architecture import DEFAULTS, ModelSpec
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
from keras_mixer.weights.timm_config import apply_config, read_config, unconfigured

_METADATA = "keras_mixer"  # key of the spec, as JSON, in files by `write`
_WRITTEN_HERE = "a Mixer of keras_mixer in timm's format"
_OLDEST_TORCH = (2, 10)  # weights_only is unsafe before: CVE-2025-32434, CVE-2026-24747
# Keys of the weights in files of training programs, the first of several preferred, as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = tuple(f"{name}." for name in (*_WRAPPERS, "module", "_orig_mod"))
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
UNCONFIGURED = unconfigured(LAYOUT.source)


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
            if not written_here:
                return _read(path, tensors, file.get_tensor, image_shape)
            with errors_about(f"{path}: its metadata does not describe a Mixer"):
                spec = ModelSpec.from_json(json.loads(written_here))
            arrays = restore(path, LAYOUT, spec.architecture, tensors, file.get_tensor)
            return spec, arrays, _WRITTEN_HERE
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable .safetensors checkpoint ({error})") from error


def _read(path, tensors, read, image_shape):
    """Returns (spec, arrays, source) from the tensors of a file and the config.json beside it."""
    names, found = find_weights(tensors, LAYOUT.rename("stem/kernel"), _PREFIXES)
    tensors = {name: tensors[stored] for name, stored in names.items()}
    values, declared, source = read_config(path, LAYOUT.source)
    shape = declared or image_shape
    spec = ModelSpec(infer_architecture(path, LAYOUT, tensors, shape, activation="gelu_erf"))
    arrays = restore(path, LAYOUT, spec.architecture, tensors, lambda name: read(names[name]))
    spec, arrays, note = apply_config(path, values, declared, spec, arrays)
    return spec, arrays, source + found + note


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
        read = lambda name: state[name].detach().float().numpy()  # noqa: E731
        return _read(path, tensors, read, image_shape)


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
    """Returns a dict from name to tensor; those in inner dicts have their key as a prefix."""
    if isinstance(content, dict):
        inner = {key: content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)}
        flat = {f"{key}.{name}": value for key in inner for name, value in inner[key].items()}
        content = flat or content
    names = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not names or not all(hasattr(value, "untyped_storage") for value in content.values()):
        raise InputError(f"{path}: not {LAYOUT.source}: expected a dict from names to tensors")
    return content
