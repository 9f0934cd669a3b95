"""The run directory: what is in it, who may write to it, and whether a command may continue it.

Nothing here imports TensorFlow, so that every refusal comes within a second or two.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
from pathlib import Path

import filelock

from keras_mixer import console
from keras_mixer.commandline import shown
from keras_mixer.config import Config
from keras_mixer.data.sources import Source, load_source
from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically
from keras_mixer.resolve import resolve
from keras_mixer.weights.load import read_checkpoint

FLAGS, CONFIG, HISTORY, METRICS = "flags.txt", "config.json", "history.csv", "metrics.json"
BEST, CHECKPOINTS, LOGS, LOCK = "best", "checkpoints", "logs", ".lock"
OURS = (FLAGS, CONFIG, HISTORY, METRICS, BEST, CHECKPOINTS, LOGS)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory and what is trained in it.

    Attributes:
        directory: `Path`.
        config: `Config` without open questions.
        source: `data.sources.Source`.
    """

    directory: Path
    config: Config
    source: Source

    @property
    def best(self):
        """Folder of the best weights, in the format of `weights.native`."""
        return self.directory / BEST

    @property
    def checkpoints(self):
        """Folder of the checkpoints."""
        return self.directory / CHECKPOINTS

    @property
    def steps_per_epoch(self):
        """Optimizer steps in an epoch; the remainder of the images is dropped."""
        return len(self.source.train) // self.config.batch_size

    @property
    def total_steps(self):
        """Optimizer steps in the whole run."""
        return self.config.num_steps * self._unit

    @property
    def warmup_steps(self):
        """Optimizer steps of warm-up."""
        return self.config.warmup_step * self._unit

    @property
    def _unit(self):
        return self.steps_per_epoch if self.config.schedule_unit == "epoch" else 1

    def metrics(self):
        """Returns the contents of metrics.json; {} before the run is scored."""
        path = self.directory / METRICS
        return json.loads(path.read_text()) if path.exists() else {}

    def write_metrics(self, metrics):
        """Replaces metrics.json."""
        _write_json(self.directory / METRICS, metrics)

    def write_history(self, rows):
        """Replaces history.csv.

        Args:
            rows: list of dicts with the same keys, one per epoch.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.directory / HISTORY, text.getvalue().encode())

    @property
    def finished(self):
        """Whether the run has been trained, scored and, if asked for, exported."""
        return "test" in (metrics := self.metrics()) and (
            "saved_model" in metrics or not self.config.export
        )


def _write_json(path, values):
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")


# === Opening ===


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
    source = load_source(config.dataset, config.data_dir, config.validation_fraction)
    start = config.checkpoint and read_checkpoint(config.checkpoint, config.image_shape)
    resolved = resolve(config, len(source.class_names), start and start.architecture)
    run = Run(Path(config.output_dir), resolved, source)
    _check_sizes(run)
    _check_directory(run)
    with _claimed(run.directory):
        if config.overwrite:
            _discard(run.directory)
        if not (run.directory / CONFIG).exists():
            _write_flags(run.directory, config)
            _write_json(run.directory / CONFIG, _record(run))
        yield run


def read_run(directory, data_dir=None):
    """Opens a run to look at it: its config and its data, without a claim to the directory.

    Args:
        directory: Path of a run directory.
        data_dir: Where the data are now, if they moved.

    Returns:
        A `Run`.

    Raises:
        InputError: If there is no run, or its data are gone or have changed.
    """
    directory = Path(directory)
    record = read_record(directory)
    if record is None:
        raise InputError(f"{directory}: not a run directory (it holds no {CONFIG})")
    config = Config.from_json(record["config"])
    source = load_source(config.dataset, data_dir or config.data_dir, config.validation_fraction)
    _same_data(directory, record, source)
    return Run(directory, config, source)


def _check_sizes(run):
    if run.steps_per_epoch == 0:
        raise InputError(
            f"--batch_size={run.config.batch_size}: there are only {len(run.source.train)} "
            f"training images; give at most that many"
        )
    if run.config.eval_split != "train":
        run.source.split(run.config.eval_split)


def _check_directory(run):
    directory = run.directory
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir={directory}: a file is in the way; give another directory")
    record = read_record(directory)
    if record is None:
        if in_the_way := [name for name in OURS if (directory / name).exists()]:
            raise InputError(
                f"--output_dir={directory} holds {', '.join(in_the_way)} but no {CONFIG}, so it is "
                f"not a run to continue; give another --output_dir"
            )
    elif not run.config.overwrite:
        _same_run(directory, record, run.config)
        _same_data(directory, record, run.source)
        _note_environment(record)


def _same_run(directory, record, config):
    """Refuses to continue a run under flags that would have given another result."""
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
            f"--output_dir={directory} holds another run: {'; '.join(differing)}. "
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


def read_record(directory):
    """Returns what config.json says of a run: `config`, `data`, `environment`.

    Returns None if there is no config.json.

    Raises:
        InputError: If somebody else wrote it.
    """
    path = directory / CONFIG
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        record["config"], record["data"]["identity"], record["environment"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} was not written by keras_mixer; give another --output_dir"
        ) from error
    return record


@contextlib.contextmanager
def _claimed(directory):
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / LOCK, timeout=0):
            yield
    except filelock.Timeout as error:
        raise InputError(
            f"--output_dir={directory} is in use: another process is training there"
        ) from error
    except PermissionError as error:
        raise InputError(f"--output_dir={directory}: no permission to write there") from error


def _discard(directory):
    """Removes what a run leaves behind, and nothing else."""
    for name in OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# === Records ===


def _write_flags(directory, config):
    """Writes every flag that is not at its default, as a flagfile that repeats the run."""
    lines = [
        f"--{field.name}={shown(getattr(config, field.name))}\n"
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != field.default and field.name != "overwrite"
    ]
    write_atomically(directory / FLAGS, "".join(lines).encode())


def _record(run):
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
    }


def environment():
    """Returns what a result depends on besides the config: versions and hardware, as strings."""
    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
    return versions | {
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
