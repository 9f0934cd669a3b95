"""Checkpoints of training: the state of a model as arrays, written atomically, checked when read.

A checkpoint is a folder. Its files are written to a temporary folder, the last a manifest with the
sha256 and size of the others, and flushed to disk; then one rename makes it visible. A kill or a
power cut at any moment leaves the earlier checkpoints intact. TensorFlow is not imported.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from keras_mixer.errors import RunError, join_names
from keras_mixer.files import (
    OF_THE_MACHINE,
    flush_folder,
    listed,
    pack,
    read_regular,
    remove,
    write_durably,
)
from keras_mixer.log import logger

KEPT = 2  # checkpoints
ARRAYS, PROGRESS, MANIFEST = "arrays.safetensors", "progress.json", "manifest.json"
_MANIFEST_BYTES = 10_000
NO_DAMAGE = (*OF_THE_MACHINE, errno.EACCES, errno.EPERM)
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)


class TrainState(NamedTuple):
    """State of training at a step, the contents of a checkpoint.

    Attributes:
        step: Optimizer steps taken.
        arrays: dict from name to array.
        progress: dict of JSON values, the fields of `Progress`: `step` and `run` among them.
    """

    step: int
    arrays: dict[str, np.ndarray]
    progress: dict


def save_checkpoint(folder, state):
    """Writes a `TrainState` into the folder of checkpoints; deletes all but the newest `KEPT`.

    The folder is made if it does not exist, but not its parent.

    Raises:
        RunError: If the disk is full or not writable; earlier checkpoints stay intact.
    """
    temporary = folder / f"{_name(state.step)}.tmp-{os.getpid()}"
    contents = {ARRAYS: pack(state.arrays), PROGRESS: json.dumps(state.progress).encode()}
    final = folder / _name(state.step)
    try:
        folder.mkdir(exist_ok=True)
        _write_folder(temporary, contents)
        remove(final)  # damaged, if it exists
        os.rename(temporary, final)
        flush_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = f" of {sum(map(len, contents.values())):,} bytes"
        raise RunError(
            f"cannot write a checkpoint{size} in {folder}: {error.strerror or error}; earlier "
            f"checkpoints are intact: the same command continues from them"
        ) from error
    others = [candidate for candidate in _complete(folder) if candidate != final]
    for old in others[KEPT - 1 :]:
        remove(old)


def _write_folder(folder, contents):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in contents.items():
        write_durably(folder / name, content)
    write_durably(folder / MANIFEST, json.dumps(_manifest(contents), indent=2).encode())
    flush_folder(folder)


def _manifest(contents):
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }


def newest_checkpoint(folder, run=None):
    """Reads the `TrainState` of the newest intact checkpoint in a folder; None if there are none.

    Deletes newer ones that are damaged, with a warning, and unfinished ones; the caller must hold
    the lock of the run.

    Args:
        folder: `Path` of the run's checkpoints.
        run: `Run.identity` that the checkpoint must have, or None for any.

    Raises:
        InputError: If the folder cannot be listed.
        RunError: If all are damaged, or the newest is of another run or cannot be read now.
    """
    for unfinished in listed(folder, "step-*.tmp-*"):
        remove(unfinished)
    candidates = _complete(folder)
    for index, candidate in enumerate(candidates):
        try:
            state = _read_folder(candidate)
        except _DAMAGE as error:
            if getattr(error, "errno", None) in NO_DAMAGE:
                raise RunError(
                    f"{candidate} cannot be read now: {error}; nothing was changed, so the same "
                    f"command continues once it can"
                ) from error
            logger.warning(f"damaged checkpoint skipped: {candidate} ({error})")
            continue
        if run is not None and state.progress.get("run") != run:
            raise RunError(
                f"{candidate} is a checkpoint of another run, with other flags, data or initial "
                f"weights; move it back. Nothing was changed"
            )
        for damaged in candidates[:index]:
            remove(damaged)
        return state
    if candidates:
        raise RunError(
            f"every checkpoint in {folder} is damaged, so the run cannot continue; "
            f"--overwrite starts it over, --output_dir=… starts another"
        )
    return None


def read_checkpoint(folder, step):
    """Returns the arrays of the checkpoint of a step, which process 0 has read.

    Raises:
        RunError: If it cannot be read here.
    """
    try:
        return _read_folder(folder / _name(step)).arrays
    except _DAMAGE as error:
        raise RunError(
            f"{folder / _name(step)} cannot be read here ({error}), but on process 0 it can: "
            f"--output_dir must be a folder that all processes share"
        ) from error


def _complete(folder):
    """Returns the folders of finished checkpoints, newest first."""
    return listed(folder, "step-" + "[0-9]" * 10)[::-1]


def _read_folder(folder):
    manifest = json.loads(read_regular(folder / MANIFEST, _MANIFEST_BYTES))
    contents = {
        name: read_regular(folder / name, manifest[name]["bytes"]) for name in (ARRAYS, PROGRESS)
    }
    for name, entry in _manifest(contents).items():
        if manifest[name] != entry:
            raise ValueError(f"{name} does not match its sha256")
    step, progress = int(folder.name.removeprefix("step-")), json.loads(contents[PROGRESS])
    if progress["step"] != step:
        raise ValueError(f"its progress is that of step {progress['step']}")
    return TrainState(step, load(contents[ARRAYS]), progress)


def _name(step):
    return f"step-{step:010d}"


# === The state of a model ===
#
# Everything that a training step changes: weights, seed generators, optimizer variables (EMA
# included) and metrics. With the order of the data, a function of the step, it determines the rest
# of training.


def gather_state(model, metric_variables):
    """Returns the state of a compiled model, its optimizer built, as a dict from name to array."""
    variables = _variables(model, metric_variables)
    return {name: np.array(variable.value) for name, variable in variables.items()}


def restore_state(model, metric_variables, arrays):
    """Assigns the arrays of `gather_state` to a model's variables.

    Raises:
        RunError: If the names and shapes of the arrays are not exactly those of this model.
    """
    variables = _variables(model, metric_variables)
    expected = {(name, tuple(variable.shape)) for name, variable in variables.items()}
    if differing := sorted(expected ^ {(name, array.shape) for name, array in arrays.items()}):
        names = dict.fromkeys(f"{name} {shape}" for name, shape in differing)
        raise RunError(f"the checkpoint is of another model; differing: {join_names(list(names))}")
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _variables(model, metric_variables):
    """Returns a dict from name to variable; a name is a group, an index and a path without numbers.

    Keras numbers unnamed objects (`seed_generator_3`) by what was built before in the process.
    """
    groups = {
        "model": model.variables,
        "optimizer": model.optimizer.variables,
        "meters": metric_variables,  # the name in all checkpoints so far
    }
    return {
        f"{group}/{index:04d}/{re.sub(r'_[0-9]+', '', variable.path)}": variable
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }
