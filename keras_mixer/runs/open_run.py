"""Opens a run: locks its directory, and checks that the run in it has the same config and data.

TensorFlow is not imported, so that wrong input is reported within a second or two.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
from pathlib import Path

import filelock

from keras_mixer.compute.environment import environment, software
from keras_mixer.compute.process_group import join_processes
from keras_mixer.config.options import format_value
from keras_mixer.config.resolve import resolve
from keras_mixer.config.training import Config
from keras_mixer.data.shared_images import note_shared_images
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import (
    InputError,
    InUseError,
    errors_about,
    join_names,
    path_errors,
)
from keras_mixer.files import HELD, listed, locked
from keras_mixer.log import VERBOSITIES, debugging, logger, show_messages
from keras_mixer.model.architecture import Architecture
from keras_mixer.runs.run import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    HISTORY,
    LOCK,
    LOGS,
    Run,
    clear,
    read_record,
    write_records,
)
from keras_mixer.weights.model_folder import digest
from keras_mixer.weights.pretrained import read_pretrained


@contextlib.contextmanager
def open_run(config, check=None):
    """Opens a run for training: locks its directory, opens the data, resolves the config.

    Of several processes, process 0 does so; the others then read what it has written, and all
    compare their software, configs and data.

    Args:
        config: `Config`, as given.
        check: Function of the `Run` that may raise an error, before anything is written.

    Yields:
        A new `Run`, or one to be continued; locked until the block ends.

    Raises:
        InputError: If the data or the config are not valid, or the directory is in use or holds
            another run.
        RunError: If another process has ended.
    """
    with (
        join_processes() as group,
        (_open_in_main if group.is_main else _open_in_other)(config, check, group) as run,
    ):
        yield dataclasses.replace(run, group=group)
        group.exchange(None)  # all end together, after what process 0 does alone


@contextlib.contextmanager
def _open_in_main(config, check, group):
    """Opens a run in the only process, or in process 0 of several."""
    directory = Path(config.output_dir)
    with path_errors(f"--output_dir={directory}"):
        _check_path(directory, config)
    with _locked(directory):
        record = _check_contents(directory)
        dataset = open_dataset(**config.dataset_options())
        run, start = _plan_with_start(config, dataset, record)
        restart = config.overwrite or _has_other_data_and_no_state(directory, record, dataset)
        if record and not restart:
            _check_same_run(run, record)
            _check_same_data(directory, record, dataset)
            if not run.finished:
                _compare_environments(record["environment"])
        else:
            note_shared_images(dataset)
        if check:
            check(run)
        clear(directory, restart)
        write_records(run, config, start)
        group.exchange(None)  # the others may read what was checked and written
        check_same_in_all(group, run, start)
        yield dataclasses.replace(run, identity=read_record(directory)["identity"])


@contextlib.contextmanager
def _open_in_other(config, check, group):
    """Opens a run that process 0 has opened, checked and locked."""
    if not debugging():
        show_messages(VERBOSITIES["error"])  # process 0 shows the others
    group.exchange(None)
    directory = Path(config.output_dir)
    record = read_record(directory)
    if record is None:
        raise InputError(
            f"{directory} holds no {CONFIG} here, but on process 0 it does: --output_dir must be "
            f"a folder that all processes share"
        )
    run, start = _plan_with_start(config, open_dataset(**config.dataset_options()), record)
    check_same_in_all(group, run, start)
    yield dataclasses.replace(run, identity=record["identity"])


def _plan_with_start(config, dataset, record):
    """Returns the `Run` of a config, and the `start` of its config.json."""
    start, pretrained = _starting_point(config, record)
    resolved, spec = resolve(config, dataset, start and start["architecture"])
    run = Run(Path(config.output_dir), resolved, spec, dataset, pretrained)
    check_sizes(run)
    return run, start


def plan_run(config):
    """Returns the `Run` of a `Config` as given, without reading or making its directory.

    Raises:
        InputError: If the data or the config are not valid.
    """
    dataset = open_dataset(**config.dataset_options())
    pretrained = config.checkpoint and _read_checkpoint(config)
    architecture = pretrained.spec.architecture if pretrained else None
    resolved, spec = resolve(config, dataset, architecture)
    return Run(Path(config.output_dir), resolved, spec, dataset)


def read_run(directory, data_dir=None, labels=None):
    """Reads the `Run` in a directory, without a lock.

    Args:
        directory: Path of a run directory.
        data_dir: Folder of the data, if they have moved.
        labels: Path of the table of labels, if it has moved.

    Raises:
        InputError: If there is no run, or its data are missing or have changed.
    """
    directory = Path(directory)
    with path_errors(directory):
        if not directory.exists():
            raise InputError(f"{directory}: no such run")
        record = read_record(directory)
    if record is None:
        raise InputError(f"{directory}: not a run directory (it holds no {CONFIG})")
    config = Config.from_json(record["config"])
    moved = {"data_dir": data_dir, "labels": labels}
    moved = {name: path for name, path in moved.items() if path is not None}
    _check_data_exist(directory, config, moved)
    dataset = open_dataset(**config.dataset_options() | moved)
    _check_same_data(directory, record, dataset)
    config, spec = resolve(config, dataset)
    return Run(directory, config, spec, dataset, identity=record["identity"])


def _check_data_exist(directory, config, moved):
    for name, what in (("data_dir", "images"), ("labels", "label file")):
        path = getattr(config, name)
        if path and name not in moved and not os.path.exists(path):
            raise InputError(
                f"{directory} was trained on {path}, which does not exist; give the path of its "
                f"{what} with --{name}"
            )


# === Locking ===


@contextlib.contextmanager
def _locked(directory):
    """Locks the directory; in the end, removes it if it was made here and holds no run."""
    with contextlib.ExitStack() as cleanup:
        with path_errors(f"--output_dir={directory}"):
            for path in [*reversed(directory.parents), directory]:
                if not path.exists():
                    cleanup.callback(_remove_unless_run, path, path.rmdir)
            directory.mkdir(parents=True, exist_ok=True)
            _lock(directory, cleanup)
        cleanup.callback(_remove_unless_run, directory, (directory / LOCK).unlink)
        yield


def _remove_unless_run(directory, remove):
    with contextlib.suppress(OSError):  # a folder is not empty; Windows removes no open files
        if not (directory / CONFIG).exists():
            remove()


def _lock(directory, cleanup):
    try:
        cleanup.enter_context(locked(directory / LOCK, timeout=0))
    except filelock.Timeout as error:
        held = directory / f"{LOCK}{HELD}"
        hint = f" (the file system has no locks, so {held} is the lock)" * held.exists()
        raise InUseError(
            f"--output_dir={directory} is in use: another process is training there{hint}"
        ) from error


# === Checks ===


def _check_path(directory, config):
    if config.dataset == "folder" and config.data_dir:
        data = Path(config.data_dir).resolve()
        if data in directory.resolve().parents:
            raise InputError(
                f"--output_dir={directory} lies inside --data_dir={config.data_dir}, where it "
                f"would be taken for a class; give another --output_dir"
            )
    own = {directory.resolve(), (directory / BEST).resolve()}
    if config.checkpoint and Path(config.checkpoint).resolve() in own:
        raise InputError(
            f"--checkpoint={config.checkpoint} is --output_dir={directory} itself, which the new "
            f"run would overwrite; give another --output_dir"
        )


def _check_contents(directory):
    """Returns the directory's config.json; None for a new run, whose directory must be empty."""
    record = read_record(directory)
    if record is None and (others := _other_files(directory)):
        raise InputError(
            f"--output_dir={directory} holds other files but no {CONFIG}, so it is not a run: "
            f"{join_names(others)}; give a new or an empty folder"
        )
    return record


def _other_files(directory):
    """Returns the names in a folder, but for hidden files and logs of others."""
    names = [path.name for path in listed(directory)]
    names = [n for n in names if not n.startswith(".") and not n.endswith(".log") and n != LOGS]
    return [*names, *(f"{LOGS}/{c}" for c in CURVES if (directory / LOGS / c).exists())]


def _starting_point(config, record):
    """Returns the `start` of config.json and the `Pretrained` weights, each None if not needed.

    A run that has checkpoints continues from them, so the weights are not read again.
    """
    if config.checkpoint is None:
        return None, None
    recorded = record and not config.overwrite and record.get("start")
    if recorded and _has_checkpoints(Path(config.output_dir)):
        return {**recorded, "architecture": Architecture.from_json(recorded["architecture"])}, None
    pretrained = _read_checkpoint(config)
    start = {"architecture": pretrained.spec.architecture, "sha256": digest(pretrained.arrays)}
    if recorded and recorded["sha256"] != start["sha256"]:
        before = record["config"]["checkpoint"]
        changed = f"has changed since {config.output_dir} began"
        if before != config.checkpoint:
            changed = f"has other weights than {before}, from which {config.output_dir} began"
        raise InputError(f"--checkpoint={config.checkpoint} {changed}; give another --output_dir")
    return start, pretrained


def _has_checkpoints(directory):
    return bool(listed(directory / CHECKPOINTS, "step-*"))


def _read_checkpoint(config):
    """Reads the `Pretrained` weights of --checkpoint; errors name the flag."""
    with errors_about("--checkpoint"):
        return read_pretrained(config.checkpoint, config.image_shape)


def check_sizes(run):
    """Raises an `InputError` if a run has too few images for its config, or weights do not fit."""
    if run.steps_per_epoch == 0:
        raise InputError(
            f"--batch_size={run.config.batch_size}: there are only {len(run.dataset.train)} "
            f"training images; give at most that many"
        )
    if run.config.early_stopping and run.dataset.validation is None:
        raise InputError(
            f"--early_stopping={run.config.early_stopping} needs a validation split; "
            f"give --validation_fraction"
        )
    if run.config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise InputError("--tensorboard needs a package: pip install 'keras_mixer[tensorboard]'")
    run.dataset.split(run.config.eval_split)


def note_split_to_score(run):
    """Warns that there are no test images, if validation images are scored instead."""
    if run.dataset.test is None and run.config.eval_split == "validation":
        logger.warning(
            "there are no test images: the validation images are scored, which have also chosen "
            "the epoch, so expect a lower accuracy on new images"
        )


def note_slow_average(run):
    """Warns if the EMA of a short run would keep more than a hundredth of the initial weights."""
    ema, steps = run.config.ema, run.total_steps
    if (left := ema**steps) > 0.01:
        shorter = math.floor(0.01 ** (1 / steps) * 1e4) / 1e4
        logger.warning(
            f"--ema={format_value(ema)}: after {steps} steps, {left:.1%} of the initial weights "
            f"would remain in what is evaluated and exported; --ema={shorter} leaves 1%"
        )


def _check_same_run(run, record):
    """Raises an `InputError` if other flags than those of the run would change its result."""
    config = run.config
    before = Config.from_json(record["config"])
    architecture = record["start"] and Architecture.from_json(record["start"]["architecture"])
    # Resolved again: fields that an earlier version lacked get their defaults.
    data = dataclasses.replace(run.dataset, class_names=tuple(record["data"]["class_names"]))
    before, _ = resolve(before, data, architecture)
    differing = [
        f"--{field.name} was {format_value(getattr(before, field.name))}, "
        f"now {format_value(getattr(config, field.name))}"
        for field in dataclasses.fields(Config)
        if field.metadata["result"] and getattr(before, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise InputError(
            f"--output_dir={run.directory} holds another run: {'; '.join(differing)}. "
            f"Give another --output_dir to keep it (and --checkpoint={run.directory} to start from "
            f"its weights), or --overwrite to delete it"
        )


def _has_other_data_and_no_state(directory, record, dataset):
    """Returns whether a run on other data ended before anything was saved, as by a broken image."""
    saved = (directory / HISTORY).exists() or _has_checkpoints(directory)
    found = record is not None and not saved and record["data"]["identity"] != dataset.identity
    if found:
        logger.info(f"{directory} began with other data and saved nothing: it starts over")
    return found


def _check_same_data(directory, record, dataset):
    if record["data"]["identity"] != dataset.identity:
        raise InputError(
            f"{directory} was trained on other data: their files, order, labels or classes have "
            f"changed since. Restore them, or give the folder that has them with --data_dir; to "
            f"train on other data, give another --output_dir"
        )


def _compare_environments(before):
    """Warns if the environment has changed since a run began: a dict of `environment`."""
    now = environment()
    changed = [
        f"{name} was {value}, is {now.get(name)}"
        for name, value in before.items()
        if now.get(name) != value
    ]
    if changed:
        logger.warning(
            f"the run began in another environment ({'; '.join(changed)}): "
            f"results may differ from an uninterrupted run's in their last bits"
        )


# === Several processes ===


def check_same_in_all(group, run, start):
    """Raises an `InputError`, in all processes of a group, unless all would train the same run.

    Each gives its `Run`, and the `start` of its config.json.
    """
    if group.count == 1:
        return
    own = {
        "software": software(),
        "options": {name: format_value(getattr(run.config, name)) for name in COMMON_OPTIONS},
        "data": run.dataset.identity,
        "start": start and start["sha256"],
    }
    first, *others = group.exchange(own)
    for name, other in zip(group.names[1:], others, strict=True):
        if differing := _differences(first, other):
            raise InputError(f"{name} would train another run: {'; '.join(differing)}")


COMMON_OPTIONS = [
    field.name
    for field in dataclasses.fields(Config)
    if field.metadata["result"] or field.name in ("remat", "devices")
]


def _differences(first, other):
    found = [
        f"{flag}{name} is {other[group].get(name)}, on process 0 {value}"
        for group, flag in (("software", ""), ("options", "--"))
        for name, value in first[group].items()
        if other[group].get(name) != value
    ]
    if other["data"] != first["data"]:
        found.append("its data have other files, sizes, labels or classes than those of process 0")
    if other["start"] != first["start"]:
        found.append("its --checkpoint holds other weights than that of process 0")
    return found
