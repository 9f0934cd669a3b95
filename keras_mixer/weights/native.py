"""Our own format: a folder with model.json (what the model is) and model.safetensors (its weights).

The description never changes within a run and the weights are one file, replaced in one step, so
whoever reads the folder while a run writes to it finds a complete model.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError
from keras_mixer.files import pack, write_atomically
from keras_mixer.weights.layouts import check_architecture

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
FORMAT = 1


class Description(NamedTuple):
    """What a model is, and how it is used.

    Attributes:
        architecture: dict of `build_mixer` arguments.
        class_names: One name per class; None where nobody knows.
        eval_crop: float in [0, 1]. How images are fitted; see `data.images.resize_images`.
        probabilities: string, `"softmax"` or `"sigmoid"`: what turns its logits into them.
    """

    architecture: dict
    class_names: tuple[str, ...] | None
    eval_crop: float = 0.0
    probabilities: str = "softmax"


def write_description(folder, description):
    """Writes model.json.

    Args:
        folder: `Path`, made if it does not exist.
        description: `Description`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(as_json(description), indent=2)
    write_atomically(folder / DESCRIPTION, content.encode() + b"\n")


def as_json(description):
    """Returns a `Description` as a dict of JSON values; see `as_description`."""
    return {
        "format": FORMAT,
        **description._asdict(),
        "images": "float, [-1, 1], resized bilinear and antialiased to image_shape",
    }


def write_weights(folder, arrays, **facts):
    """Replaces model.safetensors in one step.

    Args:
        folder: `Path` of the model.
        arrays: dict from variable path, such as `"stem/kernel"`, to array.
        **facts: JSON values kept with the weights, such as the epoch they come from.
    """
    # One entry, since safetensors writes several in an order that changes from run to run.
    metadata = {"keras_mixer": json.dumps({"sha256": digest(arrays), "facts": facts})}
    write_atomically(folder / WEIGHTS, pack(arrays, metadata))


def is_native(path):
    """Tells whether a folder holds a model in this format."""
    return (path / DESCRIPTION).is_file()


def read_description(folder):
    """Returns the `Description` in model.json.

    Raises:
        InputError: If the file is missing, damaged or of another format.
    """
    path = folder / DESCRIPTION
    try:
        return as_description(path, json.loads(path.read_text()))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable model description ({error})") from error


def as_description(path, values):
    """Returns the `Description` that `as_json` wrote, checked.

    Args:
        path: Where it comes from, for the message.
        values: What became of it after JSON.

    Raises:
        InputError: If it is of another format, or describes no Mixer.
        KeyError, TypeError, AttributeError, ValueError: If something is missing or of another type.
    """
    if values["format"] != FORMAT:
        raise InputError(f"{path}: format {values['format']}, expected {FORMAT}")
    architecture = as_architecture(values["architecture"])
    check_architecture(path, architecture)
    names, crop = values["class_names"], values.get("eval_crop", 0.0)
    probabilities = values.get("probabilities", "softmax")
    if names is not None and [type(n) for n in names] != [str] * architecture["num_classes"]:
        raise ValueError(f"class_names: expected {architecture['num_classes']} names")
    if not 0 <= crop <= 1 or probabilities not in ("softmax", "sigmoid"):
        raise ValueError(f"eval_crop={crop!r}, probabilities={probabilities!r}")
    return Description(architecture, names and tuple(names), crop, probabilities)


def read_weights(folder):
    """Returns (arrays, facts) from model.safetensors, held against its sha256.

    Raises:
        InputError: If the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads((file.metadata() or {}).get("keras_mixer", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if record.get("sha256") != digest(arrays):
        raise InputError(f"{path}: damaged, its contents do not match its sha256")
    return arrays, record["facts"]


def digest(arrays):
    """Returns the hexadecimal sha256 of a dict of arrays: names, types, shapes and values."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        sha256.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha256.hexdigest()


def as_architecture(values):
    """Returns `build_mixer` arguments that went through JSON with their shapes as tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
