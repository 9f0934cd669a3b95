"""Reads .keras and .weights.h5 files of `build_mixer` models, without Keras.

A .keras file can make Keras call any function, and an HDF5 file can refer to other files. Here
config.json is parsed as data and compared with the layers of `build_mixer`, and the tensors are
read one by one with h5py.
"""

import io
import json
from pathlib import Path

import numpy as np

from keras_mixer.errors import InputError, join_names
from keras_mixer.model.architecture import ModelSpec
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
        image_shape, activation = _read_config(path, archive.read(_CONFIG))
        content = io.BytesIO(archive.read(_WEIGHTS))
    return _read(path, content, image_shape, activation)


def _read_config(path, config):
    """Returns (image_shape, activation) after comparing the layers with those of `build_mixer`."""
    try:
        layers = json.loads(config)["config"]["layers"]
        classes = [layer["class_name"] for layer in layers]
        depth = classes.count("MixerBlock")
        expected = ["InputLayer", "Conv2D", "Reshape", *["MixerBlock"] * depth]
        expected += ["LayerNormalization", "GlobalAveragePooling1D", "Dense"]
        if classes not in (expected, expected[:-1]):
            others = join_names([str(name) for name in classes if name not in expected], most=3)
            raise InputError(
                f"{path}: not a model of build_mixer, and others are never deserialized: its "
                f"layers are {others or 'in another order'}; load it where it was made, and save "
                f"its weights"
            )
        return tuple(layers[0]["config"]["batch_shape"][1:3]), layers[3]["config"]["activation"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise InputError(
            f"{path}: not {LAYOUT.source} ({type(error).__name__}: {error!s:.200})"
        ) from error


def read_weights(path, image_shape=None):
    """Reads a .weights.h5 file; see `formats.Format`.

    The file does not contain the activation; the default, `"gelu"`, is assumed.
    """
    return _read(path, Path(path), image_shape, "gelu")


def _read(path, content, image_shape, activation):
    import h5py

    tensors, datasets = {}, {}

    def add(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer/"):
            _check_storage(name, item)
            tensors[name], datasets[name] = Tensor(item.shape, item.dtype.name), item

    try:
        with h5py.File(content, "r") as file:
            file.visititems(add)  # each object once, and no links to others
            architecture = infer_architecture(path, LAYOUT, tensors, image_shape, activation)
            read = lambda name: datasets[name][()]  # noqa: E731
            arrays = restore(path, LAYOUT, architecture, tensors, read)
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise InputError(f"{path}: not a readable HDF5 file of weights ({error!s:.300})") from error
    return ModelSpec(architecture), arrays, LAYOUT.source


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
