"""Trains a Mixer with `model.fit`, from a Config to weights in a run directory.

The order of the data and every random draw are functions of the seed and the step, so the same
command continues an interrupted run exactly.
"""

import contextlib
import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from keras_mixer import console
from keras_mixer.errors import InputError, RunError
from keras_mixer.model.baselines import build_model
from keras_mixer.model.variants import MIXER
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.input_pipeline import (
    KEPT_BYTES,
    evaluation_batches,
    keep_in_memory,
    training_batches,
)
from keras_mixer.training.accumulation import accumulate_gradients
from keras_mixer.training.callbacks import Clock, EpochEnd, ProgressBar, Restoration, Saver
from keras_mixer.training.checkpoints import check_space, newest_checkpoint
from keras_mixer.training.devices import check_backend, choose_devices, make_deterministic, sharing
from keras_mixer.training.fast_mixing import number_of_parts, use_fast_mixing, use_threads_for
from keras_mixer.training.finetuning import describe_trained, freeze_backbone, layer_rates
from keras_mixer.training.losses import KERAS_LOSSES
from keras_mixer.training.open_run import check_beginning, open_run
from keras_mixer.training.optimizers import build_optimizer
from keras_mixer.training.progress import Progress, is_over
from keras_mixer.training.rematerialization import rematerialize
from keras_mixer.training.schedules import WarmupDecay
from keras_mixer.training.signals import Interrupted, StopRequest
from keras_mixer.training.state import state_size
from keras_mixer.training.tracing import forget_gradients
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import assign_weights
from keras_mixer.weights.pretrained import adapt_pretrained, announce

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def fit(config, callbacks=()):
    """Trains a Mixer, or continues an interrupted run of the same config.

    Args:
        config: `keras_mixer.Config`.
        callbacks: Keras callbacks, called after the ones of the run. Their logs of an epoch have
            `val_loss` and `val_accuracy`; `model.stop_training` ends the run after that epoch. A
            resumed run calls them for the epochs that are left; what they change is not saved.

    Returns:
        The `Run`; its directory holds history.csv, best/ and checkpoints/.

    Raises:
        InputError: If the config, the data or the directory are not valid.
        RunError: If training cannot go on, such as when the loss is not finite.
        Interrupted: If a signal stopped the run, after its state was saved.
    """
    with open_run(config) as run:
        fit_run(run, callbacks)
    return run


def fit_run(run, callbacks=()):
    """Trains a run from `open_run`; see `fit`."""
    check_backend()
    prepare_threads(run.config)
    if run.config.deterministic:
        make_deterministic()
    devices = choose_devices(run.config.devices)
    progress, arrays = _last_state(run, devices)
    if is_over(run, progress):
        _finish(run, progress)
        return
    with sharing(devices, run.config.batch_size):
        _train(run, progress, arrays, callbacks)


def _train(run, progress, arrays, callbacks):
    keras.utils.set_random_seed(run.config.seed)
    schedule = _schedule(run)
    model, meters = compiled_model(run, schedule, resumed=arrays is not None)
    check_space(run.directory, state_size(model, meters))
    model_folder.write_spec(run.best, run.spec)
    images = training_images(run, progress.step)
    with StopRequest() as stop, console.progress_bar() as bar:
        saver = Saver(run, progress, meters, stop)
        callbacks = [
            Restoration(meters, arrays),
            Clock(progress),
            EpochEnd(run, progress, _validation_batches(run), schedule),
            saver,
            ProgressBar(run, progress, bar),
            *_tensorboard(run, progress),
            *callbacks,
        ]
        with broken_images_named(run.dataset.train, run.dataset.validation), _memory_errors(run):
            _call_fit(model, run, images, progress, callbacks, stop)
    saver.save(model)
    if stop:
        raise Interrupted(stop.signal_number)


def prepare_threads(config):
    """Sets TensorFlow's threads to what is fastest for a run, unless it has been used before."""
    if _way(config) == "fast mixing":
        use_threads_for(_images_at_once(config))


def compiled_model(run, schedule, resumed=False):
    """Returns the model of a run, compiled, and the variables of its metrics, the loss first.

    Args:
        run: `Run`.
        schedule: Learning rate, a float or a Keras schedule.
        resumed: bool. Whether its weights will come from a checkpoint of the run.
    """
    model = _initial_model(run, resumed)
    forget_gradients(model)
    return model, _compile(model, run.config, schedule)


def _schedule(run):
    config = run.config
    steps = run.warmup_steps, run.total_steps
    return WarmupDecay(config.lr, *steps, config.scheduler, run.drop_steps, config.drop_factor)


def _tensorboard(run, progress):
    if not run.config.tensorboard:
        return []
    from keras_mixer.training.tensorboard import Board

    return [Board(run, progress)]


@contextlib.contextmanager
def _memory_errors(run):
    try:
        yield
    except (tf.errors.ResourceExhaustedError, RuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and isinstance(error, RuntimeError):
            raise  # JAX's errors are RuntimeErrors
        raise RunError(
            f"out of memory at --batch_size={run.config.batch_size}: lower it, choose a "
            f"smaller model or --precision=bfloat16, or add --accumulation=2 or --remat"
        ) from error


def _initial_model(run, resumed):
    config = run.config
    model = build_model(
        run.spec.architecture,
        head_bias=config.head_bias,
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
        dtype=POLICIES[config.precision],
    )
    if run.pretrained and not resumed:
        _assign_pretrained(run, model)
    if config.freeze == "backbone":
        freeze_backbone(model)
    if _way(config) == "fast mixing":
        model = use_fast_mixing(model, _images_at_once(config), config.remat)
    elif config.remat:
        model = rematerialize(model)
    return accumulate_gradients(model, config.accumulation) if config.accumulation > 1 else model


def _images_at_once(config):
    return config.batch_size // config.accumulation


def _assign_pretrained(run, model):
    """Copies the pretrained weights into the model, adapted to its shapes."""
    config = run.config
    pretrained = announce(run.pretrained, config.checkpoint)
    shapes = config.image_shape, config.patch_shape
    adapted = adapt_pretrained(pretrained, *shapes, config.resize_tokens)
    new_head = adapted.spec.class_names != run.dataset.class_names
    assign_weights(model, adapted.arrays, config.checkpoint, new_head)
    run.pretrained.arrays.clear()  # frees up to a gigabyte
    if new_head:
        console.say(f"new head: {_why_new_head(config, adapted.spec)}")
    for name, value in dataclasses.asdict(adapted.spec.preprocessing).items():
        if value != (own := getattr(run.spec.preprocessing, name)):
            console.say(
                f"{config.checkpoint} was trained with {name} {value}, this run has {own}; "
                f"--{name}={value} keeps it"
            )


def _why_new_head(config, spec):
    if spec.class_names is None:
        return f"the classes of {config.checkpoint} are not known"
    return f"{config.checkpoint} was trained on other classes"


def _compile(model, config, schedule):
    """Compiles the model; returns the variables of its metrics, the loss first."""
    accuracy = keras.metrics.CategoricalAccuracy("accuracy")
    weights, rates = model.trainable_variables, None
    if config.layer_decay < 1:
        rates = layer_rates(weights, config.depth, config.layer_decay)
    console.say(describe_trained(model, rates))
    model.compile(
        build_optimizer(
            config.optimizer,
            schedule,
            weights,
            momentum=config.momentum,
            decay=config.decay,
            clip_norm=config.clip_norm,
            ema=config.ema,
            scale_loss=config.precision == "float16",
            rates=rates,
        ),
        KERAS_LOSSES[config.loss](),
        metrics=[accuracy],
        jit_compile=_way(config) == "XLA",
        auto_scale_loss=False,  # build_optimizer does it
    )
    return [*model.metrics[0].variables, *accuracy.variables]


def _way(config):
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


def _finish(run, progress):
    """Writes the history of a run that is over, and checks that its best weights are there."""
    run.write_history(progress.rows)
    if model_folder.read_facts(run.best)["sha256"] != progress.best_sha256:
        raise run.other_best(progress.best["epoch"])


def _last_state(run, devices):
    checkpoint = newest_checkpoint(run.checkpoints, run.identity)
    if checkpoint is None:
        check_beginning(run)
        names = ", ".join(run.dataset.class_names[:5])
        more = ", …" if len(run.dataset.class_names) > 5 else ""
        console.say(
            f"training in {run.directory}: {len(run.dataset.train):,} images of "
            f"{len(run.dataset.class_names)} classes ({names}{more}), "
            f"{run.steps_per_epoch:,} steps an epoch, {run.total_steps:,} steps"
        )
        return Progress(computed_by=_computed_by(run.config, devices), run=run.identity), None
    progress = Progress(**checkpoint.progress)
    if not is_over(run, progress):
        console.say(f"continuing {run.directory} at step {progress.step} of {run.total_steps}")
        _note_changes(run, progress, devices)
    return progress, checkpoint.arrays


def _computed_by(config, devices):
    way, parts = _way(config), number_of_parts(_images_at_once(config))
    if way == "fast mixing" and parts > 1:
        way += f" in {parts} parts"
    if config.remat:
        way += ", rematerialized"
    if keras.backend.backend() != "tensorflow":
        way += f", {keras.backend.backend()}"
    return f"{'CPU' if devices == ['cpu:0'] else ', '.join(devices)}, {way}"


def _note_changes(run, progress, devices):
    """Prints, and notes in `progress`, what has changed since the checkpoint was written."""
    if (now := _computed_by(run.config, devices)) != (before := progress.computed_by):
        drawn = " and in what dropout draws" * (now.endswith(", jax") != before.endswith(", jax"))
        console.warn(
            f"computed by {before} until now, by {now} from here on: results may differ from an "
            f"uninterrupted run's in their last bits{drawn}"
        )
        progress.computed_by = now
    if progress.best is not None:
        progress.best = _confirmed_best(run, progress)


def _confirmed_best(run, progress):
    """Returns the history row of the best epoch, or None if the weights in best/ are of another.

    A kill between writing best/ and the checkpoint leaves weights of an epoch that will be
    repeated, and the repetition may differ in its last bits.
    """
    try:
        _, facts = model_folder.read_weights(run.best)
    except InputError as error:
        console.warn(f"{error}: replaced by the best epoch from here on")
        return None
    if facts["sha256"] == progress.best_sha256:
        return progress.best
    if facts.get("run") == run.identity and facts["step"] > progress.step:
        return None
    raise run.other_best(progress.best["epoch"])


def _validation_batches(run):
    if run.dataset.validation is None:
        return None
    split, sizes = run.dataset.validation, run.spec.architecture
    batches = evaluation_batches(split, run.spec)
    values = len(split) * math.prod(sizes.image_shape) * sizes.channels
    if 4 * values <= KEPT_BYTES:  # float32
        batches = batches.cache()
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, sizes.num_classes)))


def _call_fit(model, run, images, progress, callbacks, stop):
    """Calls `model.fit` until the last step: once, or up to three times around partial epochs.

    A run that was stopped within an epoch finishes it first; one whose steps are no multiple of the
    epoch's ends with a shorter epoch.
    """
    class_weights = _class_weights(run)
    while not is_over(run, progress) and not stop:
        epoch, done = divmod(progress.step, run.steps_per_epoch)
        whole_epochs = 0 if done else (run.total_steps - progress.step) // run.steps_per_epoch
        left = min(run.steps_per_epoch - done, run.total_steps - progress.step)
        model.fit(
            batches_of(run, images, class_weights, progress.step),
            initial_epoch=epoch,
            epochs=epoch + max(1, whole_epochs),
            steps_per_epoch=run.steps_per_epoch if whole_epochs else left,
            callbacks=callbacks,
            shuffle=False,
            verbose=0,
        )
        _check_steps(run, progress, int(model.optimizer.iterations))
        if model.stop_training and not (stop or is_over(run, progress)):
            console.say(f"stopped by a callback at step {progress.step} of {run.total_steps}")
            return


def _check_steps(run, progress, taken):
    """Compares the optimizer's count of steps with that of batches; float16 steps can overflow."""
    left_out = progress.step - taken
    if run.config.precision == "float16" and 0 < left_out <= progress.step // 2:
        console.warn(f"{left_out} of {progress.step} steps overflowed in float16 and were left out")
    elif run.config.precision == "float16" and left_out > 0:
        raise RunError(
            f"{left_out} of {progress.step} steps overflowed in float16: lower --lr, or train with "
            f"--precision=bfloat16"
        )
    elif left_out:
        raise RunError(
            f"the optimizer took {taken} steps, but {progress.step} batches were fed: "
            f"please report this"
        )


def training_images(run, step=0):
    """Returns the training images, in memory if they will be read more than once from a step on."""
    images_left = (run.total_steps - step) * run.config.batch_size
    train = run.dataset.train
    with broken_images_named(train):
        return keep_in_memory(train) if images_left > len(train) else train


def batches_of(run, images, class_weights=None, first_step=0):
    """Returns the training batches of a run; see `training_batches`."""
    return training_batches(
        images,
        run.spec,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        first_step=first_step,
        label_smoothing=run.config.label_smoothing,
        class_weights=class_weights,
        **run.config.augmentation(),
    )


def _class_weights(run):
    """Returns inverse class frequencies, with mean 1 over the training images, or None."""
    if run.config.class_weights == "none":
        return None
    counts = np.bincount(run.dataset.train.read_labels(), minlength=run.config.num_classes)
    present = counts > 0  # a training split given by the user may lack classes
    weights = counts.sum() / (present.sum() * np.maximum(counts, 1))
    return np.where(present, weights, 0.0).astype(np.float32)
