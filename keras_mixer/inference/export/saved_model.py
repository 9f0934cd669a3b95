"""SavedModel exporter: a model with its preprocessing, which needs only TensorFlow to serve.

It has two signatures:

- `serving_default`: `images`, uint8 `(batch, height, width, channels)` of any height and width;
- `serve_bytes`: `image_bytes`, strings `(batch,)`, each a JPEG (its EXIF orientation is applied),
  PNG, BMP, WebP or GIF (its first frame) file of at most `image_checks.MOST_PIXELS` pixels.

Both return `logits` and `probabilities`, float32 `(batch, num_classes)`, and `class_names`, strings
of the same shape. A SavedModel is a program: load trusted ones only (TensorFlow, SECURITY.md).
"""

import keras
import numpy as np
import tensorflow as tf

from keras_mixer.compute.fast_mixing import use_fast_mixing
from keras_mixer.errors import RunError
from keras_mixer.preprocessing.decode import decode_image, refuse_large
from keras_mixer.preprocessing.resize import preprocess
from keras_mixer.training.losses import PROBABILITIES

TOLERANCE = 1e-5


def write(model, folder):
    """Writes a model with its `ModelSpec` to a folder as a SavedModel, and compares them.

    Raises:
        RunError: If the outputs differ.
    """
    build_archive(model).write_out(str(folder), verbose=False)
    _compare(str(folder), model)


def build_archive(model):
    """Returns a `keras.export.ExportArchive` of a model with its `ModelSpec`, to be written out."""
    spec = model.spec
    channels = spec.architecture.channels

    fused = use_fast_mixing(model, batch_size=1)  # not in parts: servers set their own threads

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
