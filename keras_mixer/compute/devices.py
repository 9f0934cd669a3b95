"""Devices: which ones compute a run, and how they share batches in training and inference.

A run uses one device on Keras's TensorFlow backend; on JAX any number, in any number of processes.
keras.distribution.DataParallel splits every batch among them; weights and random numbers are those
of one device. On TensorFlow, Keras clips gradients before it adds up those of several devices
(3.15.1), which trains another model.
"""

import contextlib
import functools

import keras
import numpy as np
import tensorflow as tf

from keras_mixer.compute.process_group import SINGLE
from keras_mixer.errors import InputError
from keras_mixer.log import logger

_JAX = "Keras's JAX backend: pip install 'keras_mixer[jax]', and set KERAS_BACKEND=jax"


def choose_devices(given, group=SINGLE):
    """Returns the names of the devices that compute a run, such as `["gpu:0", "gpu:1"]`.

    Args:
        given: string of --devices: `all`, a number of devices, or their indices with commas.
        group: `ProcessGroup`; several processes use all of their devices.

    Raises:
        InputError: If a device does not exist, or several are given on the TensorFlow backend.
    """
    if group.count > 1:
        return _devices_of_all(given, group)
    visible = _visible()
    if given == "all":
        if len(visible) > 1 and keras.backend.backend() != "jax":
            logger.info(f"{len(visible)} devices are visible, one is used; all need {_JAX}")
        return visible if keras.backend.backend() == "jax" else visible[:1]
    indices = list(dict.fromkeys(map(int, given.split(",")))) if "," in given else range(int(given))
    if missing := [index for index in indices if index >= len(visible)]:
        raise InputError(
            f"--devices={given}: there is no device {missing[0]}; visible: {', '.join(visible)}"
        )
    if len(indices) > 1 and keras.backend.backend() != "jax":
        raise InputError(f"--devices={given}: several devices need {_JAX}")
    return [visible[index] for index in indices]


def _devices_of_all(given, group):
    if given != "all":
        raise InputError(f"--devices={given}: several processes use all of their devices")
    import jax

    first, *others = group.exchange(jax.local_device_count())
    for name, count in zip(group.names[1:], others, strict=True):
        if count != first:
            raise InputError(
                f"{name} has {count} devices, process 0 has {first}: expected the same number"
            )
    return _visible()


def _visible():
    """Returns the names of the accelerators, or else of the CPU's devices."""
    if keras.backend.backend() == "jax":
        return keras.distribution.list_devices()
    found = tf.config.list_physical_devices("GPU")
    return [f"gpu:{index}" for index in range(len(found))] or ["cpu:0"]


@contextlib.contextmanager
def data_parallel(devices, batch_size):
    """Models that are built in the block share every batch among the devices.

    Raises:
        InputError: If the batch size is no multiple of the number of devices.
    """
    if batch_size % len(devices):
        raise InputError(
            f"--batch_size={batch_size} counts the images of a whole step: expected a multiple of "
            f"the {len(devices)} devices that share it; --devices=1 uses one"
        )
    if len(devices) == 1:
        yield
        return
    with keras.distribution.DataParallel(devices=list(devices), auto_shard_dataset=False).scope():
        yield


def validate(model, batches, group=SINGLE):
    """Returns the `loss` and `accuracy` of a compiled model.

    Each process of a group gives its part of the batches of images and one-hot labels.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return model.evaluate(batches, verbose=0, return_dict=True)
    predict = predictor(model) if group.count > 1 else _predict_on_all(model, distribution)
    sums = np.zeros(3)  # images, loss, correct ones
    for images, labels in batches.as_numpy_iterator():
        logits = predict(images)
        correct = (logits.argmax(axis=-1) == labels.argmax(axis=-1)).sum()
        sums += len(images), len(images) * float(model.loss(labels, logits)), correct
        group.note_progress()
    count, loss, correct = np.sum(group.exchange(sums.tolist()), axis=0)
    return {"loss": loss / count, "accuracy": correct / count}


def _predict_on_all(model, distribution):
    """Returns a function from a batch of any size to its outputs, computed by all devices."""
    devices = distribution.device_mesh.devices.size

    def predict(images):
        padded = _padded(images, devices)
        layout = distribution.get_data_layout(padded.shape)
        split = keras.distribution.distribute_tensor(padded, layout)
        return model.predict_on_batch(split)[: len(images)]

    return predict


def predictor(model):
    """Returns a function from images to outputs, arrays, that uses all devices of this process.

    Other processes take no part, as they have other numbers of batches. The weights of the model
    are copied.
    """
    if keras.backend.backend() != "jax":
        return model.predict_on_batch
    import jax

    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(devices, ("batch",))
    replicated, split = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in ([], ["batch"])
    )

    def copy(variable):
        # By NumPy: device_put shares memory even with may_alias=False, and Keras donates the memory
        # of its variables (JAX 0.10.2, Keras 3.15.1).
        return jax.device_put(np.array(variable.value), replicated)

    groups = model.trainable_variables, model.non_trainable_variables
    weights = [list(map(copy, variables)) for variables in groups]

    def predict(images):
        padded = jax.device_put(_padded(images, len(devices)), split)
        return np.asarray(_outputs(model)(*weights, padded))[: len(images)]

    return predict


@functools.lru_cache(maxsize=1)
def _outputs(model):
    """Returns a compiled function of trainable and other variables and images."""
    import jax

    def outputs(*arguments):
        return model.stateless_call(*arguments, training=False)[0]

    return jax.jit(outputs)


def _padded(images, multiple):
    """Pads a batch with zeros to a multiple of a number of images."""
    return np.concatenate([images, np.zeros((-len(images) % multiple, *images.shape[1:]), "f")])
