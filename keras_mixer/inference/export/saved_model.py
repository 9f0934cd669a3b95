"""Exports a model with its preprocessing as a SavedModel, which needs only TensorFlow to serve.

It has two signatures:

- `serving_default`: `images`, uint8 `(batch, height, width, channels)` of any height and width;
- `serve_bytes`: `image_bytes`, strings `(batch,)`, each a JPEG (its EXIF orientation is applied),
  PNG, BMP, WebP or GIF (its first frame) file of at most `image_checks.MOST_PIXELS` pixels.

Both return `logits` and `probabilities`, float32 `(batch, num_classes)`, and `class_names`, strings
of the same shape. A SavedModel is a program: load trusted ones only (TensorFlow, SECURITY.md).
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_mixer.compute.fast_mixing import use_fast_mixing
from keras_mixer.errors import RunError, without_internals
from keras_mixer.files import flush_folder, flush_tree
from keras_mixer.inference.export.versions import (
    EXTRA,
    check_target,
    make_unfinished,
    version_numbers,
    write_source,
)
from keras_mixer.preprocessing.decode import decode_image, refuse_large
from keras_mixer.preprocessing.resize import preprocess
from keras_mixer.training.losses import PROBABILITIES
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import build_pretrained
from keras_mixer.weights.pretrained import read_pretrained

TOLERANCE = 1e-5


def export_model(path, export_dir, name):
    """Exports a model, in float32, to `export_dir/name/version/`.

    The export is written to a temporary folder, reloaded and compared with the Keras model, and
    then renamed to the next version number.

    Args:
        path: A run directory or other weights, as for `load_mixer`.
        export_dir: Folder for exports.
        name: Name of the model.

    Returns:
        `Path` of the new version.

    Raises:
        InputError: If the model cannot be read, or the target is not valid; see `check_target`.
        RunError: If the disk is full, or the export differs from the model.
    """
    if keras.backend.backend() != "tensorflow":
        return _export_by_tensorflow(path, export_dir, name)
    pretrained = read_pretrained(path)
    check_target(export_dir, name, pretrained.spec)
    sha256 = model_folder.digest(pretrained.arrays)
    model = build_pretrained(pretrained, path, dtype="float32")
    home = Path(export_dir) / name
    with _disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        temporary = make_unfinished(home)
        try:
            build_archive(model).write_out(temporary, verbose=False)
            _compare(temporary, model)
            model_folder.write_spec(Path(temporary) / EXTRA, model.spec)
            write_source(Path(temporary), sha256)
            os.chmod(temporary, 0o755)
            flush_tree(Path(temporary))
            return _publish(temporary, home)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _export_by_tensorflow(path, export_dir, name):
    """Exports in a process of its own, as a process has one backend of Keras."""
    target = [f"--export_dir={export_dir}", f"--name={name}", "--verbosity=error"]
    command = [sys.executable, "-m", "keras_mixer", "export", os.path.abspath(path), *target]
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {
        "KERAS_BACKEND": "tensorflow",
        "PYTHONPATH": os.pathsep.join(places),
        "CUDA_VISIBLE_DEVICES": "-1",  # the memory of the GPU is taken
    }
    done = subprocess.run(
        command, env=os.environ | changes, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(done.stderr.strip().rpartition("\n")[2].removeprefix("error: "))
    home = Path(export_dir) / name
    return home / str(version_numbers(home)[-1])


@contextlib.contextmanager
def _disk_errors(home):
    """Reports a full disk and the like in one line; TensorFlow has several errors for them."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or without_internals(error)
        reason = re.sub(r"^/\S*; ", "", reason)  # a temporary file
        raise RunError(f"cannot export to {home}: {reason}") from error


def build_archive(model):
    """Returns a `keras.export.ExportArchive` of a model with its `ModelSpec`, to be written out."""
    spec = model.spec
    channels = spec.architecture.channels

    fused = use_fast_mixing(model, batch_size=1)  # as a whole, since servers set their own threads

    def respond(images):
        logits = fused(images, training=False)
        names = tf.broadcast_to(tf.constant(spec.names), tf.shape(logits))
        probabilities = PROBABILITIES[spec.loss](logits)
        return {"logits": logits, "probabilities": probabilities, "class_names": names}

    def serving_default(images):
        return respond(preprocess(images, spec))

    def serve_bytes(image_bytes):
        def read(content):
            return preprocess(decode_image(refuse_large(content), channels), spec)

        prepared = tf.TensorSpec(model.input_shape[1:], tf.float32)
        return respond(tf.map_fn(read, image_bytes, fn_output_signature=prepared))

    archive = keras.export.ExportArchive()
    archive.track(model)
    images = tf.TensorSpec((None, None, None, channels), tf.uint8, "images")
    contents = tf.TensorSpec((None,), tf.string, "image_bytes")
    archive.add_endpoint("serving_default", serving_default, [images])
    archive.add_endpoint("serve_bytes", serve_bytes, [contents])
    return archive


def _compare(directory, model):
    """Compares both signatures with the Keras model, on images of two sizes."""
    _, height, width, channels = model.input_shape
    serve = tf.saved_model.load(directory).signatures
    for shape in ((height, width), (2 * height + 1, width + 3)):
        images = np.random.default_rng(0).integers(0, 256, (2, *shape, channels), np.uint8)
        expected = model(preprocess(images, model.spec), training=False)
        contents = tf.stack([tf.io.encode_png(image) for image in images])
        answers = (
            serve["serving_default"](images=tf.constant(images)),
            serve["serve_bytes"](image_bytes=contents),
        )
        difference = max(float(np.abs(a["logits"] - expected).max()) for a in answers)
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise RunError(
                f"the export differs from the model by {difference:.1e} in its logits, more than "
                f"{TOLERANCE:.0e}; it was not published: please report this"
            )


def _publish(temporary, home):
    """Renames the export to the next version number."""
    target = home / str(max(version_numbers(home), default=0) + 1)
    os.rename(temporary, target)
    flush_folder(home)
    return target
