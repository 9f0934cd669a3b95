"""Tests tools/fuzz.py, and by it that a few damaged files of every kind are refused or read."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import fuzz
from fuzz_subjects import SUBJECTS, Subject

from keras_mixer.errors import InputError

INPUTS = 25


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Makes a `Trial` of the subject of a name, or of a function that reads a file of 9 bytes."""
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()

    def make(name="own", read=None, seed=0):
        def write(folder):
            (folder / "file").write_bytes(b"some text")
            return [folder / "file"]

        monkeypatch.setitem(SUBJECTS, "own", Subject(write, read))
        return fuzz.Trial(name, tmp_path / "files", seed)

    return make


@pytest.mark.parametrize("name", [name for name in SUBJECTS if not name.endswith(".pth")])
def test_damaged_files_are_refused_in_one_line_or_read(trial, name):
    trial = trial(name)
    outcomes = [trial.outcome(number)[0] for number in range(INPUTS)]
    assert set(outcomes) <= {"read", "refused"}
    assert "refused" in outcomes


def test_inputs_depend_on_number_and_seed_alone(trial, tmp_path):
    inputs = [trial(read=lambda *_: None, seed=seed).input(number)[1] for seed, number in
              [(0, 0), (0, 1), (1, 0), (0, 0)]]  # fmt: skip
    assert inputs[0] == inputs[3] != b"some text"
    assert len(set(inputs)) == 3


def raising(error):
    def read(folder, path):
        if path.read_bytes() != b"some text":
            raise error

    return read


@pytest.mark.parametrize(
    "read, outcome",
    [
        (raising(InputError("no file")), "refused"),
        (raising(KeyError("x")), "KeyError: 'x'"),
        (lambda folder, path: path.read_bytes(), "damage unnoticed"),
        (lambda folder, path: None, "read"),
    ],
)
def test_what_is_no_refusal_is_a_failure(trial, read, outcome):
    assert trial(read=read).outcome(0)[0] == outcome


def test_crashes_and_failures_are_counted_and_named(monkeypatch, capsys):
    outcomes = [(0, "read", 0.1, 5.0), (1, "crash, exit status -11", 0, 0), (2, "refused", 3.0, 1)]
    assert fuzz._row("file", outcomes) == ("file", 3, 1, 1, 2, "3.00", "5")
    assert [number for number, _ in fuzz._failures(outcomes)] == [1, 2]


def test_wrong_values_of_flags_are_one_line():
    row, failures = fuzz.try_flags(3, seed=0)
    assert failures == []
    assert row[:4] == ("flags", 3, 0, 3)
