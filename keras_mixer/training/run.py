"""The run directory: what is in it and what the files are called.

Nothing here imports TensorFlow.
"""

import csv
import dataclasses
import io
import json
from pathlib import Path

from keras_mixer.config import Config
from keras_mixer.data.splits import Source
from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically

FLAGS, CONFIG, HISTORY, METRICS = "flags.txt", "config.json", "history.csv", "metrics.json"
BEST, CHECKPOINTS, LOGS, LOCK = "best", "checkpoints", "logs", ".lock"
CURVES = ("train", "validation")  # folders in logs/, which may hold the logs of others, too
OURS = (
    FLAGS,
    HISTORY,
    METRICS,
    BEST,
    CHECKPOINTS,
    *(f"{LOGS}/{c}" for c in CURVES),
    CONFIG,
)  # in the order of _clear


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory and what is trained in it.

    Attributes:
        directory: `Path`.
        config: `Config` without open questions.
        source: `data.splits.Source`.
    """

    directory: Path
    config: Config
    source: Source

    def architecture(self):
        """Returns the keyword arguments for `build_mixer`."""
        return self.config.architecture() | {"channels": self.source.channels}

    @property
    def best(self):
        """Folder of the best weights, in the format of `weights.native`."""
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
        return read_metrics(self.directory)

    def write_metrics(self, metrics):
        """Replaces metrics.json."""
        write_json(self.directory / METRICS, metrics)

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
        metrics = self.metrics()
        return self.config.eval_split in metrics and (
            "saved_model" in metrics or not self.config.export
        )


def write_json(path, values):
    """Replaces a JSON file."""
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")


def read_metrics(directory):
    """Returns the contents of a run's metrics.json; {} before the run is scored.

    Raises:
        InputError: If the file is damaged.
    """
    path = Path(directory) / METRICS
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: damaged; remove it, and the run is scored again") from error


def read_record(directory):
    """Returns what config.json says of a run: `config`, `data`, `environment`.

    Returns None if there is no config.json.

    Raises:
        InputError: If somebody else wrote it.
    """
    path = Path(directory) / CONFIG
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
