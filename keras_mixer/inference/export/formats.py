"""Exports a model for deployment, in one of several formats, as a numbered version.

The export is written to a temporary folder, compared with the model, and then renamed to the next
version: `export_dir/name/1/`, `2/` and so on.
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from keras_mixer.compute.environment import module_command
from keras_mixer.errors import InputError, RunError, without_internals
from keras_mixer.files import flush_folder, flush_tree
from keras_mixer.inference.export.versions import (
    EXTRA,
    check_target,
    make_unfinished,
    version_numbers,
    write_source,
)
from keras_mixer.runs.run import Run
from keras_mixer.weights import model_folder
from keras_mixer.weights.pretrained import read_pretrained

# Modules by format. Each has a function `write(model, folder)`, which exports a `keras.Model` with
# its `spec` to a folder, and raises a RunError if what it reads back differs from the model.
FORMATS = {"saved_model": "keras_mixer.inference.export.saved_model"}


def export(run_or_path, format="saved_model", export_dir="saved_models", name="mlp_mixer"):
    """Exports a model with its preprocessing, in float32, to `export_dir/name/version/`.

    Args:
        run_or_path: A `Run`, or the path of a run directory or of weights as `load_mixer` takes it.
        format: string, one of `FORMATS`. `"saved_model"`: a TensorFlow SavedModel with the
            signatures `serving_default` and `serve_bytes`, which needs only TensorFlow.
        export_dir: Folder for exports.
        name: Name of the model.

    Returns:
        `Path` of the new version.

    Raises:
        InputError: If the model cannot be read, or the target is not valid; see `check_target`.
        RunError: If the disk is full, or the export differs from the model.
    """
    if format not in FORMATS:
        raise InputError(f"format={format}: expected one of {', '.join(FORMATS)}")
    path = run_or_path.best if isinstance(run_or_path, Run) else run_or_path
    pretrained = read_pretrained(path)
    check_target(export_dir, name, pretrained.spec)
    home = Path(export_dir) / name
    import keras

    if keras.backend.backend() != "tensorflow":
        return _export_by_tensorflow(path, format, home)
    from keras_mixer.weights.load import build_pretrained

    model = build_pretrained(pretrained, path, dtype="float32")
    exporter = importlib.import_module(FORMATS[format])
    with _disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        unfinished = Path(make_unfinished(home))
        try:
            exporter.write(model, unfinished)
            model_folder.write_spec(unfinished / EXTRA, model.spec)
            write_source(unfinished, model_folder.digest(pretrained.arrays))
            os.chmod(unfinished, 0o755)
            flush_tree(unfinished)
            return _publish(unfinished, home)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _export_by_tensorflow(path, format, home):
    """Exports in a new process, since a process has one backend of Keras."""
    flags = [f"--format={format}", f"--export_dir={home.parent}", f"--name={home.name}"]
    command = module_command("keras_mixer", "export", os.path.abspath(path), *flags)
    changes = {
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # the memory of the GPU is taken
    }
    done = subprocess.run(
        [*command, "--verbosity=error"],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(done.stderr.strip().rpartition("\n")[2].removeprefix("error: "))
    return home / str(version_numbers(home)[-1])


@contextlib.contextmanager
def _disk_errors(home):
    """Reports a full disk and the like in one line; TensorFlow has several errors for them."""
    import tensorflow as tf

    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or without_internals(error)
        reason = re.sub(r"^/\S*; ", "", reason)  # a temporary file
        raise RunError(f"cannot export to {home}: {reason}") from error


def _publish(unfinished, home):
    """Renames the export to the next version number."""
    target = home / str(max(version_numbers(home), default=0) + 1)
    os.rename(unfinished, target)
    flush_folder(home)
    return target
