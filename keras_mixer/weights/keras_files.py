"""Reads .keras and .weights.h5 files of `build_mixer` models, without Keras.

A .keras file can make Keras call any function, and an HDF5 file can refer to other files. Here
config.json is parsed as data and compared with the layers of `build_mixer`, and the tensors are
read one by one with h5py.
"""

import io
import json
from pathlib import Path

import numpy as np

from keras_mixer.errors import InputError, errors_about
from keras_mixer.model.architecture import FIELDS, Architecture, ModelSpec
from keras_mixer.weights.archives import open_archive
from keras_mixer.weights.tensor_layouts import Layout, Tensor, infer_architecture, renamer, restore

LAYOUT = Layout(
    "a Mixer of keras_mixer in Keras's format",
    renamer(
        (
            ("^stem/", "layers/conv2d/"),
            ("^mixer_block_0/", "layers/mixer_block/"),
            ("^mixer_block_", "layers/mixer_block_"),
            ("/(token|channel)_mixing/", r"/\1s_mlp/"),
            ("^pre_head_layer_norm/", "layers/layer_normalization/"),
            ("^head/", "layers/dense/"),
            ("(kernel|gamma)$", "vars/0"),
            ("(bias|beta)$", "vars/1"),
        )
    ),
)
_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_MEMBERS = {"metadata.json", _CONFIG, _WEIGHTS}
_LARGEST_CONFIG = 4 << 20  # bytes; that of a Mixer of 32 layers has 40 kB
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)

# Module, class and settings of each layer, as `build_mixer` builds it.
_LINEAR = {"activation": "linear", "use_bias": True}
_STEM = {"padding": "valid", "dilation_rate": [1, 1], "groups": 1, "data_format": "channels_last"}
_NORM = {"axis": [-1], "epsilon": 1e-6, "center": True, "scale": True, "rms_scaling": False}
_POOL = {"data_format": "channels_last", "keepdims": False}
_LAYERS = {
    "images": ("keras.layers", "InputLayer", {}),
    "stem": ("keras.layers", "Conv2D", _STEM | _LINEAR),
    "tokens": ("keras.layers", "Reshape", {}),
    "mixer_block": ("keras_mixer.model.layers", "MixerBlock", {}),
    "pre_head_layer_norm": ("keras.layers", "LayerNormalization", _NORM),
    "pre_logits": ("keras.layers", "GlobalAveragePooling1D", _POOL),
    "head": ("keras.layers", "Dense", _LINEAR),
}
_OTHER_FIELDS = ("image_shape", "patch_shape", "channels", "depth", "dim", "num_classes")
_BLOCK_FIELDS = tuple(name for name in FIELDS if name not in _OTHER_FIELDS)


# === .keras ===


def read_archive(path, image_shape=None):
    """Reads a .keras file; see `formats.Format`. It has an image shape of its own."""
    with open_archive(path, "a readable .keras file") as (archive, members):
        if members.keys() != _MEMBERS:
            raise InputError(
                f"{path}: not {LAYOUT.source}: expected {', '.join(sorted(_MEMBERS))} in it, "
                f"received {', '.join(map(repr, sorted(members)[:5])):.300}"
            )
        if members[_CONFIG].file_size > _LARGEST_CONFIG:
            raise InputError(f"{path}: its config.json is larger than that of any Mixer")
        architecture = _read_config(path, archive.read(_CONFIG))
        content = io.BytesIO(archive.read(_WEIGHTS))
    return ModelSpec(architecture), _read(path, content, architecture)[1], LAYOUT.source


def _read_config(path, config):
    try:
        layers = json.loads(config)["config"]["layers"]
        difference = next(_differences(layers), None)
        values = None if difference else _fields({x["name"]: x["config"] for x in layers})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(
            f"{path}: not {LAYOUT.source} ({type(error).__name__}: {error!s:.200})"
        ) from error
    if difference:
        raise InputError(
            f"{path}: not a model of build_mixer, and other layers are never deserialized: "
            f"{difference:.300}; load it in its own program, and save its weights"
        )
    with errors_about(path):
        return Architecture(**values)


def _differences(layers):
    """Yields the differences between layers and those of `build_mixer`."""
    names = [str(layer["name"]) for layer in layers]
    depth = sum(name.startswith("mixer_block_") for name in names)
    expected = ["images", "stem", "tokens", *(f"mixer_block_{i}" for i in range(depth))]
    expected += ["pre_head_layer_norm", "pre_logits", *(["head"] if "head" in names else [])]
    if names != expected:
        other = next((n for n in names if n not in expected), "some missing or in another order")
        yield f"other layers: {other}"
        return
    for layer, name in zip(layers, names, strict=True):
        kind = "mixer_block" if name.startswith("mixer_block_") else name
        module, class_name, settings = _LAYERS[kind]
        if (layer["module"], layer["class_name"]) != (module, class_name):
            yield f"{name} is a {layer['class_name']} of {layer['module']}"
        if kind == "mixer_block":
            settings = {setting: layers[3]["config"][setting] for setting in _BLOCK_FIELDS}
        if kind == "stem":
            settings = {**settings, "strides": layer["config"]["kernel_size"]}
        for setting, value in settings.items():
            if layer["config"][setting] != value:
                yield f"{name} has {setting}={layer['config'][setting]!r}, expected {value!r}"


def _fields(configs):
    """Returns the fields of the `Architecture` from the config of each layer, by name."""
    _, *image_shape, channels = configs["images"]["batch_shape"]
    return {
        "image_shape": tuple(image_shape),
        "patch_shape": tuple(configs["stem"]["kernel_size"]),
        "channels": channels,
        "depth": sum(name.startswith("mixer_block_") for name in configs),
        "dim": configs["stem"]["filters"],
        "num_classes": configs["head"]["units"] if "head" in configs else 0,
        **{setting: configs["mixer_block_0"][setting] for setting in _BLOCK_FIELDS},
    }


# === .weights.h5 ===


def read_weights(path, image_shape=None):
    """Reads a .weights.h5 file; see `formats.Format`.

    The file does not contain the activation; the default, `"gelu"`, is assumed.
    """
    architecture, arrays = _read(path, Path(path), None, image_shape)
    return ModelSpec(architecture), arrays, LAYOUT.source


def _read(path, content, architecture, image_shape=None):
    import h5py

    tensors, datasets = {}, {}

    def add(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer/"):
            _check_storage(name, item)
            tensors[name], datasets[name] = Tensor(item.shape, item.dtype.name), item

    try:
        with h5py.File(content, "r") as file:
            file.visititems(add)  # each object once, and no links to others
            architecture = architecture or infer_architecture(
                path, LAYOUT, tensors, image_shape, activation="gelu"
            )
            read = lambda name: datasets[name][()]  # noqa: E731
            return architecture, restore(path, LAYOUT, architecture, tensors, read)
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise InputError(f"{path}: not a readable HDF5 file of weights ({error!s:.300})") from error


def _check_storage(name, dataset):
    """Refuses a dataset unless this file stores all its values, contiguous and uncompressed."""
    plan = dataset.id.get_create_plist()
    if dataset.is_virtual or plan.get_external_count():
        raise ValueError(f"the values of {name} lie in another file")
    if plan.get_nfilters() or dataset.chunks:
        raise ValueError(f"{name} is compressed or in chunks, which Keras does not write")
    size = dataset.dtype.itemsize * int(np.prod(dataset.shape or (0,), dtype=object))
    if dataset.shape is None or dataset.id.get_storage_size() != size:
        raise ValueError(f"{name} declares {size} bytes, but holds another number")
