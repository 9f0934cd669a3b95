"""Callbacks of `model.fit`: validation, history, checkpoints, stopping, the progress bar.

Keras's BackupAndRestore and ModelCheckpoint are not used: they do not write atomically, do not save
the states of seed generators, and repeat data on resume (Keras 3.15.1; see `checkpoints.py`).
"""

import contextlib
import dataclasses
import time

import keras
import numpy as np

from keras_mixer.compute.devices import validate
from keras_mixer.errors import InputError, RunError
from keras_mixer.log import duration, logger
from keras_mixer.runs.checkpoints import (
    TrainState,
    gather_state,
    restore_state,
    save_checkpoint,
)
from keras_mixer.runs.resume import epoch_is_open, is_over, quality
from keras_mixer.runs.run import check_directory, write_history
from keras_mixer.training.optimizers import ema_variables
from keras_mixer.weights.load import model_weights
from keras_mixer.weights.model_folder import write_weights

# What a run does itself, by the callback of Keras that would change it.
_OF_THE_RUN = {
    "LearningRateScheduler": "sets the learning rate, as --scheduler does; choose with scheduler=",
    "ReduceLROnPlateau": "sets the learning rate, as --scheduler does; choose with scheduler=",
    "BackupAndRestore": "resumes a run, which fit does by itself",
    "SwapEMAWeights": "evaluates averaged weights, as --ema does; choose with ema=",
}


def check_callbacks(callbacks):
    """Raises an `InputError` for callbacks of Keras that do what a run does itself."""
    for callback in callbacks:
        for name, reason in _OF_THE_RUN.items():
            if isinstance(callback, getattr(keras.callbacks, name)):
                raise InputError(f"callbacks: {name} {reason}, and leave the callback out")


class Restoration(keras.callbacks.Callback):
    """Restores a checkpoint in the first `on_epoch_begin`, after Keras has reset the metrics.

    An epoch that was interrupted in the middle continues with its metrics.
    """

    def __init__(self, metric_variables, arrays):
        super().__init__()
        self.metric_variables = metric_variables
        self.arrays = arrays

    def on_epoch_begin(self, epoch, logs=None):
        if self.arrays is not None:
            restore_state(self.model, self.metric_variables, self.arrays)
            self.arrays = None


class Clock(keras.callbacks.Callback):
    """Counts steps and seconds, and checks the loss often enough to stop soon after a NaN."""

    CHECK_EVERY = 0.5  # seconds; reading the loss waits for the accelerator

    def __init__(self, progress):
        super().__init__()
        self.progress = progress

    def on_epoch_begin(self, epoch, logs=None):
        self._last = time.monotonic()
        self._checked = self._last

    def on_train_batch_end(self, batch, logs=None):
        now = time.monotonic()
        self.progress.seconds += now - self._last
        self.progress.step += 1
        self._last = now
        if now - self._checked > self.CHECK_EVERY:
            stop_unless_finite("loss", logs["loss"], self)
            self._checked = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        stop_unless_finite("loss", logs["loss"], self)


class Agreement(keras.callbacks.Callback):
    """Stops all processes after the same step, once one of them has received a signal.

    They exchange signals at the end of every epoch, and at steps that process 0 chooses.
    """

    EVERY = 1.0  # seconds between exchanges

    def __init__(self, group, progress, stop):
        super().__init__()
        self.group = group
        self.progress = progress
        self.stop = stop

    def on_train_begin(self, logs=None):
        self._exchanged = self._exchanged_at = None
        self._next = self.progress.step + 1

    def on_train_batch_end(self, batch, logs=None):
        self.group.note_progress()
        if self.progress.step == self._next:
            self._exchange()

    def on_epoch_end(self, epoch, logs=None):
        self._exchange()

    def _exchange(self):
        answers = self.group.exchange([self.stop.received, self._steps_until_next()])
        received = [number for number, _ in answers if number is not None]
        self.stop.signal_number = received[0] if received else None
        self._next = self.progress.step + answers[0][1]
        self._exchanged, self._exchanged_at = self.progress.step, time.monotonic()

    def _steps_until_next(self):
        """Returns the number of steps in `EVERY` seconds, at the speed since the last exchange."""
        if self._exchanged is None:
            return 1
        seconds = max(time.monotonic() - self._exchanged_at, 1e-9)
        return max(1, round((self.progress.step - self._exchanged) * self.EVERY / seconds))


def stop_unless_finite(name, value, callback):
    """Raises a `RunError` if a value is not finite, before it is saved."""
    if np.all(np.isfinite(value)):
        return
    raise RunError(
        f"the {name} is not finite by step {callback.progress.step}, at learning rate "
        f"{float(callback.model.optimizer.learning_rate):.2e}; checkpoints and best weights are "
        f"from before. Try a lower --lr, a longer --warmup_epochs or --clip_norm=1"
    )


class EpochEnd(keras.callbacks.Callback):
    """Validates at the end of every epoch, adds a row to history.csv and saves the best weights.

    Validation batches may be None; the schedule is the learning rate as a function of the step.
    """

    def __init__(self, run, progress, validation, schedule):
        super().__init__()
        self.run = run
        self.progress = progress
        self.validation = validation
        self.schedule = schedule

    def on_epoch_end(self, epoch, logs=None):
        if epoch_is_open(self.run, self.progress.step):
            return  # stopped within the epoch; the resumed run finishes it
        is_main = self.run.group.is_main
        if is_main:
            check_directory(self.run)
        row = self._row(epoch, logs)
        with use_ema_weights(self.model):
            if self.validation is not None:
                scores = validate(self.model, self.validation, self.run.group)
                stop_unless_finite("validation loss", scores["loss"], self)
                row |= {"val_loss": scores["loss"], "val_accuracy": scores["accuracy"]}
            if self.validation is None or quality(row) > quality(self.progress.best):
                if is_main:
                    self._write_best(row)
                self.progress.best = row
        if logs is not None:  # for the callbacks after this one
            values = {
                "learning_rate": row["lr"],
                **{n: row[n] for n in ("val_loss", "val_accuracy")},
            }
            logs |= {name: value for name, value in values.items() if value is not None}
        self.progress.rows.append(row)
        self.progress.seconds = 0.0
        self.model.reset_metrics()  # as in a run that is resumed at the next epoch
        if is_main:
            write_history(self.run.directory, self.progress.rows)
        logger.info(_line(row, self.run))

    def _write_best(self, row):
        metadata = {name: row[name] for name in ("epoch", "step", "val_loss", "val_accuracy")}
        weights = model_weights(self.model)
        sha256 = write_weights(self.run.best, weights, **metadata, run=self.run.identity)
        self.progress.best_sha256 = sha256

    def _row(self, epoch, logs):
        first_step = epoch * self.run.steps_per_epoch
        images = (self.progress.step - first_step) * self.run.config.batch_size
        last_step = max(int(self.model.optimizer.iterations) - 1, 0)
        return {
            "epoch": epoch + 1,
            "step": self.progress.step,
            "lr": float(self.schedule(last_step)),
            "loss": float(logs["loss"]),
            "accuracy": float(logs["accuracy"]),
            "val_loss": None,
            "val_accuracy": None,
            "seconds": round(self.progress.seconds, 3),
            "images_per_second": round(images / max(self.progress.seconds, 1e-9), 1),
        }


def _line(row, run):
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    parts = [f"{name} {row[name]:.4f}" for name in names if row[name] is not None]
    epochs = -(-run.total_steps // run.steps_per_epoch)
    rate = f"{row['images_per_second']:,.0f} images/s"
    return f"epoch {row['epoch']}/{epochs}  {'  '.join(parts)}  lr {row['lr']:.2e}  {rate}"


@contextlib.contextmanager
def use_ema_weights(model):
    """Replaces the model's weights by their EMA, and restores them at the end, bit for bit."""
    averages = ema_variables(model.optimizer)
    variables = model.trainable_variables if averages else []
    originals = [variable.numpy() for variable in variables]
    for variable, average in zip(variables, averages, strict=True):
        variable.assign(average.numpy())  # a copy, as JAX reuses the memory of what it assigns
    try:
        yield
    finally:
        for variable, original in zip(variables, originals, strict=True):
            variable.assign(original)


class Saver(keras.callbacks.Callback):
    """Writes checkpoints when they are due, and stops the run after a `StopRequest`."""

    def __init__(self, run, progress, metric_variables, stop):
        super().__init__()
        self.run = run
        self.progress = progress
        self.metric_variables = metric_variables
        self.stop = stop
        self._saved_step = progress.step

    def on_train_batch_end(self, batch, logs=None):
        if not epoch_is_open(self.run, self.progress.step):
            return  # on_epoch_end saves, once EpochEnd has validated
        config = self.run.config
        due = config.save_unit == "step" and self.progress.step % config.save_every == 0
        self._save_or_stop(due)

    def on_epoch_end(self, epoch, logs=None):
        config = self.run.config
        reached = epoch + 1 if config.save_unit == "epoch" else self.progress.step
        over = is_over(self.run, self.progress)
        if over and self.progress.step < self.run.total_steps:
            epochs = config.early_stopping
            logger.info(f"stopped early: {epochs} epochs without a better epoch")
        self._save_or_stop(due=over or reached % config.save_every == 0)
        self.model.stop_training |= over

    def _save_or_stop(self, due):
        if due or self.stop:
            self.save(self.model)
        if self.stop:
            self.model.stop_training = True

    def save(self, model):
        """Writes a checkpoint, unless there is one of this step."""
        if self._saved_step == self.progress.step or not self.run.group.is_main:
            return
        check_directory(self.run)
        arrays = gather_state(model, self.metric_variables)
        for name, array in arrays.items():
            stop_unless_finite(f"value of {name}", array, self)
        progress = dataclasses.asdict(self.progress)
        save_checkpoint(self.run.checkpoints, TrainState(self.progress.step, arrays, progress))
        self._saved_step = self.progress.step


class ProgressBar(keras.callbacks.Callback):
    """One progress bar for the whole run, in `bar`, a rich Progress from `progress_bar`."""

    WAIT = 3.0  # seconds of steps to estimate the time of an epoch from

    def __init__(self, run, progress, bar):
        super().__init__()
        self.run = run
        self.progress = progress
        self.started = time.monotonic()
        self.first_step = progress.step
        self.estimated = False
        self.bar = bar
        self.task = bar.add_task(
            "training", total=run.total_steps, completed=progress.step, status=""
        )

    def on_train_batch_end(self, batch, logs=None):
        steps = self.progress.step - self.first_step
        if steps == 1:
            self.compiled = time.monotonic()
            seconds = self.compiled - self.started
            logger.info(f"first step done after {seconds:.1f} s, compilation included")
        elif not self.estimated:
            self._estimate(steps - 1, time.monotonic() - self.compiled)
        if not self.bar.disable:
            self.bar.update(self.task, completed=self.progress.step, status=self._status())

    def on_epoch_end(self, epoch, logs=None):
        self.estimated = True  # the line of the epoch says it

    def _estimate(self, steps, seconds):
        """Logs once how long the run will take, if its first epoch is long."""
        if seconds < self.WAIT:
            return
        self.estimated = True
        epoch = self.run.steps_per_epoch * seconds / steps
        left = (self.run.total_steps - self.progress.step) * seconds / steps
        if epoch > 2 * self.WAIT:
            logger.info(f"about {duration(epoch)} an epoch, {duration(left)} in all")

    def _status(self):
        row = self.progress.rows[-1] if self.progress.rows else {}
        accuracy = row.get("val_accuracy")
        return "" if accuracy is None else f"val_accuracy {accuracy:.4f}"
