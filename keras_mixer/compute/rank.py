"""Rank of a process among those that train one run, from Keras's, JAX's or SLURM's variables."""

import os
import re
import socket
from typing import NamedTuple

from keras_mixer.errors import InputError

_LOWEST_PORT, _PORTS = (
    20_000,
    12_000,
)  # of SLURM jobs, by their number; below Linux's ephemeral ones


class Rank(NamedTuple):
    """The rank of a process among those that train one run.

    Attributes:
        host: Name or address of the host of process 0.
        port: Port on which JAX's coordinator listens there; process 0 of ours uses the next one.
        count: Number of processes.
        index: Number of this one, from 0.
    """

    host: str
    port: int
    count: int
    index: int


def find_rank(variables=None):
    """Returns the `Rank` that environment variables describe; None for a single process.

    The variables of keras.distribution.initialize come first, then those of
    jax.distributed.initialize (where Kubernetes's JOB_COMPLETION_INDEX can be the number of the
    process), then, with KERAS_BACKEND=jax, SLURM's.

    Args:
        variables: dict like os.environ, the default.

    Raises:
        InputError: If a variable is missing or wrong; the message names it.
    """
    variables = os.environ if variables is None else variables
    for names in _VARIABLES:
        if any(name in variables for name in names):
            return _checked(*_values_of(names, variables), names)
    if variables.get("KERAS_BACKEND") == "jax" and "SLURM_STEP_NODELIST" in variables:
        return _slurm_rank(variables)
    return None


_ADDRESS, _COUNT, _INDEX = range(3)
_VARIABLES = (
    tuple(f"KERAS_DISTRIBUTION_{n}" for n in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")),
    ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
)


def _values_of(names, variables):
    """Returns the address, the number of processes and the index, as strings or None."""
    address, count, index = map(variables.get, names)
    if address is None:
        raise InputError(
            f"{names[_ADDRESS]}: expected HOST:PORT of process 0; it is not set, but one of "
            f"{', '.join(names[1:])} is"
        )
    if count is None and "," in address:
        count = str(len(address.split(",")))
    if index is None:
        index = variables.get("JOB_COMPLETION_INDEX")
    return address.split(",")[0], count, index


def _checked(address, count, index, names):
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65_535):
        raise InputError(
            f"{names[_ADDRESS]}={address}: expected HOST:PORT of process 0, such as 10.0.0.1:9000"
        )
    count = _number(names[_COUNT], count, "the number of processes", 1, 100_000)
    index = _number(names[_INDEX], index, "the number of this process", 0, count - 1)
    return Rank(host.strip("[]"), int(port), count, index) if count > 1 else None


def _number(name, value, what, low, high):
    if value is None or not value.isdecimal() or not low <= int(value) <= high:
        received = "it is not set" if value is None else f"received {value}"
        raise InputError(f"{name}: expected {what}, from {low} to {high}; {received}")
    return int(value)


def _slurm_rank(variables):
    """Returns the `Rank` of a task of `srun`; the first node listed has task 0."""
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    nodes, count, index = map(variables.get, names)
    job = variables.get("SLURM_JOB_ID", "")
    port = _LOWEST_PORT + 2 * int(job if job.isdecimal() else 0) % _PORTS
    return _checked(f"{_first_node(nodes)}:{port}", count, index, names)


def _first_node(nodes):
    """Returns the first of SLURM's nodes: `node7` of `node[7-9,12],other`."""
    name, numbers, suffix = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodes).groups()
    return f"{name}{numbers or ''}{suffix}"


# === Processes on this computer ===


def variables_of(port, count, index):
    """Returns environment variables for process `index` of `count` on this computer."""
    if count == 1:
        return dict(os.environ)
    return os.environ | {
        "KERAS_BACKEND": "jax",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
        "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    }


def free_port():
    """Returns a free port that is followed by another one."""
    while True:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except (OSError, OverflowError):
                continue
        return port
