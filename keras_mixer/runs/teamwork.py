"""Compares the runs of several processes before the first step. TensorFlow is not imported."""

import dataclasses

from keras_mixer.compute.environment import software
from keras_mixer.config.options import format_value
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError


def refuse_differences(group, run, start):
    """Raises an `InputError`, in all processes, if they are not about to train the same run.

    Args:
        group: `ProcessGroup`.
        run: `Run` as this process would train it.
        start: dict, the `start` of its config.json, or None.
    """
    if group.count == 1:
        return
    own = {
        "software": software(),
        "options": {
            field.name: format_value(getattr(run.config, field.name)) for field in _OPTIONS
        },
        "data": run.dataset.identity,
        "start": start and start["sha256"],
    }
    first, *others = group.exchange(own)
    for name, other in zip(group.names[1:], others, strict=True):
        if differing := _differences(first, other):
            raise InputError(f"{name} would train another run: {'; '.join(differing)}")


_OPTIONS = [  # that all have to have in common
    field
    for field in dataclasses.fields(Config)
    if field.metadata["result"] or field.name in ("remat", "devices")
]


def _differences(first, other):
    found = [
        f"{name} is {other['software'].get(name)}, on process 0 {version}"
        for name, version in first["software"].items()
        if other["software"].get(name) != version
    ]
    found += [
        f"--{name} is {other['options'].get(name)}, on process 0 {value}"
        for name, value in first["options"].items()
        if other["options"].get(name) != value
    ]
    if other["data"] != first["data"]:
        found.append("its data have other files, sizes, labels or classes than those of process 0")
    if other["start"] != first["start"]:
        found.append("its --checkpoint holds other weights than that of process 0")
    return found
