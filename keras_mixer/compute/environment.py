"""The environment of a run: versions, settings and hardware, which affect a result's last bits."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from keras_mixer.log import logger


def environment():
    """Returns versions, settings and hardware as a dict of strings."""
    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
    switches = ("TF_NUM_INTRAOP_THREADS", "TF_ENABLE_ONEDNN_OPTS", "XLA_FLAGS")
    return versions | {
        **{name: os.environ.get(name, "not set") for name in switches},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": str(cores()),
    }


def software():
    """Returns versions as a dict of strings, and a sha256 of keras_mixer itself."""
    names = ("tensorflow", "keras", "numpy", "jax")
    found = {d.name: d.version for d in map(_distribution, names) if d}
    return found | {"python": platform.python_version(), "keras_mixer": _own_digest()}


def _distribution(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.distribution(name)


def _own_digest():
    package = Path(__file__).parent.parent
    sources = sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).parts)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def cores():
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def note_changes(before):
    """Prints how the environment has changed since a run began.

    Args:
        before: dict that `environment` returned then.
    """
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
