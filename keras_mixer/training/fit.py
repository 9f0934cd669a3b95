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

from keras_mixer.compute.accumulation import accumulate_gradients
from keras_mixer.compute.devices import (
    check_backend,
    choose_devices,
    connected,
    images_at_once,
    make_deterministic,
    sharing,
    way_of,
)
from keras_mixer.compute.fast_mixing import use_fast_mixing, use_threads_for
from keras_mixer.compute.rematerialization import rematerialize
from keras_mixer.compute.tracing import forget_gradients
from keras_mixer.errors import RunError
from keras_mixer.log import logger, progress_bar
from keras_mixer.model.baselines import build_model
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.input_pipeline import (
    KEPT_BYTES,
    Part,
    evaluation_batches,
    keep_in_memory,
    training_batches,
)
from keras_mixer.runs.checkpoints import check_space
from keras_mixer.runs.open_run import open_run
from keras_mixer.runs.progress import is_over
from keras_mixer.runs.resume import last_state
from keras_mixer.runs.state import state_size
from keras_mixer.signals import Interrupted, StopRequest
from keras_mixer.training.callbacks import (
    Agreement,
    Clock,
    EpochEnd,
    ProgressBar,
    Restoration,
    Saver,
)
from keras_mixer.training.finetuning import describe_trained, freeze_backbone, layer_rates
from keras_mixer.training.losses import KERAS_LOSSES
from keras_mixer.training.optimizers import build_optimizer
from keras_mixer.training.schedules import WarmupDecay
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import assign_weights
from keras_mixer.weights.pretrained import adapt_pretrained, log_pretrained

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def fit(config, callbacks=()):
    """Trains a Mixer, or continues an interrupted run of the same config.

    Args:
        config: `keras_mixer.Config`.
        callbacks: Keras callbacks, called after the ones of the run. Their logs of an epoch have
            `val_loss` and `val_accuracy`; `model.stop_training` ends the run after that epoch. A
            resumed run calls them for the epochs that are left; what they change is not saved. Of
            several processes, each calls its own, and all have to stop after the same epoch.

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
    with connected(run.group):
        devices = choose_devices(run.config.devices, run.group)
        progress, arrays = last_state(run, devices)
        if is_over(run, progress):
            _finish(run, progress)
            return
        with sharing(devices, run.config.batch_size):
            _train(run, progress, arrays, callbacks)


def _train(run, progress, arrays, callbacks):
    keras.utils.set_random_seed(run.config.seed)
    schedule = _schedule(run)
    model, meters = compiled_model(run, schedule, resumed=arrays is not None)
    if run.group.is_main:
        check_space(run.directory, state_size(model, meters))
        model_folder.write_spec(run.best, run.spec)
    images = training_images(run, progress.step)
    several = run.group.count > 1
    with StopRequest(agreed=several) as stop, progress_bar() as bar, run.group.training():
        saver = Saver(run, progress, meters, stop)
        callbacks = [
            Restoration(meters, arrays),
            Clock(progress),
            *([Agreement(run.group, progress, stop)] if several else []),
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
    if way_of(config) == "fast mixing":
        use_threads_for(images_at_once(config))


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
    if not (run.config.tensorboard and run.group.is_main):
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
    if way_of(config) == "fast mixing":
        model = use_fast_mixing(model, images_at_once(config), config.remat)
    elif config.remat:
        model = rematerialize(model)
    return accumulate_gradients(model, config.accumulation) if config.accumulation > 1 else model


def _assign_pretrained(run, model):
    """Copies the pretrained weights into the model, adapted to its shapes."""
    config = run.config
    pretrained = log_pretrained(run.pretrained, config.checkpoint)
    shapes = config.image_shape, config.patch_shape
    adapted = adapt_pretrained(pretrained, *shapes, config.resize_tokens)
    new_head = adapted.spec.class_names != run.dataset.class_names
    assign_weights(model, adapted.arrays, config.checkpoint, new_head)
    run.pretrained.arrays.clear()  # frees up to a gigabyte
    if new_head:
        logger.info(f"new head: {_why_new_head(config, adapted.spec)}")
    for name, value in dataclasses.asdict(adapted.spec.preprocessing).items():
        if value != (own := getattr(run.spec.preprocessing, name)):
            logger.info(
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
    logger.info(describe_trained(model, rates))
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
        jit_compile=way_of(config) == "XLA",
        auto_scale_loss=False,  # build_optimizer does it
    )
    return [*model.metrics[0].variables, *accuracy.variables]


def _finish(run, progress):
    """Writes the history of a run that is over, and checks that its best weights are there."""
    if not run.group.is_main:
        return
    run.write_history(progress.rows)
    if model_folder.read_metadata(run.best)["sha256"] != progress.best_sha256:
        raise run.other_best(progress.best["epoch"])


def _validation_batches(run):
    if run.dataset.validation is None:
        return None
    split, sizes = run.dataset.validation, run.spec.architecture
    batches = evaluation_batches(split, run.spec, part=_part_of(run.group))
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
            logger.info(f"stopped by a callback at step {progress.step} of {run.total_steps}")
            return


def _check_steps(run, progress, taken):
    """Compares the optimizer's count of steps with that of batches; float16 steps can overflow."""
    left_out = progress.step - taken
    if run.config.precision == "float16" and 0 < left_out <= progress.step // 2:
        logger.warning(
            f"{left_out} of {progress.step} steps overflowed in float16 and were left out"
        )
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
    if images_left <= len(train) or run.group.count > 1:  # which read their parts alone
        return train
    with broken_images_named(train):
        return keep_in_memory(train)


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
        part=_part_of(run.group),
        **run.config.augmentation(),
    )


def _part_of(group):
    return Part(group.index, group.count) if group.count > 1 else None


def _class_weights(run):
    """Returns inverse class frequencies, with mean 1 over the training images, or None."""
    if run.config.class_weights == "none":
        return None
    counts = None
    if run.group.is_main:  # labels in records take all of them to be read
        labels = run.dataset.train.read_labels()
        counts = np.bincount(labels, minlength=run.config.num_classes).tolist()
    counts = np.array(run.group.exchange(counts)[0])
    present = counts > 0  # a training split given by the user may lack classes
    weights = counts.sum() / (present.sum() * np.maximum(counts, 1))
    return np.where(present, weights, 0.0).astype(np.float32)
