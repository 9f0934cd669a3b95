"""The table of file formats of weights. A new format is a module and an entry."""

from collections.abc import Callable
from typing import NamedTuple

from keras_mixer.weights import keras_files, model_folder, official, timm


class Format(NamedTuple):
    """Functions that read and write a file format of weights, without executing code from files.

    Attributes:
        name: What messages call it.
        read: Function of (path, image_shape) that returns (spec, arrays, source): the `ModelSpec`,
            a dict from variable path to float32 array, and a description of the file, empty for a
            model folder. The image_shape is (height, width) in pixels, or None: files with only the
            number of patches get it if it fits, else a square grid. Raises an `InputError` if the
            file cannot be read, is not a Mixer, or needs an image_shape.
        write: Function of (path, spec, arrays) that creates a file, or None if the format is only
            read. Raises an `InputError` if the format cannot store such a model.
        any_model: bool. Whether it stores baselines, too; other formats only store a Mixer.
    """

    name: str
    read: Callable
    write: Callable | None = None
    any_model: bool = False


# By suffix; a folder has none.
FORMATS = {
    "": Format("model folder", model_folder.read, model_folder.write, any_model=True),
    ".npz": Format("official .npz", official.read, official.write),
    ".safetensors": Format("timm .safetensors", timm.read_safetensors, timm.write),
    ".pth": Format("timm .pth", timm.read_torch),
    ".pth.tar": Format("timm .pth.tar", timm.read_torch),
    ".ckpt": Format("Lightning .ckpt", timm.read_torch),
    ".pt": Format("timm .pt", timm.read_torch),
    ".bin": Format("timm .bin", timm.read_torch),
    ".keras": Format("Keras .keras", keras_files.read_archive),
    ".weights.h5": Format("Keras .weights.h5", keras_files.read_weights),
}


def find_format(path):
    """Returns the `Format` of a `Path` by its suffix, or None."""
    suffix = next((end for end in FORMATS if end and path.name.endswith(end)), path.suffix)
    return FORMATS.get(suffix)


def list_formats(written=False):
    """Returns the names of all formats as text, or only of those that are written."""
    return ", ".join(form.name for form in FORMATS.values() if form.write or not written)
