"""Opening a run directory: may this command train there, and is it the same run?

Nothing here imports TensorFlow, so that every refusal comes within a second or two.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import filelock

from keras_mixer import console
from keras_mixer.commandline import as_flags, shown
from keras_mixer.config import Config
from keras_mixer.data.sources import load_source
from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import write_atomically
from keras_mixer.resolve import resolve
from keras_mixer.training.run import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    FLAGS,
    LOCK,
    OURS,
    Run,
    read_record,
    write_json,
)
from keras_mixer.weights.load import read_checkpoint
from keras_mixer.weights.native import as_architecture, digest


@contextlib.contextmanager
def open_run(config):
    """Opens a run for training: reads the data, fills the config, claims the directory.

    Args:
        config: `Config`, as given.

    Yields:
        A `Run`, new or to be continued. Until the block ends no other process can open it.

    Raises:
        InputError: If the data, the config or the directory forbid it.
    """
    directory = Path(config.output_dir)
    source = load_source(**config.source())
    with path_errors(f"--output_dir={directory}"):
        record = _check_directory(directory, config)
    start = _starting_point(config, record)
    run = _resolved(config, source, start and start["architecture"])
    _check_sizes(run)
    if record and not config.overwrite:
        _same_run(run, record)
        _same_data(directory, record, source)
        _note_environment(record)
    with _claimed(directory):
        _clear(directory, config.overwrite)
        if not (directory / CONFIG).exists():
            write_json(directory / CONFIG, _record(run, start))
        if not (directory / FLAGS).exists():
            _write_flags(directory, config)
        yield run


def plan_run(config):
    """Returns the `Run` that a config would be: its data read, the config filled.

    Its directory is neither looked at nor made.

    Args:
        config: `Config`, as given.

    Raises:
        InputError: If the data or the config forbid it.
    """
    source = load_source(**config.source())
    start = config.checkpoint and read_checkpoint(config.checkpoint, config.image_shape)
    architecture = start.description.architecture if start else None
    return _resolved(config, source, architecture)


def read_run(directory, data_dir=None, labels=None):
    """Opens a run to look at it: its config and its data, without a claim to the directory.

    Args:
        directory: Path of a run directory.
        data_dir: Where the data are now, if they moved.
        labels: Where their table of labels is now, if it moved.

    Returns:
        A `Run`.

    Raises:
        InputError: If there is no run, or its data are gone or have changed.
    """
    directory = Path(directory)
    with path_errors(directory):
        record = read_record(directory)
    if record is None:
        raise InputError(f"{directory}: not a run directory (it holds no {CONFIG})")
    config = Config.from_json(record["config"])
    moved = {"data_dir": data_dir, "labels": labels}
    moved = {name: place for name, place in moved.items() if place is not None}
    source = load_source(**config.source() | moved)
    _same_data(directory, record, source)
    return Run(directory, config, source)


def _resolved(config, source, architecture):
    """Returns the run of a config, filled from its data and the architecture it starts from."""
    if architecture and architecture["channels"] != source.channels:
        raise InputError(
            f"--checkpoint={config.checkpoint}: it was trained on images of "
            f"{architecture['channels']} channels, --dataset={config.dataset} has "
            f"{source.channels}"
        )
    resolved = resolve(config, len(source.class_names), architecture)
    return Run(Path(config.output_dir), resolved, source)


def _check_sizes(run):
    if run.steps_per_epoch == 0:
        raise InputError(
            f"--batch_size={run.config.batch_size}: there are only {len(run.source.train)} "
            f"training images; give at most that many"
        )
    if run.config.early_stopping and run.source.validation is None:
        raise InputError(
            f"--early_stopping={run.config.early_stopping} needs a validation split; "
            f"give --validation_fraction"
        )
    if run.config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise InputError("--tensorboard needs a package: pip install 'keras_mixer[tensorboard]'")
    if run.config.eval_split != "train":
        run.source.split(run.config.eval_split)


def _check_directory(directory, config):
    """Returns the record of the run that is there, or None; refuses what is not ours."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir={directory}: a file is in the way; give another directory")
    places = {directory.resolve(), (directory / BEST).resolve()}
    if config.checkpoint and Path(config.checkpoint).resolve() in places:
        raise InputError(
            f"--checkpoint={config.checkpoint} is --output_dir={directory} itself, where the new "
            f"run would take its place; give another --output_dir"
        )
    record = read_record(directory)
    if record is None and (there := [name for name in OURS if (directory / name).exists()]):
        raise InputError(
            f"--output_dir={directory} holds {', '.join(there)} but no {CONFIG}, so it is "
            f"not a run to continue; give another --output_dir"
        )
    return record


def _starting_point(config, record):
    """What the run starts from, as recorded if it has checkpoints of its own, else as it is now."""
    if config.checkpoint is None:
        return None
    recorded = record and not config.overwrite and record.get("start")
    if recorded and any((Path(config.output_dir) / CHECKPOINTS).glob("step-*")):
        return {**recorded, "architecture": as_architecture(recorded["architecture"])}
    checkpoint = read_checkpoint(config.checkpoint, config.image_shape)
    architecture = checkpoint.description.architecture
    start = {"architecture": architecture, "sha256": digest(checkpoint.arrays)}
    if recorded and recorded["sha256"] != start["sha256"]:
        raise InputError(
            f"--checkpoint={config.checkpoint} has changed since {config.output_dir} began; "
            f"give another --output_dir"
        )
    return start


def _same_run(run, record):
    """Refuses to continue a run under flags that would have given another result."""
    config = run.config
    before = Config.from_json(record["config"])
    differing = [
        f"--{field.name} was {shown(getattr(before, field.name))}, "
        f"now {shown(getattr(config, field.name))}"
        for field in dataclasses.fields(Config)
        if field.metadata.get("result", True)
        and getattr(before, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise InputError(
            f"--output_dir={run.directory} holds another run: {'; '.join(differing)}. "
            f"Give another --output_dir to keep it, or --overwrite to discard it"
        )


def _same_data(directory, record, source):
    if record["data"]["identity"] != source.identity:
        raise InputError(
            f"{directory} was trained on other data: their files, order, labels or classes have "
            f"changed since. Restore them, or give another --output_dir"
        )


def _note_environment(record):
    now = environment()
    changed = [
        f"{name} was {then}, is {now.get(name)}"
        for name, then in record["environment"].items()
        if now.get(name) != then
    ]
    if changed:
        console.say(
            f"continuing elsewhere than the run began ({'; '.join(changed)}): "
            f"results may differ from an uninterrupted run's in their last bits"
        )


@contextlib.contextmanager
def _claimed(directory):
    lock = filelock.FileLock(directory / LOCK, timeout=0)
    with path_errors(f"--output_dir={directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(
                f"--output_dir={directory} is in use: another process is training there"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _clear(directory, overwrite):
    """Removes what kills have left half-written; to overwrite, whatever a run leaves behind.

    Nothing else is touched. config.json, which makes the directory a run of ours, goes last.
    """
    for unfinished in [*directory.glob(".*.tmp-*"), *directory.glob(f"{BEST}/.*.tmp-*")]:
        unfinished.unlink()
    for path in [directory / name for name in OURS] if overwrite else []:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# === Records ===


def _write_flags(directory, config):
    """Writes every flag that is not at its default, as a flagfile that repeats the run."""
    lines = [f"{flag}\n" for flag in as_flags(dataclasses.replace(config, overwrite=False))]
    write_atomically(directory / FLAGS, "".join(lines).encode(errors="surrogateescape"))


def _record(run, start):
    sizes = {
        name: len(split)
        for name in ("train", "validation", "test")
        if (split := getattr(run.source, name)) is not None
    }
    return {
        "config": run.config.to_json(),
        "data": {
            "identity": run.source.identity,
            "class_names": list(run.source.class_names),
            "images": sizes,
        },
        "environment": environment(),
        "start": start,
    }


def environment():
    """Returns what a result depends on besides the config: versions and hardware, as strings."""
    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
    switches = ("TF_NUM_INTRAOP_THREADS", "TF_ENABLE_ONEDNN_OPTS", "XLA_FLAGS")
    return versions | {
        **{name: os.environ.get(name, "not set") for name in switches},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": str(_cores()),
    }


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
