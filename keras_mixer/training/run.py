"""The run directory: names and contents of its files. TensorFlow is not imported."""

import csv
import dataclasses
import json
import math
from pathlib import Path

from keras_mixer.config.training import Config
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.splits import Dataset
from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import rows_as_csv, write_atomically
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.weights.pretrained import Pretrained

FORMAT = 2  # of config.json; a new field with a default needs no new number
SHUFFLE = 2  # version of the order of training images, in config.json; 1 if it is not there
FLAGS, CONFIG, HISTORY, METRICS = "flags.txt", "config.json", "history.csv", "metrics.json"
BEST, CHECKPOINTS, LOGS, LOCK = "best", "checkpoints", "logs", ".lock"
FACTS = "facts"  # beside the splits in metrics.json
CURVES = ("train", "validation")  # folders in logs/, where the user may keep other logs
# Files of a run, in the order in which --overwrite deletes them; config.json, which marks one, last
OURS = (FLAGS, HISTORY, METRICS, BEST, CHECKPOINTS, *(f"{LOGS}/{c}" for c in CURVES), CONFIG)


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
    """

    directory: Path
    config: Config
    spec: ModelSpec
    dataset: Dataset
    pretrained: Pretrained | None = None

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
        """Adds scores of splits and facts to metrics.json."""
        before, known = read_metrics(self.directory)
        write_json(self.directory / METRICS, before | (scores or {}) | {FACTS: known | facts})

    def write_history(self, rows):
        """Replaces history.csv; `rows` is a list of dicts with the same keys, one per epoch."""
        write_atomically(self.directory / HISTORY, rows_as_csv(rows).encode())

    @property
    def finished(self):
        """Whether the run has been trained, scored and, if asked for, exported."""
        scores, facts = read_metrics(self.directory)
        exported = "saved_model" in facts or not self.config.export
        return self.config.eval_split in scores and exported


def write_json(path, values):
    """Replaces a JSON file."""
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")


def read_metrics(directory):
    """Returns (scores by split, facts) from a run's metrics.json; empty before the run is scored.

    Raises:
        InputError: If the file is damaged.
    """
    path = Path(directory) / METRICS
    try:
        scores = json.loads(path.read_text()) if path.exists() else {}
        facts = scores.pop(FACTS, {})
        if not all(map(_are_scores, scores.values())) or not isinstance(facts, dict):
            raise ValueError("not scores by split")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: damaged; remove it, and the run is scored again") from error
    return scores, facts


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
        InputError: If there is no such file.
    """
    with path_errors(directory), open(Path(directory) / HISTORY, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_record(directory):
    """Returns config.json as a dict of `config`, `data`, `environment`, `start`; None without it.

    Raises:
        InputError: If it has another format, or was not written by keras_mixer.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        record["config"], record["data"]["identity"], record["environment"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} was not written by keras_mixer; give another --output_dir"
        ) from error
    if record.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected format {FORMAT}, received {record.get('format', 1)}; the run was "
            f"made by another version of keras_mixer: give another --output_dir"
        )
    return record
