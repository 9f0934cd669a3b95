"""Tests `keras_mixer/compute/rank.py`: the rank that environment variables describe."""

import pytest

from keras_mixer.compute.rank import Rank, find_rank
from keras_mixer.errors import InputError

KERAS = {
    "KERAS_DISTRIBUTION_JOB_ADDRESSES": "10.0.0.1:9000",
    "KERAS_DISTRIBUTION_NUM_PROCESSES": "4",
    "KERAS_DISTRIBUTION_PROCESS_ID": "3",
}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "mixer-0.mixer:9000",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
SLURM = {
    "KERAS_BACKEND": "jax",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "2",
}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NODELIST": "gpu1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, None),
        (KERAS, Rank("10.0.0.1", 9000, 4, 3)),
        (JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (
            without(KERAS, "KERAS_DISTRIBUTION_NUM_PROCESSES")
            | {"KERAS_DISTRIBUTION_JOB_ADDRESSES": "a:1,b:2,c:3,d:4"},
            Rank("a", 1, 4, 3),
        ),
        (JAX, Rank("mixer-0.mixer", 9000, 2, 1)),
        (
            without(JAX, "JAX_PROCESS_ID") | {"JOB_COMPLETION_INDEX": "0"},
            Rank("mixer-0.mixer", 9000, 2, 0),
        ),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "[::1]:9000"}, Rank("::1", 9000, 2, 1)),
        (JAX | KERAS, Rank("10.0.0.1", 9000, 4, 3)),
        (SLURM, Rank("gpu07", 20_000 + 2 * 1234567 % 12_000, 5, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "node7"}, Rank("node7", 29_134, 5, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "a,b"}, Rank("a", 29_134, 5, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "r[1,3]-gpu"}, Rank("r1-gpu", 29_134, 5, 2)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)  # fmt: skip
def test_ranks(variables, expected):
    assert find_rank(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            KERAS | {"KERAS_DISTRIBUTION_PROCESS_ID": "4"},
            "KERAS_DISTRIBUTION_PROCESS_ID: expected the number of this process, from 0 to 3; "
            "received 4",
        ),
        (
            without(KERAS, "KERAS_DISTRIBUTION_PROCESS_ID"),
            "KERAS_DISTRIBUTION_PROCESS_ID: .*; it is not set",
        ),
        (
            without(KERAS, "KERAS_DISTRIBUTION_NUM_PROCESSES"),
            "KERAS_DISTRIBUTION_NUM_PROCESSES: .*; it is not set",
        ),
        (
            without(JAX, "JAX_COORDINATOR_ADDRESS"),
            "JAX_COORDINATOR_ADDRESS: expected HOST:PORT of process 0; it is not set, but one of",
        ),
        (JAX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: .*; received two"),
        (JAX | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: .* from 1 .*; received 0"),
        (
            JAX | {"JAX_COORDINATOR_ADDRESS": "host"},
            "JAX_COORDINATOR_ADDRESS=host: expected HOST:PORT of process 0, such as 10.0.0.1:9000",
        ),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host:65535"}, "expected HOST:PORT"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": ":80"}, "expected HOST:PORT"),
        (SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID: .*; received"),
    ],
)
def test_wrong_variables_are_named(variables, message):
    with pytest.raises(InputError, match=message):
        find_rank(variables)
