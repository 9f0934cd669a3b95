"""Trains a Mixer with `model.fit`, from a Config to weights in a run directory.

The order of the data and all random numbers are functions of the seed and the step, so that the
same command continues an interrupted run exactly.
"""

import contextlib

import keras
import tensorflow as tf

from keras_mixer.compute.plan import compute_plan
from keras_mixer.errors import RunError
from keras_mixer.log import logger, progress_bar
from keras_mixer.runs.open_run import open_run
from keras_mixer.runs.resume import is_over, last_state
from keras_mixer.signals import Interrupted, StopRequest
from keras_mixer.training.batches import (
    balanced_class_weights,
    batches_of,
    naming_broken_images,
    training_images,
    validation_batches,
)
from keras_mixer.training.callbacks import (
    Agreement,
    Clock,
    EpochEnd,
    ProgressBar,
    Restoration,
    Saver,
    check_callbacks,
)
from keras_mixer.training.compile import compile_model
from keras_mixer.training.schedules import schedule_of
from keras_mixer.training.tensorboard import Board


def fit(config, callbacks=()):
    """Trains a Mixer, or continues an interrupted run of the same config.

    Args:
        config: `keras_mixer.Config`.
        callbacks: Keras callbacks, called after those of the run. Their logs of an epoch have
            `learning_rate`, `val_loss` and `val_accuracy`; their `model` is saved as the plain one
            that `build_mixer` makes, without --ema; `model.stop_training` ends the run after that
            epoch. A resumed run calls them for the epochs that are left; their own state is not
            saved. Of several processes, each calls its own, and all have to stop after the same
            epoch.

    Returns:
        The `Run`; its directory holds history.csv, best/ and checkpoints/.

    Raises:
        InputError: If the config, the data, the directory or a callback are not valid.
        RunError: If training cannot continue, such as when the loss is not finite.
        Interrupted: If a signal stopped the run, after its state was saved.
    """
    with open_run(config) as run:
        fit_run(run, callbacks)
    return run


def fit_run(run, callbacks=()):
    """Trains a run from `open_run`; see `fit`."""
    check_callbacks(callbacks)
    with compute_plan(run.config, run.group) as plan:
        progress, arrays = last_state(run, plan)
        if not is_over(run, progress):
            with plan.data_parallel():
                _train(run, plan, progress, arrays, callbacks)


def _train(run, plan, progress, arrays, callbacks):
    keras.utils.set_random_seed(run.config.seed)
    schedule = schedule_of(run)
    model, metric_variables = compile_model(run, plan, schedule, resumed=arrays is not None)
    images = training_images(run, progress.step)
    several = run.group.count > 1
    with StopRequest(agreed=several) as stop, progress_bar() as bar, run.group.training():
        saver = Saver(run, progress, metric_variables, stop)
        callbacks = [
            Restoration(metric_variables, arrays),
            Clock(progress),
            *([Agreement(run.group, progress, stop)] if several else []),
            EpochEnd(run, progress, validation_batches(run), schedule),
            saver,
            ProgressBar(run, progress, bar),
            *([Board(run, progress)] if run.config.tensorboard and run.group.is_main else []),
            *callbacks,
        ]
        with naming_broken_images(run), _memory_errors(run):
            _call_fit(model, run, images, progress, callbacks, stop)
    saver.save(model)
    if stop:
        raise Interrupted(stop.signal_number)


def _call_fit(model, run, images, progress, callbacks, stop):
    """Calls `model.fit` until the last step: once, or up to three times around partial epochs.

    A run that was stopped within an epoch finishes it first; one whose steps are no multiple of the
    epoch's ends with a shorter epoch.
    """
    class_weights = balanced_class_weights(run)
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
    """Warns of steps that overflowed in float16, which the optimizer skips; most must not."""
    skipped = progress.step - taken
    message = f"{skipped} of {progress.step} steps overflowed in {run.config.precision}"
    if skipped > progress.step // 2:
        raise RunError(f"{message}: lower --lr, or train with --precision=bfloat16")
    if skipped:
        logger.warning(f"{message}: skipped")


@contextlib.contextmanager
def _memory_errors(run):
    """Turns an error of TensorFlow or JAX about memory into a `RunError` that names the flags."""
    try:
        yield
    except (tf.errors.ResourceExhaustedError, RuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and isinstance(error, RuntimeError):
            raise  # JAX's errors are RuntimeErrors
        raise RunError(
            f"out of memory at --batch_size={run.config.batch_size}: lower it, choose a "
            f"smaller model or --precision=bfloat16, or add --accumulation=2 or --remat"
        ) from error
