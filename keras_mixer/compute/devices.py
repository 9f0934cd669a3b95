"""What computes a run: one device on Keras's TensorFlow backend, on JAX any number, in any number
of processes.

keras.distribution.DataParallel deals every batch out to them; weights and what is drawn at random
are those of one device. On TensorFlow, Keras clips gradients before it adds up those of several
devices (3.15.1), which trains another model.
"""

import contextlib
import ctypes
import functools
import os
import signal

import keras
import numpy as np
import tensorflow as tf

from keras_mixer.backend import BACKENDS, keep_tensorflow_off_gpus
from keras_mixer.compute.process_group import SINGLE
from keras_mixer.errors import InputError
from keras_mixer.log import hide_library_output, logger
from keras_mixer.model.variants import MIXER
from keras_mixer.signals import Interrupted

_NAME = "--devices"
_JAX = "Keras's JAX backend: pip install 'keras_mixer[jax]', and set KERAS_BACKEND=jax"


def check_backend():
    """Raises an `InputError` if training does not run on Keras's backend."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise InputError(
            f"training runs on Keras's TensorFlow and JAX backends, not on {backend}; "
            f"unset KERAS_BACKEND"
        )
    if backend == "jax":
        keep_tensorflow_off_gpus()
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


def way_of(config):
    """Returns how a step is computed: "XLA", "fast mixing" or "no XLA".

    With --jit=auto, what was measured to be fastest: on a CPU, `fast_mixing`, but for float16,
    which it does not support, and for baselines, which have no mixer layers.
    """
    if config.jit != "auto":
        return "XLA" if config.jit == "true" else "no XLA"
    if keras.backend.backend() == "jax" or tf.config.list_physical_devices("GPU"):
        return "XLA"
    plain = config.precision == "float16" or config.model != MIXER
    return "no XLA" if plain else "fast mixing"


def images_at_once(config):
    """Returns the number of images in a part of a batch of accumulated gradients."""
    return config.batch_size // config.accumulation


@contextlib.contextmanager
def connected(group):
    """Connects JAX in several processes, in the block; before it computes anything."""
    if group.count == 1:
        yield
        return
    import jax

    hide_library_output()  # for Gloo's lines about its ranks
    _delay_aborts()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    group.engine_started = True
    jax.distributed.initialize(f"{group.rank.host}:{group.rank.port}", group.count, group.index)
    interruption = None
    try:
        yield
    except Interrupted as error:
        interruption = error
    jax.distributed.shutdown()  # waits for all; after an error, the group ends the process
    group.engine_started = False
    if interruption:
        raise interruption


def _delay_aborts():
    """Has abort() wait for six seconds, in which the group says who is lost.

    JAX calls it, without a word, when process 0 is gone (0.10.2). The handler of the signal is
    sleep(), whose argument is the number of the signal, 6.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def choose_devices(given, group=SINGLE):
    """Returns the names of the devices that compute a run, such as `["gpu:0", "gpu:1"]`.

    Args:
        given: string of --devices: `all`, a number of devices, or their indices with commas.
        group: `ProcessGroup` of the processes, whose devices are all used.

    Raises:
        InputError: If there are no such devices, or several on the TensorFlow backend.
    """
    if group.count > 1:
        return _devices_of_all(given, group)
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


def _devices_of_all(given, group):
    if given != "all":
        raise InputError(f"{_NAME}={given}: several processes use all of their devices")
    import jax

    first, *others = group.exchange(jax.local_device_count())
    for name, count in zip(group.names[1:], others, strict=True):
        if count != first:
            raise InputError(
                f"{name} has {count} devices, process 0 has {first}: expected as many in all"
            )
    return _visible()


def _first(visible):
    if len(visible) > 1:
        logger.info(f"{len(visible)} devices are visible, one is used; all need {_JAX}")
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


def validate(model, batches, group=SINGLE):
    """Returns the `loss` and `accuracy` of a compiled model.

    Args:
        model: compiled `keras.Model`.
        batches: `tf.data.Dataset` of images and one-hot labels: this process's part of all.
        group: `ProcessGroup` of the processes.
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
    """Returns a function that computes the outputs of a batch of any size by all devices."""
    devices = distribution.device_mesh.devices.size

    def predict(images):
        padded = _padded(images, devices)
        layout = distribution.get_data_layout(padded.shape)
        dealt = keras.distribution.distribute_tensor(padded, layout)
        return model.predict_on_batch(dealt)[: len(images)]

    return predict


def predictor(model):
    """Returns a function of images to outputs, arrays, that uses all devices of this process.

    No other process takes part in it: they have other numbers of batches. On JAX the outputs of
    several devices are put together; on TensorFlow there is one.

    Args:
        model: `keras.Model` whose weights will not change.
    """
    if keras.backend.backend() != "jax":
        return model.predict_on_batch
    import jax

    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(devices, ("batch",))
    whole, dealt = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in ([], ["batch"])
    )

    def copy(variable):
        # By NumPy: device_put shares memory even with may_alias=False, and Keras's functions give
        # away that of their variables (JAX 0.10.2, Keras 3.15.1).
        return jax.device_put(np.array(variable.value), whole)

    groups = model.trainable_variables, model.non_trainable_variables
    weights = [list(map(copy, variables)) for variables in groups]

    def predict(images):
        images_here = jax.device_put(_padded(images, len(devices)), dealt)
        return np.asarray(_outputs(model)(*weights, images_here))[: len(images)]

    return predict


@functools.lru_cache(maxsize=1)
def _outputs(model):
    """Returns the compiled function of weights, other variables and images to outputs."""
    import jax

    def outputs(*arguments):
        return model.stateless_call(*arguments, training=False)[0]

    return jax.jit(outputs)


def _padded(images, multiple):
    """Adds black images, so that the number of images is a multiple."""
    return np.concatenate([images, np.zeros((-len(images) % multiple, *images.shape[1:]), "f")])
