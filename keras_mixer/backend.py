"""Imports Keras and its backend, TensorFlow or JAX, quietly and with the default settings."""

import contextlib
import importlib.util
import os
import sys

from keras_mixer.errors import InputError
from keras_mixer.log import debugging, hidden_standard_error
from keras_mixer.signals import exiting_on_interrupt

BACKENDS = ("tensorflow", "jax")  # of Keras, that commands support


def _import_keras():
    """Imports Keras with its default settings, whatever ~/.keras/keras.json has.

    If it is already imported, as in a notebook, its settings stay.
    """
    if "keras" in sys.modules:
        return
    try:
        import keras
    except (AssertionError, ValueError) as error:
        raise InputError(
            "Keras does not accept its settings in ~/.keras/keras.json (or in KERAS_HOME): "
            f"correct or remove that file {error}".strip()
        ) from error
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")


def check_installed(backend):
    """Raises an `InputError` if Keras's backend is not installed."""
    if not importlib.util.find_spec(backend):
        raise InputError(
            f"KERAS_BACKEND={backend} needs a package: pip install 'keras_mixer[{backend}]'"
        )


@contextlib.contextmanager
def quiet_tensorflow():
    """Hides messages of TensorFlow's start, except with --verbosity=debug; errors are exceptions.

    TensorFlow 2.21 prints about oneDNN and missing CUDA libraries before its log level is read
    (https://github.com/tensorflow/tensorflow/issues/100442).
    """
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend not in BACKENDS:
        raise InputError(f"KERAS_BACKEND={backend}: expected tensorflow or jax")
    check_installed(backend)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if debugging() else "2")
    if "tensorflow" in sys.modules or os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        _import_keras()
        yield
        return
    with hidden_standard_error() as stderr, exiting_on_interrupt(stderr):
        _import_keras()
        import tensorflow

        tensorflow.config.list_physical_devices()
        if backend == "jax":
            keep_tensorflow_off_gpus()
        yield


def keep_tensorflow_off_gpus():
    """Hides GPUs from TensorFlow, which reads the images and would reserve all GPU memory."""
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
