"""Tests `keras_mixer/compute/process_group.py`, `connections.py`, and runs of several processes.

Process groups of threads within one process; then real runs on Keras's JAX backend.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT

from keras_mixer.compute import connections
from keras_mixer.compute import process_group as group_module
from keras_mixer.compute.environment import module_command
from keras_mixer.compute.process_group import (
    ProcessGroup,
    join_processes,
    refuse_several_processes,
)
from keras_mixer.compute.rank import Rank, free_port
from keras_mixer.errors import InputError, RunError
from keras_mixer.files import unseal
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.run import read_history

pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[test]'")


# === Groups of threads ===


def in_group(works, counts=None, indices=None):
    """Runs each function of a `ProcessGroup` in a thread of its own; returns results or errors."""
    port = free_port()
    ranks = [
        Rank("127.0.0.1", port, (counts or {}).get(index, len(works)), index)
        for index in indices or range(len(works))
    ]

    def run(rank, work):
        try:
            with ProcessGroup(rank) as group:
                return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, ranks, works))


def test_exchange_returns_the_values_of_all_in_the_order_of_their_numbers():
    values = [{"a": 0.1 + 0.2}, [1, None], "ü\n"]

    def work(group):
        return [group.exchange(values[group.index]), group.exchange(group.index), group.is_main]

    expected = [values, [0, 1, 2]]
    assert in_group([work] * 3) == [[*expected, True], [*expected, False], [*expected, False]]


def test_a_single_process_is_a_group():
    with join_processes() as group:
        assert (group.is_main, group.count, group.exchange(3)) == (True, 1, [3])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_process_ends_the_others_and_is_reported(failing):
    def work(group):
        if group.index == failing:
            raise InputError("--lr: no such number")
        return group.exchange()

    results = in_group([work] * 3)
    assert isinstance(results.pop(failing), InputError)
    for error in results:
        assert isinstance(error, RunError)
        assert str(error).startswith(f"process {failing} (")
        assert str(error).endswith(") has ended: --lr: no such number")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("a\nb"), 2, "a b"),
        (RunError("c"), 1, "c"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "interrupted"),
        (ZeroDivisionError(), 1, "ZeroDivisionError"),
    ],
)
def test_how_a_process_ended_is_reported_and_is_its_status(error, status, said):
    assert group_module._status_of(error) == status
    assert ProcessGroup()._describe(error) == f"process 0 has ended: {said}"


def test_other_numbers_of_processes_are_refused():
    first, second = in_group([lambda group: group.exchange()] * 2, counts={1: 3})
    assert str(first) == str(second) == "process 1 expects 3 processes, process 0 2"


def test_two_processes_of_one_number_are_refused(monkeypatch):
    monkeypatch.setattr(connections, "JOINING", 5.0)
    errors = in_group([lambda group: group.exchange()] * 3, indices=[0, 1, 1])
    assert {str(error) for error in errors} == {"two processes have the number 1"}


def test_missing_processes_are_named(monkeypatch):
    monkeypatch.setattr(connections, "JOINING", 1.0)
    first, second = in_group([lambda group: group.exchange()] * 2, counts={0: 4, 1: 4})
    assert str(first) == str(second) == "expected 4 processes; missing after 1 s: 2, 3"


def test_without_process_0_the_others_report_it(monkeypatch):
    monkeypatch.setattr(connections, "JOINING", 0.5)
    with pytest.raises(RunError, match=r"process 0 was not found at 127.0.0.1:\d+ in 0 s"):
        ProcessGroup(Rank("127.0.0.1", free_port(), 2, 1)).__enter__()


GARBAGE = (
    b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"", b'{"index": "1"}\n', b"[" * 100_000 + b"\n",
    b'{"index": true, "count": 2}\n', b'{"index": -1, "count": 2}\n', b'{"index": 2, "count": 2}\n',
    b'{"index": ' + b"9" * 900 + b', "count": 2}\n',
)  # fmt: skip


def test_a_process_that_disconnects_while_waiting_may_rejoin(capsys):
    port = free_port()
    rank = Rank("127.0.0.1", port, 3, 1)

    def work(index):
        with ProcessGroup(rank._replace(index=index)) as group:
            return group.exchange(index)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(work, 0)
        connection = connections.Connection(connections._connection(rank))
        connection.send({"index": 1, "count": 3, "host": "gone"})
        time.sleep(0.2)
        connection.close()
        others = [pool.submit(work, index) for index in (1, 2)]
        assert [done.result(20) for done in (first, *others)] == [[0, 1, 2]] * 3
    assert "process 1 (gone) disconnected while waiting; it may rejoin" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b'{"status": "hello"}\n', b"", b"220 mail\r\n"])
def test_another_program_on_the_port_of_process_0_is_reported(monkeypatch, answer):
    monkeypatch.setattr(connections, "SILENCE", 0.5)
    port = free_port()
    with socket.create_server(("", port + 1)) as server, ThreadPoolExecutor(1) as pool:

        def enter():
            with pytest.raises(RunError, match=f"127.0.0.1:{port + 1} while others joined, or"):
                ProcessGroup(Rank("127.0.0.1", port, 2, 1)).__enter__()

        done = pool.submit(enter)
        with server.accept()[0] as connection:
            connection.sendall(answer)
            done.result(20)


def test_other_connections_to_the_port_are_ignored():
    """Those that send no valid rank, or nothing."""
    port = free_port()

    def knock(content):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port + 1), timeout=5) as connection:
                    connection.sendall(content)
                return
            except OSError:
                time.sleep(0.01)

    def work(index):
        with ProcessGroup(Rank("127.0.0.1", port, 2, index)) as group:
            return group.exchange(index)

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(work, 0)
        list(pool.map(knock, GARBAGE))
        second = pool.submit(work, 1)
        assert first.result() == second.result() == [0, 1]


def test_a_port_that_is_taken_is_named():
    port = free_port()
    for taken in (port, port + 1):
        with socket.create_server(("", taken)), pytest.raises(InputError, match=f"port {taken} is"):
            ProcessGroup(Rank("127.0.0.1", port, 2, 0)).__enter__()


@pytest.fixture
def last_words(monkeypatch):
    """What processes print before they end at once, which here ends their thread alone."""
    said, ended = [], threading.Event()
    monkeypatch.setattr(group_module, "print_last_words", said.append)

    def end(status):
        said.append(status)
        ended.set()
        sys.exit()

    monkeypatch.setattr(group_module.os, "_exit", end)
    return said, ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("SILENCE", r"process \d \(.*\) was lost: silent for 0 s"),
        ("STANDSTILL", r"process \d \(.*\) hangs: no step was made for 0 s"),
    ],
)
def test_silence_and_standstill_are_noticed(monkeypatch, last_words, attribute, message):
    """Process 1 makes no step, or sends no heartbeat, while process 0 continues."""
    said, ended = last_words
    monkeypatch.setattr(connections, "BEAT", 0.05)

    def work(group):
        with group.training():
            if attribute == "SILENCE" and group.index == 1:
                group._send_all = lambda message: None
            group.exchange()
            if group.is_main:
                group.note_progress()
                module = connections if attribute == "SILENCE" else group_module
                monkeypatch.setattr(module, attribute, 0.3)
            assert ended.wait(20)

    in_group([work] * 2)
    lines = [line for line in map(str, said) if re.match(message, line)]
    assert lines, said
    if attribute == "STANDSTILL":
        assert lines[0].startswith("process 1")
    assert 1 in said


def test_tasks_of_slurm_that_train_runs_of_their_own_are_warned(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert join_processes().count == 1
    assert "one of 4 tasks of SLURM" in capsys.readouterr().err


def test_studies_refuse_several_processes(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:9000")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(InputError, match="sweeps run in one process, this is one of 2"):
        refuse_several_processes("sweeps")
    with pytest.raises(InputError, match="2 processes: several need Keras's JAX backend"):
        join_processes()


# === Runs of processes ===

FLAGS = [
    "--depth=2", "--dim=8", "--image_shape=12", "--patch_shape=4", "--batch_size=60",
    "--num_steps=3", "--warmup_step=1", "--lr=0.01", "--dropout=0.1", "--stochastic_depth=0.2",
    "--inception_crop=0.3", "--flip", "--randaugment=2,10", "--mixup=0.2", "--cutmix=1",
    "--random_erasing=0.3", "--ema=0.9", "--accumulation=2", "--clip_norm=1",
    "--class_weights=balanced", "--save_every=5", "--save_unit=step", "--export=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """JAX's cache of what was compiled, for all runs of this file."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def start(compiled, tmp_path):
    """Starts processes of a run; one's environment and flags may differ."""
    started = []

    def start(count, *flags, only=None):
        only, port = only or {}, free_port()
        for index in range(count):
            more, variables = only.get(index, ((), {}))
            environment = {
                **os.environ,
                "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": compiled,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index),
                **variables,
            }  # fmt: skip
            command = [sys.executable, str(ROOT / "train.py"), *FLAGS, *flags, *more]
            started.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        return started[-count:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(processes, timeout=200):
    """Waits for processes; returns their exit statuses and what they said on standard error."""
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    return [process.returncode for process in processes], said


def arrays_of(run):
    return newest_checkpoint(run / "checkpoints").arrays


def assert_close(run, other):
    """All but metrics' sums: what matters later."""
    expected = arrays_of(other)
    for name, array in arrays_of(run).items():
        if not name.startswith("meters"):
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-5, err_msg=name)
    for one, several in zip(read_history(other), read_history(run), strict=True):
        for name in ("loss", "val_loss", "val_accuracy"):
            assert float(several[name]) == pytest.approx(float(one[name]), abs=1e-4), name


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing_but_rounding(start, tmp_path):
    """With all that is random; one process has two devices of its own."""
    two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for count, variables in ((1, {}), (2, {}), (3, {}), (2, two_devices)):
        name = f"{count}{'x2' * bool(variables)}"
        only = {index: ((), variables) for index in range(count)}
        statuses, said = finish(start(count, f"--output_dir={name}", only=only))
        assert statuses == [0] * count, said
        assert said[1:] == [""] * (count - 1)
        assert_close(tmp_path / name, tmp_path / "1")


@pytest.mark.slow
def test_killed_and_continued_it_is_the_undisturbed_run(start, tmp_path):
    """Process 1, then process 0 is killed; the other ends, and the same command continues."""
    statuses, said = finish(start(2, "--output_dir=undisturbed"))
    assert statuses == [0, 0], said
    for victim in (1, 0):
        processes = start(2, "--output_dir=run")
        known = set(tmp_path.glob("run/checkpoints/step-*"))
        while not set(tmp_path.glob("run/checkpoints/step-" + "[0-9]" * 10)) - known:
            assert processes[victim].poll() is None
            time.sleep(0.01)
        processes[victim].kill()
        killed = time.monotonic()
        (status,), (words,) = finish([processes[1 - victim]], 60)
        assert time.monotonic() - killed < 60
        assert status == 1
        assert words.splitlines()[-1].startswith(f"error: process {victim} (")
        assert ") was lost: its connection is closed; the same command" in words.splitlines()[-1]
        assert "Traceback" not in words
    statuses, said = finish(start(2, "--output_dir=run"))
    assert statuses == [0, 0], said
    assert "continuing run at step" in said[0]
    expected = arrays_of(tmp_path / "undisturbed")
    for name, array in arrays_of(tmp_path / "run").items():
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_after_the_same_step(start, tmp_path):
    flags = ("--output_dir=run", "--num_steps=200")
    processes = start(2, *flags)
    while not (tmp_path / "run/history.csv").exists():
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    statuses, said = finish(processes)
    assert statuses == [143, 143], said
    assert said[0].splitlines()[-1] == (
        "stopped by SIGTERM, state saved; to continue: the same command in all processes"
    )
    saved = newest_checkpoint(tmp_path / "run/checkpoints").step
    processes = start(1, *flags)
    lines = []
    for line in processes[0].stderr:
        lines.append(line)
        if "first step done" in line:
            break
    processes[0].kill()
    assert f"continuing run at step {saved} of" in "".join(lines)
    assert "computed by 2 devices of 2 processes, XLA, jax until now" in "".join(lines)


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ((("--lr=0.02",), {}), "would train another run: --lr is 0.02, on process 0 0.01"),
        ((("--split_seed=1",), {}), "--split_seed is 1, on process 0 0; its data have other"),
    ],
)
def test_a_process_that_would_train_another_run_is_refused(start, tmp_path, different, message):
    statuses, said = finish(start(2, "--output_dir=run", only={1: different}))
    assert statuses == [2, 2]
    for words in said:
        assert words.splitlines()[-1].startswith("error: process 1 (")
        assert message in words.splitlines()[-1]
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_all_end_with_what_process_0_does_alone(start, tmp_path):
    """If the export fails, no process ends with status 0, so that all are started again."""
    flags = ("--num_steps=1", "--warmup_step=0", "--output_dir=run", "--export", "--export_dir=ex")
    processes = start(2, *flags)
    while not (tmp_path / "run/metrics.json").exists():  # process 0 has begun to score
        assert processes[0].poll() is None
        time.sleep(0.001)
    processes[0].kill()
    statuses, said = finish(processes)
    assert statuses == [-signal.SIGKILL, 1]
    assert said[1].startswith("error: process 0 (")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--devices=1", "--devices=1: several processes use all of their devices"),
        ("--batch_size=61", "--accumulation=2 must divide --batch_size=61"),  # process 0 ends first
    ],
)
def test_what_is_wrong_with_the_run_ends_all(start, flag, message):
    statuses, said = finish(start(2, "--output_dir=run", flag))
    assert statuses[0] == 2
    assert statuses[1] in (1, 2)
    for words in said:
        assert words.splitlines()[-1].startswith("error: ")
        assert message in words.splitlines()[-1]


def test_launch_starts_processes_and_returns_their_status(command, tmp_path, compiled, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    done = command("--processes=2", "--", "train", *FLAGS, "--output_dir=run", verb="launch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "run: run"
    record = unseal(json.loads((tmp_path / "run/config.json").read_text()))
    assert record["data"]["images"]["train"] == 1293
    progress = newest_checkpoint(tmp_path / "run/checkpoints").progress
    assert progress["computed_by"] == "2 devices of 2 processes, XLA, jax"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected -- train --flag=value ..., received nothing"),
        (("--", "predict", "run"), "expected -- train --flag=value ..., received predict run"),
        (("--", "train", "--lr=-1"), "--lr: expected a number"),
        (("--processes=0", "--", "train"), "--processes: expected"),
        (("--lr=1",), "--lr is a flag of train: put it after --"),
    ],
)
def test_wrong_arguments_of_launch_are_one_line(command, arguments, message):
    done = command(*arguments, verb="launch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_processes_import_nothing_from_the_working_folder(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit(3)")
    words = module_command("keras_mixer", "--version")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.stdout.startswith(b"keras_mixer ")
