"""Model folders: model.json (a `ModelSpec`) and model.safetensors (the weights).

The spec never changes within a run and the weights are one file, replaced atomically, so that the
folder holds a complete model at any time, even while a run writes to it.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from keras_mixer.errors import InputError, errors_about
from keras_mixer.files import pack, read_regular, write_atomically
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.weights.tensor_layouts import check_fit, check_values

SPEC, WEIGHTS = "model.json", "model.safetensors"
_MOST_BYTES = 100_000_000  # of model.json
# AttributeError and TypeError: number types that NumPy does not have.
_READ_ERRORS = (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError)


def read(folder, image_shape=None):
    """Reads a model folder; see `formats.Format`. It has an image shape of its own."""
    spec, (arrays, _) = read_spec(folder), read_weights(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    check_fit(folder, shapes, spec.architecture.shapes)
    check_values(folder, arrays)
    return spec, arrays, ""


def write(folder, spec, arrays):
    """Writes a new model folder; see `formats.Format`."""
    write_spec(folder, spec)
    write_weights(folder, arrays)


def write_spec(folder, spec):
    """Writes model.json into a folder, a `Path`, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SPEC, json.dumps(spec.to_json(), indent=2).encode() + b"\n")


def write_weights(folder, arrays, **metadata):
    """Writes model.safetensors atomically.

    Args:
        folder: `Path` of the model.
        arrays: dict from variable path, such as `"stem/kernel"`, to array.
        **metadata: JSON values stored with the weights, such as the epoch they come from.

    Returns:
        The `digest` of the arrays.
    """
    sha256 = digest(arrays)
    # One entry, because safetensors writes several in varying order.
    entry = {"keras_mixer": json.dumps({"sha256": sha256, "facts": metadata})}
    write_atomically(folder / WEIGHTS, pack(arrays, entry))
    return sha256


def is_model_folder(path):
    """Returns whether a `Path` is a model folder."""
    return (path / SPEC).is_file()


def read_spec(folder):
    """Reads the `ModelSpec` in model.json. Raises InputError if it is missing or invalid."""
    path = folder / SPEC
    with errors_about(path):
        try:
            values = json.loads(read_regular(path, _MOST_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"not a readable model.json ({error})") from error
        return ModelSpec.from_json(values)


def read_weights(folder):
    """Reads (arrays, metadata) from model.safetensors, checked against their sha256.

    Raises:
        InputError: If it is missing or damaged.
    """
    path = Path(folder) / WEIGHTS
    with _open(path) as (file, metadata):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["sha256"] != digest(arrays):
        raise InputError(f"{path}: damaged, its contents do not match its sha256")
    return arrays, metadata


def read_metadata(folder):
    """Reads the metadata of model.safetensors, without reading the arrays.

    Returns:
        dict of the `metadata` given to `write_weights`, and `sha256`.

    Raises:
        InputError: If it is missing or damaged.
    """
    with _open(Path(folder) / WEIGHTS) as (_, metadata):
        return metadata


@contextlib.contextmanager
def _open(path):
    """Yields an open .safetensors file and its metadata."""
    try:
        if path.is_file():
            open(path, "rb").close()  # safe_open calls every error a missing file
        elif path.exists():  # opening a pipe would block
            raise ValueError("not a regular file")
        with safe_open(path, framework="numpy") as file:
            entry = json.loads((file.metadata() or {}).get("keras_mixer", "{}"))
            yield file, entry.get("facts", {}) | {"sha256": entry.get("sha256")}
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def digest(arrays):
    """Returns the hexadecimal sha256 of the names, types, shapes and values of a dict of arrays."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        sha256.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha256.hexdigest()
