"""Tests `keras_mixer/benchmark/scaling.py`, `benchmark --processes`."""

import json

import pytest

from keras_mixer.benchmark import scaling
from keras_mixer.compute.environment import cores
from keras_mixer.model.architecture import Architecture

B16 = Architecture.create("B/16", num_classes=1000)
FOUND = {
    "step": [0.2, 0.1, 0.3],
    "fit": [0.25],
    "exchange": 0.0,
    "input": 0.01,
    "bytes": 0,
    "weights": 9,
}


def test_the_model_is_computation_and_a_ring_of_exchanges():
    """By hand: 59.88 M parameters, 12.6 G multiply-adds an image, three times in training."""
    compute = scaling.seconds_of_compute(B16, 4096)
    assert compute == pytest.approx(4096 * 6 * 12.6e9 / (0.35 * 989.4e12), rel=0.01)
    assert scaling.seconds_of_exchange(B16.parameters, 1, 1e9) == 0
    exchange = scaling.seconds_of_exchange(B16.parameters, 64, 1e9)
    assert exchange == pytest.approx(2 * 63 / 64 * 4 * 59.88e6 / 1e9, rel=0.001)


def test_the_table_has_what_was_measured_beside_what_was_calculated(monkeypatch):
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    two = {**FOUND, "step": [0.15], "exchange": 0.02, "bytes": 500e6}
    text = scaling.as_table({1: FOUND, 2: two, 4: two}, B16, 64)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[4][:8] == ["1", "1", "200.0", "100.0–300.0", "0.0", "200.0", "0.00", "0.00"]
    assert rows[5][:8] == ["2", "2", "150.0", "150.0–150.0", "20.0", "120.0", "500.00", "479.04"]
    assert rows[6][:6] == ["4", "2", "150.0", "150.0–150.0", "20.0", "120.0"]
    assert rows[4][8:] == ["320.0", "256.0", "6,400.0"]
    [last] = [row for row in rows if row[:2] == ["B/16", "64"]]
    compute = 1000 * scaling.seconds_of_compute(B16, 64)
    exchange = 1000 * scaling.seconds_of_exchange(B16.parameters, 64, 50e9)
    assert last[2:4] == ["64", f"{compute:,.0f}"]
    share = compute / (compute + exchange)
    assert last[6] == f"{compute + exchange:,.0f} ms, {share:.0%}"


def test_a_process_that_is_alone_exchanges_nothing(tmp_path):
    answers = []
    values = {"depth": 1, "dim": 8, "batch_size": 32, "output_dir": str(tmp_path)}
    scaling.main({**values, "repeats": 2, "steps": 2}, answers.append)
    [found] = answers
    assert [len(found["step"]), len(found["fit"]), found["exchange"]] == [2, 2, 0]
    assert min(*found["step"], *found["fit"], found["input"]) > 0


def test_batches_that_cannot_be_dealt_out_are_refused(command):
    done = command("--processes=1,3", "--batch_size=64", verb="benchmark")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --batch_size=64: expected a multiple of --processes, received 3\n"
    )


@pytest.mark.slow
def test_processes_are_measured(command, tmp_path):
    pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[test]'")
    flags = ("--depth=1", "--dim=8", "--batch_size=32", "--repeats=1", "--json=found.json")
    done = command("--processes=1,2", *flags, verb="benchmark")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found) == ["1", "2"]
    for values in found.values():
        assert min(*values["step"], *values["fit"], values["input"]) > 0
    assert found["2"]["exchange"] > 0
    parameters = Architecture(
        image_shape=(8, 8), patch_shape=(2, 2), channels=1, depth=1, dim=8, num_classes=10
    ).parameters
    assert found["2"]["bytes"] > 2 * 4 * parameters  # a ring of two; others may use the device
    assert f"| 2 | {min(2, cores())} |" in done.stdout
