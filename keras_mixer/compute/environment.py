"""Versions, settings and hardware, which affect the last bits of a result."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path


def module_command(module, *arguments):
    """Returns the command that runs a module of this package as `python -m` does.

    The working folder is not searched, whose random.py would be taken for Python's (`-P`).
    """
    root = str(Path(__file__).parents[2])
    code = (
        f"import runpy, sys; {root!r} in sys.path or sys.path.insert(0, {root!r}); "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-P", "-c", code, *arguments]


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
    found = {"python": platform.python_version(), "keras_mixer": _digest_of_package()}
    for name in ("tensorflow", "keras", "numpy", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _digest_of_package():
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
