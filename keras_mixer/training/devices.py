"""The devices that compute a run: one on Keras's TensorFlow backend, any number on JAX.

keras.distribution.DataParallel deals every batch out to them; weights and what is drawn at random
are those of one device. On TensorFlow, Keras clips gradients before it adds up those of several
devices (3.15.1), which trains another model.
"""

import contextlib
import os

import keras
import numpy as np
import tensorflow as tf

from keras_mixer import console
from keras_mixer.errors import InputError

_NAME = "--devices"
_JAX = "Keras's JAX backend: pip install 'keras_mixer[jax]', and set KERAS_BACKEND=jax"


def check_backend():
    """Raises an `InputError` if training does not run on Keras's backend."""
    backend = keras.backend.backend()
    if backend not in console.BACKENDS:
        raise InputError(
            f"training runs on Keras's TensorFlow and JAX backends, not on {backend}; "
            f"unset KERAS_BACKEND"
        )
    if backend == "jax":
        console.keep_tensorflow_off_gpus()
    for name in ("max_epochs", "max_steps_per_epoch"):
        if (most := getattr(keras.config, name)()) is not None:
            raise InputError(
                f"Keras is set to {name}={most}, which would cut training and validation short; "
                f"unset KERAS_{name.upper()}, and give --num_steps"
            )
    if keras.config.floatx() != "float32":
        raise InputError(
            f"Keras is set to floatx {keras.config.floatx()}: expected float32, for results that "
            f"do not depend on it; --precision sets that of a run"
        )


def make_deterministic():
    """Has the backend use deterministic operations only; before it computes anything."""
    tf.config.experimental.enable_op_determinism()
    if keras.backend.backend() == "jax":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def choose_devices(given):
    """Returns the names of the devices that compute a run, such as `["gpu:0", "gpu:1"]`.

    Args:
        given: string of --devices: `all`, a number of devices, or their indices with commas.

    Raises:
        InputError: If there are no such devices, or several on the TensorFlow backend.
    """
    visible = _visible()
    if given == "all":
        return visible if keras.backend.backend() == "jax" else [_first(visible)]
    indices = list(dict.fromkeys(map(int, given.split(",")))) if "," in given else range(int(given))
    if missing := [index for index in indices if index >= len(visible)]:
        raise InputError(
            f"{_NAME}={given}: there is no device {missing[0]}; visible: {', '.join(visible)}"
        )
    if len(indices) > 1 and keras.backend.backend() != "jax":
        raise InputError(f"{_NAME}={given}: several devices need {_JAX}")
    return [visible[index] for index in indices]


def _first(visible):
    if len(visible) > 1:
        console.say(f"{len(visible)} devices are visible, one is used; all need {_JAX}")
    return visible[0]


def _visible():
    """Returns the names of the accelerators, or else of the CPU's devices."""
    if keras.backend.backend() == "jax":
        return keras.distribution.list_devices()
    found = tf.config.list_physical_devices("GPU")
    return [f"gpu:{index}" for index in range(len(found))] or ["cpu:0"]


@contextlib.contextmanager
def sharing(devices, batch_size):
    """Has models that are built in the block deal every batch out to several devices.

    Args:
        devices: list from `choose_devices`.
        batch_size: int. Number of images in a batch.

    Raises:
        InputError: If the batch cannot be dealt out evenly.
    """
    if batch_size % len(devices):
        raise InputError(
            f"--batch_size={batch_size} counts the images of a whole step: expected a multiple of "
            f"the {len(devices)} devices that share it; --devices=1 uses one"
        )
    if len(devices) == 1:
        yield
        return
    with keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False).scope():
        yield


def validate(model, batches):
    """Returns the `loss` and `accuracy` of a compiled model.

    Args:
        model: compiled `keras.Model`.
        batches: `tf.data.Dataset` of images and one-hot labels.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return model.evaluate(batches, verbose=0, return_dict=True)
    count, loss, correct = 0, 0.0, 0
    for images, labels in batches.as_numpy_iterator():
        logits = _predict(model, images, distribution)
        count += len(images)
        loss += len(images) * float(model.loss(labels, logits))
        correct += int((logits.argmax(axis=-1) == labels.argmax(axis=-1)).sum())
    return {"loss": loss / count, "accuracy": correct / count}


def _predict(model, images, distribution):
    """Computes the outputs of a batch of any size by all devices."""
    devices = distribution.device_mesh.devices.size
    padded = np.concatenate([images, np.zeros((-len(images) % devices, *images.shape[1:]), "f")])
    layout = distribution.get_data_layout(padded.shape)
    dealt = keras.distribution.distribute_tensor(padded, layout)
    return model.predict_on_batch(dealt)[: len(images)]
