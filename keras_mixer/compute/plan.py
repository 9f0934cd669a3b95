"""`ComputePlan`: what computes a run and how, resolved once, before training."""

import contextlib
import dataclasses
import os

import keras
import tensorflow as tf

from keras_mixer.backend import BACKENDS, keep_tensorflow_off_gpus
from keras_mixer.compute.accumulation import accumulate_gradients
from keras_mixer.compute.devices import choose_devices, data_parallel
from keras_mixer.compute.fast_mixing import number_of_parts, use_fast_mixing, use_threads_for
from keras_mixer.compute.process_group import SINGLE
from keras_mixer.compute.rematerialization import rematerialize
from keras_mixer.errors import InputError
from keras_mixer.model.variants import MIXER

FAST_MIXING, XLA, PLAIN_GRAPH = "fast mixing", "XLA", "plain graph"
_DESCRIPTIONS = {PLAIN_GRAPH: "no XLA"}  # as checkpoints have always named it
# Keras's settings that would change a run: the expected value, and advice.
_SETTINGS = {
    "max_epochs": (None, "unset KERAS_MAX_EPOCHS, and give --epochs"),
    "max_steps_per_epoch": (None, "unset KERAS_MAX_STEPS_PER_EPOCH"),
    "floatx": ("float32", "--precision sets the precision of a run"),
}
# Keras's dtype policies, by --precision.
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


@dataclasses.dataclass(frozen=True)
class ComputePlan:
    """What computes a run and how.

    Attributes:
        engine: string: `"fast mixing"`, `"XLA"` or `"plain graph"`.
        backend: string. Keras's backend.
        devices: tuple of the names of the devices, of all processes.
        processes: int.
        policy: string. Keras dtype policy.
        batch_size: int. Images of an optimizer step.
        accumulation: int. Micro-batches of a step.
        parts: int. Parts of a micro-batch that fast mixing computes side by side.
        remat: bool. Compute the inside of mixer layers again in the backward pass.
    """

    engine: str
    backend: str
    devices: tuple[str, ...]
    processes: int
    policy: str
    batch_size: int
    accumulation: int
    parts: int
    remat: bool

    @property
    def micro_batch_size(self):
        """Images that are computed at once."""
        return self.batch_size // self.accumulation

    @property
    def jit_compile(self):
        """Whether Keras compiles the whole step with XLA."""
        return self.engine == XLA

    def describe(self):
        """Returns the plan as text; only equal texts give results with equal bits.

        Checkpoints hold it, as `computed_by`.
        """
        engine = _DESCRIPTIONS.get(self.engine, self.engine)
        parts = f" in {self.parts} parts" if self.engine == FAST_MIXING and self.parts > 1 else ""
        devices = "CPU" if self.devices == ("cpu:0",) else ", ".join(self.devices)
        if self.processes > 1:
            devices = f"{len(self.devices)} devices of {self.processes} processes"
        remat = ["rematerialized"] if self.remat else []
        backend = [self.backend] if self.backend != "tensorflow" else []
        return ", ".join([devices, f"{engine}{parts}", *remat, *backend])

    def set_threads(self):
        """Gives TensorFlow the threads that are fastest for the plan, unless it is in use."""
        if self.engine == FAST_MIXING:
            use_threads_for(self.micro_batch_size)

    def data_parallel(self):
        """Returns a context in which models are built to share every batch among the devices."""
        return data_parallel(self.devices, self.batch_size)

    def prepare(self, model):
        """Returns a model with the same layers and weights that trains by this plan."""
        if self.engine == FAST_MIXING:
            model = use_fast_mixing(model, self.micro_batch_size, self.remat)
        elif self.remat:
            model = rematerialize(model)
        return accumulate_gradients(model, self.accumulation) if self.accumulation > 1 else model


def resolve_plan(config, group=SINGLE):
    """Returns the `ComputePlan` of a `Config` and a `ProcessGroup`.

    Raises:
        InputError: If --devices does not fit the machine or the backend.
    """
    return ComputePlan(
        engine=_engine(config),
        backend=keras.backend.backend(),
        devices=tuple(choose_devices(config.devices, group)),
        processes=group.count,
        policy=POLICIES[config.precision],
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        parts=number_of_parts(config.batch_size // config.accumulation),
        remat=config.remat,
    )


def _engine(config):
    """Returns what computes a step; with --jit=auto, what was measured to be fastest.

    On a CPU that is fast mixing, which has no float16 and needs the mixer layers that baselines do
    not have.
    """
    if config.jit != "auto":
        return XLA if config.jit == "true" else PLAIN_GRAPH
    if keras.backend.backend() == "jax" or tf.config.list_physical_devices("GPU"):
        return XLA
    plain = config.precision == "float16" or config.model != MIXER
    return PLAIN_GRAPH if plain else FAST_MIXING


@contextlib.contextmanager
def compute_plan(config, group=SINGLE):
    """Prepares Keras's backend for a run, and connects the processes until the block ends.

    Yields:
        The `ComputePlan`.

    Raises:
        InputError: If Keras's settings or --devices do not fit the run.
    """
    _check_keras()
    if config.deterministic:
        _make_deterministic()
    with group.jax_connected():
        plan = resolve_plan(config, group)
        plan.set_threads()
        yield plan


def _check_keras():
    """Raises an `InputError` if Keras's backend or settings would change the training."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise InputError(
            f"training runs on Keras's TensorFlow and JAX backends, not on {backend}; "
            f"unset KERAS_BACKEND"
        )
    if backend == "jax":
        keep_tensorflow_off_gpus()
    for name, (expected, advice) in _SETTINGS.items():
        if (value := getattr(keras.config, name)()) != expected:
            raise InputError(f"Keras is set to {name}={value}: expected {expected}; {advice}")


def _make_deterministic():
    """Restricts the backend to deterministic operations; called before it computes anything."""
    tf.config.experimental.enable_op_determinism()
    if keras.backend.backend() == "jax":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
