"""The run directory: the names of its files, what they hold, reading and writing them.

TensorFlow is not imported.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path

from keras_mixer.compute.environment import environment
from keras_mixer.compute.process_group import SINGLE, ProcessGroup
from keras_mixer.config.options import as_flags
from keras_mixer.config.training import Config
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.splits import Dataset
from keras_mixer.errors import InputError, RunError
from keras_mixer.files import (
    listed,
    read_regular,
    remove,
    rows_as_csv,
    seal,
    unseal,
    write_atomically,
    write_sealed,
)
from keras_mixer.log import logger
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.weights import model_folder
from keras_mixer.weights.pretrained import Pretrained

# Of config.json, which counts for the other files and the order of images, too. An option that is
# added with a default needs no new number.
FORMAT = 3
FLAGS, CONFIG, HISTORY, METRICS = "flags.txt", "config.json", "history.csv", "metrics.json"
SKIPPED = "skipped.jsonl"
BEST, CHECKPOINTS, LOGS, LOCK = "best", "checkpoints", "logs", ".lock"
CURVES = ("train", "validation")  # folders in logs/, where users may keep other logs
# Files of a run, in the order in which --overwrite deletes them; config.json, which marks it, last.
RUN_FILES = (
    *(FLAGS, SKIPPED, HISTORY, METRICS, BEST, CHECKPOINTS),
    *(f"{LOGS}/{curve}" for curve in CURVES),
    CONFIG,
)
# Keys of metrics.json beside the splits: other results, and sha256 of the files they belong to.
_RESULTS, _SEALS = "facts", "seals"
_MAX_BYTES = 100_000_000  # of a file that is read as text
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A training run: its directory, config, model and data.

    Attributes:
        directory: `Path`.
        config: `Config` with every value filled.
        spec: `ModelSpec` of the model.
        dataset: `Dataset`.
        pretrained: `Pretrained` weights to start from; None for a new model, and for a run that
            continues from its checkpoints.
        identity: sha256 of what determines its result; "" before it is opened.
        group: `ProcessGroup` that trains it.
    """

    directory: Path
    config: Config
    spec: ModelSpec
    dataset: Dataset
    pretrained: Pretrained | None = None
    identity: str = ""
    group: ProcessGroup = SINGLE

    def __repr__(self):
        classes, epochs = len(self.dataset.class_names), self.total_steps / self.steps_per_epoch
        scores = describe_scores(self.scores) or "not scored yet"
        length = f"{epochs:g} epoch{'s' * (epochs != 1)}"
        return f"Run({str(self.directory)!r}: {classes} classes, {length}, {scores})"

    @property
    def best(self):
        """Path of the best weights, a model folder."""
        return self.directory / BEST

    @property
    def checkpoints(self):
        """Path of the checkpoints."""
        return self.directory / CHECKPOINTS

    @property
    def logs(self):
        """Path of the logs for TensorBoard."""
        return self.directory / LOGS

    @property
    def history(self):
        """list of dicts of numbers, one per epoch, from history.csv; None for an empty value."""
        if not (self.directory / HISTORY).exists():
            return []
        return [
            {name: _number(value) for name, value in row.items()}
            for row in read_history(self.directory)
        ]

    @property
    def scores(self):
        """dict from the splits that are scored to their scores, from metrics.json."""
        return read_metrics(self.directory)[0]

    @property
    def selected_epoch(self):
        """Epoch of the best weights, which were scored; None before."""
        return read_metrics(self.directory)[1].get("selected_epoch")

    @property
    def saved_model(self):
        """Path of the exported SavedModel, a string; None without one."""
        return read_metrics(self.directory)[1].get("saved_model")

    @property
    def finished(self):
        """Whether the run has been trained, scored and, if asked for, exported."""
        exported = self.saved_model is not None or not self.config.export
        return self.config.eval_split in self.scores and exported

    @property
    def steps_per_epoch(self):
        """Optimizer steps in an epoch; the remainder of the images is dropped."""
        return len(self.dataset.train) // self.config.batch_size

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


def _number(text):
    if not text:
        return None
    return int(text) if text.isdecimal() else float(text)


@contextlib.contextmanager
def _reading(path, damaged):
    """Turns errors of reading a file into an `InputError`: it is damaged, or unreadable now."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be read now, nothing was changed: {error.strerror or error}"
        ) from error
    except _DAMAGE as error:
        raise InputError(f"{path}: {damaged}") from error


# === metrics.json and history.csv ===


def write_metrics(run, scores=None, **results):
    """Adds scores by split and other results to metrics.json, with the sha256 of other files."""
    before, known = read_metrics(run.directory)
    values = before | (scores or {}) | {_RESULTS: known | results, _SEALS: _seals(run)}
    write_sealed(run.directory / METRICS, values)


def _seals(run):
    """Returns the sha256 of history.csv and of the weights in best/, if they exist."""
    seals = {}
    if (run.directory / HISTORY).is_file():
        seals[HISTORY] = _sha256((run.directory / HISTORY).read_bytes())
    if (run.best / model_folder.WEIGHTS).exists():
        seals[BEST] = model_folder.read_metadata(run.best)["sha256"]
    return seals


def read_metrics(directory):
    """Returns (scores by split, other results) from a run's metrics.json; empty before scoring.

    Raises:
        InputError: If the file is damaged.
    """
    scores = _read_metrics_file(directory)
    results, _ = scores.pop(_RESULTS, {}), scores.pop(_SEALS, {})
    return scores, results


def _read_metrics_file(directory):
    """Returns the values of metrics.json; {} if it does not exist."""
    path = Path(directory) / METRICS
    mend = (
        "damaged; remove it, and the same train command scores the run again; history.csv and "
        "best/ do not need it"
    )
    with _reading(path, mend):
        values = unseal(json.loads(read_regular(path, _MAX_BYTES))) if path.exists() else {}
        if other := [name for name, value in values.items() if not isinstance(value, dict)]:
            raise TypeError(f"{other[0]} is {values[other[0]]!r}")
        return values


def describe_scores(scores):
    """Returns scores by split as text: `validation: 98.61% of 144 images, test: …`."""
    return ", ".join(
        f"{split}: {scores[split]['top1']:.2%} of {scores[split]['n']:,} images"
        for split in SPLITS
        if split in scores
    )


def write_history(directory, rows):
    """Replaces history.csv by dicts with the same keys, one per epoch, unless it is the same."""
    path, content = directory / HISTORY, rows_as_csv(rows).encode()
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def read_history(directory):
    """Returns the rows of a run's history.csv as dicts of strings, one per epoch.

    Raises:
        InputError: If it does not exist, or is not the one that metrics.json was written with.
    """
    path = Path(directory) / HISTORY
    sealed = _read_metrics_file(directory).get(_SEALS, {}).get(HISTORY)
    mend = (
        "damaged; remove metrics.json, and the same train command writes both again from "
        "checkpoints/"
    )
    with _reading(path, mend):
        content = read_regular(path, _MAX_BYTES)
        if sealed not in (None, _sha256(content)):
            raise ValueError("not that of the run")
        return list(csv.DictReader(io.StringIO(content.decode())))


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


# === best/ ===


def check_best(run):
    """Raises an `InputError` if best/ holds other weights than those the run saved last."""
    metadata = model_folder.read_metadata(run.best)
    sealed = _read_metrics_file(run.directory).get(_SEALS, {}).get(BEST, metadata["sha256"])
    if metadata.get("run") != run.identity or metadata["sha256"] != sealed:
        raise InputError(
            f"{run.best} holds weights that {run.directory} did not save, or not last; "
            f"restore them, or train again with --overwrite"
        )


# === config.json, flags.txt, skipped.jsonl ===


def write_records(run, config, start):
    """Writes config.json and flags.txt, unless they exist, and which images are skipped.

    The config is as given; `start` is a dict of the `architecture` and `sha256` of the weights that
    the run starts from, or None.
    """
    if not (run.directory / CONFIG).exists():
        record = _record(run, start)
        write_sealed(run.directory / CONFIG, record | {"identity": _identity_of(record)})
    if not (run.directory / FLAGS).exists():
        flags = as_flags(_with_absolute_paths(config, overwrite=False))
        lines = "".join(f"{flag}\n" for flag in flags)
        write_atomically(run.directory / FLAGS, lines.encode(errors="surrogateescape"))
    if run.dataset.skipped:  # other images may be skipped later, as long as the others are the same
        skipped = [{"image": name, "reason": reason} for name, reason in run.dataset.skipped]
        lines = "".join(json.dumps(image) + "\n" for image in skipped)
        write_atomically(run.directory / SKIPPED, lines.encode())


def _record(run, start):
    splits = {name: getattr(run.dataset, name) for name in SPLITS}
    return {
        "format": FORMAT,
        "preset": run.config.preset_name,
        "config": _with_absolute_paths(run.config).to_json(),
        "data": {
            "identity": run.dataset.identity,
            "class_names": list(run.dataset.class_names),
            "images": {name: len(s) for name, s in splits.items() if s is not None},
        },
        "environment": environment(),
        "start": start and {**start, "architecture": start["architecture"].to_json()},
    }


def _with_absolute_paths(config, **changes):
    """Returns the config with paths of the data that are valid in any working directory."""
    paths = {"data_dir": config.data_dir, "labels": config.labels}
    absolute = {name: os.path.abspath(path) for name, path in paths.items() if path}
    return dataclasses.replace(config, **absolute, **changes)


def _identity_of(record):
    """Returns the sha256 of what determines a run's result: its options, data and first weights."""
    options = [field.name for field in dataclasses.fields(Config) if field.metadata["result"]]
    return seal(
        [
            {name: record["config"][name] for name in options},
            record["data"],
            (record["start"] or {}).get("sha256"),
        ]
    )


def read_record(directory):
    """Returns config.json as a dict; None if it does not exist.

    Its keys are `config`, `data`, `environment`, `start` and `identity`.

    Raises:
        InputError: If it has another format, is damaged, or was not written by keras_mixer.
    """
    path = Path(directory) / CONFIG
    mend = "damaged, or was not written by keras_mixer; restore it, or give another --output_dir"
    with _reading(path, mend):
        if not path.exists():
            return None
        record = json.loads(read_regular(path, _MAX_BYTES))
        if (version := record["format"]) == FORMAT:
            return unseal(record)
    raise InputError(
        f"{path}: expected format {FORMAT}, received {version}; another version of keras_mixer "
        f"made the run: give another --output_dir"
    )


# === The directory ===


def note_unfinished(directory):
    """Warns if the run in a directory has not been scored and has epochs left; other paths pass."""
    with contextlib.suppress(*_DAMAGE):  # what is wrong with it is said where it is read
        record = read_record(directory)
        if record is None or read_metrics(directory)[0]:
            return
        config, images = Config.from_json(record["config"]), record["data"]["images"]["train"]
        if config.early_stopping:  # which may have ended it
            return
        unit = images // config.batch_size if config.schedule_unit == "step" else 1
        done, total = len(read_history(directory)), -(-config.num_steps // unit)
        if done < total:
            logger.warning(
                f"{directory} is not finished: {done} of {total} epochs are done, and these are "
                f"its best weights so far; the same train command continues it"
            )


def check_finished(run):
    """Raises an `InputError` if history.csv or best/ of a finished run is damaged or replaced."""
    read_history(run.directory)
    check_best(run)
    model_folder.read_weights(run.best)


def check_directory(run):
    """Raises a `RunError` if the directory of an open run is gone, or holds another run by now."""
    record = read_record(run.directory)
    if record is None or record["identity"] != run.identity:
        gone = "is gone" if record is None else "holds another run"
        raise RunError(
            f"the run directory {run.directory} {gone}: it was moved, removed or replaced "
            f"during the run, which ends here and writes nothing more"
        )


def clear(directory, overwrite):
    """Removes unfinished files of killed processes, and with `overwrite` all files of the run.

    Raises:
        InputError: If a folder of the run cannot be listed, before anything is removed.
    """
    listed(directory / CHECKPOINTS)
    files = [directory / name for name in (FLAGS, SKIPPED, CONFIG, HISTORY, METRICS)]
    files += [directory / BEST / name for name in (model_folder.SPEC, model_folder.WEIGHTS)]
    for unfinished in [u for path in files for u in listed(path.parent, f".{path.name}.tmp-*")]:
        unfinished.unlink()
    for name in RUN_FILES if overwrite else ():
        remove(directory / name)
