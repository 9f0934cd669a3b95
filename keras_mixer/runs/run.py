"""The run directory: names and contents of its files. TensorFlow is not imported."""

import csv
import dataclasses
import hashlib
import io
import json
import math
from pathlib import Path

from keras_mixer.compute.process_group import SINGLE, ProcessGroup
from keras_mixer.config.training import Config
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.splits import Dataset
from keras_mixer.errors import InputError, RunError, path_errors
from keras_mixer.files import (
    read_regular,
    rows_as_csv,
    seal,
    unseal,
    write_atomically,
    write_sealed,
)
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.weights import model_folder
from keras_mixer.weights.pretrained import Pretrained

# Of config.json, whose other files and order of images are part of it; a new option with a default
# needs no new number.
FORMAT = 3
FLAGS, CONFIG, HISTORY, METRICS = "flags.txt", "config.json", "history.csv", "metrics.json"
SKIPPED = "skipped.jsonl"
BEST, CHECKPOINTS, LOGS, LOCK = "best", "checkpoints", "logs", ".lock"
FACTS, SEALS = "facts", "seals"  # beside the splits in metrics.json
CURVES = ("train", "validation")  # folders in logs/, where the user may keep other logs
# Files of a run, in the order in which --overwrite deletes them; config.json, which marks one, last
OURS = (
    *(FLAGS, SKIPPED, HISTORY, METRICS, BEST, CHECKPOINTS),
    *(f"{LOGS}/{curve}" for curve in CURVES),
    CONFIG,
)
_MOST_BYTES = 100_000_000  # of a file that is read as text
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


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
        identity: sha256 of what determines its result, see `identity_of`; "" before it is opened.
        group: `ProcessGroup` of the processes that train it.
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
        """Folder of the best weights, a model folder."""
        return self.directory / BEST

    @property
    def checkpoints(self):
        """Folder of the checkpoints."""
        return self.directory / CHECKPOINTS

    @property
    def logs(self):
        """Folder that TensorBoard reads."""
        return self.directory / LOGS

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
    def drop_steps(self):
        """Optimizer steps between drops of the learning rate; None if its schedule has none."""
        return self.config.drop_every and self.config.drop_every * self._unit

    @property
    def _unit(self):
        return self.steps_per_epoch if self.config.schedule_unit == "epoch" else 1

    @property
    def scores(self):
        """dict from the splits scored so far to their scores, from metrics.json."""
        return read_metrics(self.directory)[0]

    @property
    def facts(self):
        """dict of the other values in metrics.json: `selected_epoch`, `saved_model`."""
        return read_metrics(self.directory)[1]

    def write_metrics(self, scores=None, **facts):
        """Adds scores of splits and facts to metrics.json, and seals the files they belong to."""
        before, known = read_metrics(self.directory)
        values = before | (scores or {}) | {FACTS: known | facts, SEALS: self._seals()}
        write_sealed(self.directory / METRICS, values)

    def _seals(self):
        """Returns the sha256 of history.csv and of the weights in best/, where they are."""
        seals = {}
        if (self.directory / HISTORY).is_file():
            seals[HISTORY] = _sha256((self.directory / HISTORY).read_bytes())
        if (self.best / model_folder.WEIGHTS).exists():
            seals[BEST] = model_folder.read_metadata(self.best)["sha256"]
        return seals

    def write_history(self, rows):
        """Replaces history.csv, unless it is the same already.

        Args:
            rows: list of dicts with the same keys, one per epoch.
        """
        path, content = self.directory / HISTORY, rows_as_csv(rows).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)

    def check_there(self):
        """Raises a `RunError` if the directory is gone, or another run's by now."""
        record = read_record(self.directory)
        if record is None or record["identity"] != self.identity:
            gone = "is gone" if record is None else "holds another run"
            raise RunError(
                f"the run directory {self.directory} {gone}: it was moved, removed or replaced "
                f"during the run, which ends here and writes nothing more"
            )

    def other_best(self, epoch):
        """Returns a `RunError`: best/ holds other weights than those of the epoch."""
        return RunError(
            f"{self.best} holds other weights than those of epoch {epoch}, which {self.directory} "
            f"saved there; restore them, or train again with --overwrite"
        )

    def check_best(self):
        """Raises an `InputError` if the weights in best/ are not the ones this run saved last."""
        facts = model_folder.read_metadata(self.best)
        sealed = _read_sealed_metrics(self.directory).get(SEALS, {}).get(BEST, facts["sha256"])
        if facts.get("run") != self.identity or facts["sha256"] != sealed:
            raise InputError(
                f"{self.best} holds weights that {self.directory} did not save, or not last; "
                f"restore them, or train again with --overwrite"
            )

    def check_complete(self):
        """Raises an `InputError` if history.csv or best/ of a finished run is damaged."""
        read_history(self.directory)
        self.check_best()
        model_folder.read_weights(self.best)

    @property
    def finished(self):
        """Whether the run has been trained, scored and, if asked for, exported."""
        scores, facts = read_metrics(self.directory)
        exported = "saved_model" in facts or not self.config.export
        return self.config.eval_split in scores and exported


def read_metrics(directory):
    """Returns (scores by split, facts) from a run's metrics.json; empty before the run is scored.

    Raises:
        InputError: If the file is damaged.
    """
    scores = _read_sealed_metrics(directory)
    facts, _ = scores.pop(FACTS, {}), scores.pop(SEALS, {})
    return scores, facts


def _read_sealed_metrics(directory):
    """Returns the values of metrics.json, without its sha256; {} if it is not there."""
    path = Path(directory) / METRICS
    try:
        if not path.exists():
            return {}
        values = unseal(json.loads(read_regular(path, _MOST_BYTES)))
        others = [values.get(name, {}) for name in (FACTS, SEALS)]
        scores = [values[name] for name in values if name not in (FACTS, SEALS)]
        if not all(map(_are_scores, scores)) or not all(isinstance(o, dict) for o in others):
            raise ValueError("not scores by split")
    except (*_DAMAGE, RecursionError) as error:
        raise InputError(
            f"{path}: damaged; history.csv and best/ are files of their own. Remove it, and the "
            f"same train command scores the run again"
        ) from error
    return values


def _are_scores(values):
    """Tells whether values are those of a split: finite numbers, accuracies as fractions."""
    fractions = [values[name] for name in ("top1", "top5") if name in values]
    finite = all(map(math.isfinite, values.values()))
    return finite and all(0 <= fraction <= 1 for fraction in fractions)


def describe_scores(scores):
    """Returns scores by split as text: `validation: 98.61% of 144 images, test: …`."""
    return ", ".join(
        f"{split}: {scores[split]['top1']:.2%} of {scores[split]['n']:,} images"
        for split in SPLITS
        if split in scores
    )


def read_history(directory):
    """Returns the rows of a run's history.csv as dicts of strings, one per epoch.

    Raises:
        InputError: If there is no such file, or it is not the one that metrics.json was written
            with.
    """
    path = Path(directory) / HISTORY
    sealed = _read_sealed_metrics(directory).get(SEALS, {}).get(HISTORY)
    try:
        with path_errors(directory):
            content = read_regular(path, _MOST_BYTES)
        if sealed not in (None, _sha256(content)):
            raise ValueError("not that of the run")
        return list(csv.DictReader(io.StringIO(content.decode())))
    except InputError:
        raise
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: damaged; metrics.json and best/ are files of their own. Remove metrics.json, "
            f"and the same train command writes both again from checkpoints/"
        ) from error


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def identity_of(record):
    """Returns the sha256 of what determines a run's result: its options, data and first weights.

    Args:
        record: dict of config.json.
    """
    options = [field.name for field in dataclasses.fields(Config) if field.metadata["result"]]
    parts = [
        {name: record["config"][name] for name in options},
        record["data"],
        (record["start"] or {}).get("sha256"),
    ]
    return seal(parts)


def read_record(directory):
    """Returns config.json as a dict; None without it.

    It has `config`, `data`, `environment`, `start` and `identity`.

    Raises:
        InputError: If it has another format, is damaged, or was not written by keras_mixer.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        return None
    try:
        record = json.loads(read_regular(path, _MOST_BYTES))
        record["config"], record["data"]["identity"], record["environment"].items()
        current = record.get("format") == FORMAT
        record = unseal(record) if current else record
    except (*_DAMAGE, RecursionError) as error:
        raise InputError(
            f"{path} is damaged, or was not written by keras_mixer; restore it, or give another "
            f"--output_dir"
        ) from error
    if not current:
        raise InputError(
            f"{path}: expected format {FORMAT}, received {record.get('format', 1)}; the run was "
            f"made by another version of keras_mixer: give another --output_dir"
        )
    return record
