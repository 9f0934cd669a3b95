"""Where a run goes on: its newest checkpoint, and what has changed since."""

import dataclasses

import keras

from keras_mixer.compute.devices import images_at_once, way_of
from keras_mixer.compute.fast_mixing import number_of_parts
from keras_mixer.errors import InputError
from keras_mixer.log import logger
from keras_mixer.runs.checkpoints import newest_checkpoint, read_checkpoint
from keras_mixer.runs.open_run import check_beginning
from keras_mixer.runs.progress import Progress, is_over
from keras_mixer.weights import model_folder


def last_state(run, devices):
    """Returns the `Progress` of a run and the arrays of its newest checkpoint, None before one.

    Process 0 of several looks for it; the others read the one it has found.

    Args:
        run: `Run`.
        devices: list of the devices that will compute it.

    Raises:
        RunError: If there are checkpoints that cannot be read.
    """
    if run.group.is_main:
        progress, arrays = _newest_state(run, devices)
        run.group.exchange([dataclasses.asdict(progress), arrays is not None])
        return progress, arrays
    progress, saved = run.group.exchange(None)[0]
    arrays = read_checkpoint(run.checkpoints, progress["step"]) if saved else None
    return Progress(**progress), arrays


def _newest_state(run, devices):
    checkpoint = newest_checkpoint(run.checkpoints, run.identity)
    if checkpoint is None:
        check_beginning(run)
        names = ", ".join(run.dataset.class_names[:5])
        more = ", …" if len(run.dataset.class_names) > 5 else ""
        logger.info(
            f"training in {run.directory}: {len(run.dataset.train):,} images of "
            f"{len(run.dataset.class_names)} classes ({names}{more}), "
            f"{run.steps_per_epoch:,} steps an epoch, {run.total_steps:,} steps"
        )
        return Progress(computed_by=_computed_by(run, devices), run=run.identity), None
    progress = Progress(**checkpoint.progress)
    if not is_over(run, progress):
        logger.info(f"continuing {run.directory} at step {progress.step} of {run.total_steps}")
        _note_changes(run, progress, devices)
    return progress, checkpoint.arrays


def _computed_by(run, devices):
    config = run.config
    way, parts = way_of(config), number_of_parts(images_at_once(config))
    if way == "fast mixing" and parts > 1:
        way += f" in {parts} parts"
    if config.remat:
        way += ", rematerialized"
    if keras.backend.backend() != "tensorflow":
        way += f", {keras.backend.backend()}"
    names = "CPU" if devices == ["cpu:0"] else ", ".join(devices)
    if run.group.count > 1:
        names = f"{len(devices)} devices of {run.group.count} processes"
    return f"{names}, {way}"


def _note_changes(run, progress, devices):
    """Prints, and notes in `progress`, what has changed since the checkpoint was written."""
    if (now := _computed_by(run, devices)) != (before := progress.computed_by):
        drawn = " and in what dropout draws" * (now.endswith(", jax") != before.endswith(", jax"))
        logger.warning(
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
        logger.warning(f"{error}: replaced by the best epoch from here on")
        return None
    if facts["sha256"] == progress.best_sha256:
        return progress.best
    if facts.get("run") == run.identity and facts["step"] > progress.step:
        return None
    raise run.other_best(progress.best["epoch"])
