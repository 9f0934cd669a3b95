"""Writes the records of a run directory: config.json, flags.txt, skipped.jsonl."""

import dataclasses
import json
import os

from keras_mixer.compute.environment import environment
from keras_mixer.config.options import as_flags
from keras_mixer.data.datasets import SPLITS
from keras_mixer.files import remove, write_atomically, write_sealed
from keras_mixer.runs.run import (
    BEST,
    CONFIG,
    FLAGS,
    FORMAT,
    HISTORY,
    METRICS,
    OURS,
    SKIPPED,
    identity_of,
)
from keras_mixer.weights.model_folder import SPEC, WEIGHTS


def clear(directory, overwrite):
    """Removes unfinished files of killed processes, and with `overwrite` all files of the run."""
    ours = [directory / name for name in (FLAGS, SKIPPED, CONFIG, HISTORY, METRICS)]
    for path in [*ours, directory / BEST / SPEC, directory / BEST / WEIGHTS]:
        for unfinished in path.parent.glob(f".{path.name}.tmp-*"):
            unfinished.unlink()
    for path in [directory / name for name in OURS] if overwrite else []:
        remove(path)


def write_records(run, config, start):
    """Writes config.json and flags.txt, unless they exist, and which images are left out."""
    if not (run.directory / CONFIG).exists():
        record = _record(run, start)
        write_sealed(run.directory / CONFIG, record | {"identity": identity_of(record)})
    if not (run.directory / FLAGS).exists():
        _write_flags(run.directory, config)
    if run.dataset.skipped:  # what is skipped may differ, as long as what is left does not
        _write_skipped(run.directory, run.dataset.skipped)


def _write_skipped(directory, skipped):
    """Writes a line of JSON for every image that is left out."""
    lines = [json.dumps({"image": place, "reason": reason}) + "\n" for place, reason in skipped]
    write_atomically(directory / SKIPPED, "".join(lines).encode())


def _write_flags(directory, config):
    """Writes a flagfile that repeats the run: every flag that is not at its default."""
    lines = [f"{flag}\n" for flag in as_flags(_with_absolute_paths(config, overwrite=False))]
    write_atomically(directory / FLAGS, "".join(lines).encode(errors="surrogateescape"))


def _with_absolute_paths(config, **changes):
    """Returns the config with paths of the data that are right in any working directory."""
    paths = {"data_dir": config.data_dir, "labels": config.labels}
    absolute = {name: os.path.abspath(path) for name, path in paths.items() if path}
    return dataclasses.replace(config, **absolute, **changes)


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
