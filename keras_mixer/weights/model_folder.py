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
from keras_mixer.files import is_special, pack, read_regular, write_atomically
from keras_mixer.model.architecture import ModelSpec

SPEC, WEIGHTS = "model.json", "model.safetensors"
_MOST_BYTES = 100_000_000  # of model.json
# AttributeError and TypeError: number types that NumPy does not have.
_DAMAGE = (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError)


def write_spec(folder, spec):
    """Writes model.json into a folder, a `Path`, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SPEC, json.dumps(spec.to_json(), indent=2).encode() + b"\n")


def write_weights(folder, arrays, **facts):
    """Writes model.safetensors atomically.

    Args:
        folder: `Path` of the model.
        arrays: dict from variable path, such as `"stem/kernel"`, to array.
        **facts: JSON values kept with the weights, such as the epoch they come from.

    Returns:
        The `digest` of the arrays.
    """
    # One entry, since safetensors writes several in a varying order.
    sha256 = digest(arrays)
    metadata = {"keras_mixer": json.dumps({"sha256": sha256, "facts": facts})}
    write_atomically(folder / WEIGHTS, pack(arrays, metadata))
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
    """Reads (arrays, facts) from model.safetensors. Raises InputError if it is missing or damaged.

    The arrays are checked against their sha256, which is one of the facts.
    """
    path = Path(folder) / WEIGHTS
    with _open(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = _facts(file)
    if facts["sha256"] != digest(arrays):
        raise InputError(f"{path}: damaged, its contents do not match its sha256")
    return arrays, facts


def read_facts(folder):
    """Reads the facts of model.safetensors alone, without a check of the arrays.

    Returns:
        dict of what `write_weights` was given, and `sha256`.

    Raises:
        InputError: If it is missing or damaged.
    """
    with _open(Path(folder) / WEIGHTS) as file:
        return _facts(file)


@contextlib.contextmanager
def _open(path):
    try:
        if is_special(path):
            raise ValueError("not a regular file")
        with safe_open(path, framework="numpy") as file:
            yield file
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _facts(file):
    record = json.loads((file.metadata() or {}).get("keras_mixer", "{}"))
    return record.get("facts", {}) | {"sha256": record.get("sha256")}


def digest(arrays):
    """Returns the hexadecimal sha256 of the names, types, shapes and values of a dict of arrays."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        sha256.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha256.hexdigest()
