"""Tests that a run depends on its flags and data alone, and not on where and how it is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.weights import model_folder

FLAGS = [
    "--dataset=csv", "--image_shape=8", "--patch_shape=4", "--depth=2", "--dim=8",
    "--num_steps=3", "--warmup_step=1", "--batch_size=8", "--lr=0.01", "--dropout=0.1",
    "--stochastic_depth=0.2", "--inception_crop=0.3", "--flip", "--randaugment=2,10",
    "--mixup=0.2", "--cutmix=1", "--random_erasing=0.3", "--ema=0.9", "--accumulation=2",
    "--class_weights=balanced", "--bad_images=skip", "--export=false",
]  # fmt: skip

# As on a file system that lists its entries in another order.
REVERSED = """
import contextlib, os, sys
scan, names = os.scandir, os.listdir
os.scandir = lambda *a: contextlib.closing(_Entries(scan(*a)))
os.listdir = lambda *a: sorted(names(*a), reverse=True)
class _Entries(list):
    def __init__(self, entries):
        super().__init__(sorted(entries, key=lambda entry: entry.name, reverse=True))
    close = list.clear
sys.argv = ["train.py", *sys.argv[1:]]
from keras_mixer.__main__ import main
main(["train", *sys.argv[1:]])
"""


@pytest.fixture(autouse=True)
def data(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "cache"))
    rows = []
    for path in sorted(folder.rglob("*.??g")):
        label, name = path.parent.name, f"{path.parent.name}-{path.name}"
        path.rename(folder / name)
        rows.append(f"{name},{label}\n")
    (folder / "labels.csv").write_text("id,label\n" + "".join(rows))


def trained(tmp_path, name, *flags, cwd=None, code=None, **environment):
    """Trains in a process of its own; returns everything that must be equal, as bytes."""
    start = ["-c", code] if code else [ROOT / "train.py"]
    directory = tmp_path / name
    done = subprocess.run(
        [sys.executable, *start, *flags, f"--output_dir={directory}"],
        cwd=cwd or tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = newest_checkpoint(directory / "checkpoints").arrays
    arrays = checkpoint | {
        f"best {k}": v for k, v in model_folder.read_weights(directory / "best")[0].items()
    }
    return {key: array.tobytes() for key, array in arrays.items()}


@pytest.mark.slow
def test_runs_do_not_depend_on_where_they_are_started(tmp_path):
    """Nor on hash seeds, the locale, the time zone, the order of the file system."""
    flags = [*FLAGS, f"--data_dir={tmp_path / 'data'}"]
    plain = trained(tmp_path, "plain", *flags, PYTHONHASHSEED="0", TZ="UTC", LC_ALL="C")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    relative = [*FLAGS, f"--data_dir={Path('..') / 'data'}"]
    other = trained(
        tmp_path, "other", *relative, cwd=elsewhere, code=REVERSED,
        PYTHONHASHSEED="7", TZ="Pacific/Auckland", LC_ALL="C.UTF-8", LANG="de_DE.UTF-8",
        KERAS_MIXER_CACHE=str(tmp_path / "other_cache"),
    )  # fmt: skip
    assert other == plain
    repeated = f"--flagfile={tmp_path / 'other' / 'flags.txt'}"
    assert trained(tmp_path, "again", repeated) == plain
    deterministic = trained(tmp_path, "deterministic", repeated, "--deterministic")
    assert deterministic != plain, "other operations, which round otherwise"
