"""Tests `keras_mixer/runs/checkpoints.py`."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import ROOT

from keras_mixer import RunError, build_mixer
from keras_mixer.runs import checkpoints
from keras_mixer.runs.checkpoints import (
    TrainState,
    gather_state,
    newest_checkpoint,
    restore_state,
    save_checkpoint,
)
from keras_mixer.training.optimizers import build_optimizer


def checkpoint(step):
    """Every value in it is its step, so that a mixture of two would show."""
    arrays = {"a/kernel": np.full((50, 20), step, "float32"), "b/seed": np.full(2, step, "uint32")}
    return TrainState(step, arrays, {"step": step, "rows": [{"loss": float(step)}]})


def assert_whole(found, step):
    assert found.step == found.progress["step"] == step
    assert found.arrays.keys() == checkpoint(0).arrays.keys()
    for array in found.arrays.values():
        assert (array == step).all()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_keeps_every_bit(tmp_path):
    arrays = {
        "float": np.array([0.1, -0.0, np.pi], "float32"),
        "scalar": np.array(7, "int64"),
        "empty": np.zeros((0, 3), "float32"),
        "transposed": np.arange(6, dtype="float32").reshape(2, 3).T,
    }
    save_checkpoint(tmp_path, TrainState(3, arrays, {"step": 3, "x": 0.1}))
    found = newest_checkpoint(tmp_path)
    assert found.progress == {"step": 3, "x": 0.1}
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    assert names(tmp_path) == ["step-0000000020", "step-0000000100"]
    assert_whole(newest_checkpoint(tmp_path), 100)


FILES = ["arrays.safetensors", "progress.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [None, 0, 0.5, -1])
def test_truncated_and_missing_files_are_noticed(tmp_path, capsys, name, kept):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / "step-0000000002" / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_whole(newest_checkpoint(tmp_path), 1)
    assert "damaged checkpoint skipped" in capsys.readouterr().err


def test_every_flipped_bit_is_noticed(tmp_path):
    dice = random.Random(0)
    for _ in range(100):
        shutil.rmtree(tmp_path)
        save_checkpoint(tmp_path, checkpoint(1))
        save_checkpoint(tmp_path, checkpoint(2))
        path = tmp_path / "step-0000000002" / dice.choice(FILES[:2])
        content = bytearray(path.read_bytes())
        place = dice.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert_whole(newest_checkpoint(tmp_path), 1)


def test_a_damaged_checkpoint_is_removed_once_an_older_one_is_used(tmp_path):
    for step in (1, 50):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-0000000050" / "manifest.json").write_text("{}")
    assert_whole(newest_checkpoint(tmp_path), 1)
    save_checkpoint(tmp_path, checkpoint(10))
    assert names(tmp_path) == ["step-0000000001", "step-0000000010"]


def test_if_all_are_damaged_it_is_an_error(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "step-0000000001" / "progress.json").write_text("{}")
    with pytest.raises(RunError, match="every checkpoint in .* is damaged"):
        newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-0000000001"], "nothing is removed then"


def _nested(path):
    path.mkdir()
    (path / "manifest.json").write_text("[" * 100_000)


def _later_than_its_progress(path):
    shutil.copytree(max(path.parent.glob("step-*")), path)


def _with_a_pipe(name):
    def make(path):
        shutil.copytree(max(path.parent.glob("step-*")), path)
        (path / name).unlink()
        os.mkfifo(path / name)

    return make


# What may be there instead of the newest checkpoint, by a function of its path.
IN_PLACE = {
    "a file": lambda path: path.write_text(""),
    "a link to a file": lambda path: path.symlink_to("/etc/hostname"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a loop": lambda path: path.symlink_to(path),
    "nested": _nested,
    "another step's": _later_than_its_progress,
    **{f"a pipe for {name}": _with_a_pipe(name) for name in FILES},
}


@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_an_intact_older_checkpoint_is_found_instead(tmp_path, capsys, make):
    """A checkpoint that is written then is kept, at the same step or a lower one."""
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    make(tmp_path / "step-0000000005")
    save_checkpoint(tmp_path, checkpoint(3))
    assert "step-0000000003" in names(tmp_path), "not pruned for a later name"
    assert_whole(newest_checkpoint(tmp_path), 3)
    assert "damaged checkpoint skipped" in capsys.readouterr().err
    make(tmp_path / "step-0000000005")
    save_checkpoint(tmp_path, checkpoint(5))
    assert_whole(newest_checkpoint(tmp_path), 5)


def test_a_huge_manifest_is_not_read(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    with open(tmp_path / "step-0000000002" / "manifest.json", "w") as file:
        file.truncate(1 << 40)
    assert_whole(newest_checkpoint(tmp_path), 1)


def test_the_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    state = checkpoint(1)
    save_checkpoint(tmp_path, state._replace(progress=state.progress | {"run": "a"}))
    assert_whole(newest_checkpoint(tmp_path, "a"), 1)
    with pytest.raises(RunError, match="step-0000000001 is a checkpoint of another run"):
        newest_checkpoint(tmp_path, "b")
    assert names(tmp_path) == ["step-0000000001"]


def test_the_run_directory_is_not_made_again(tmp_path):
    with pytest.raises(RunError, match="cannot write a checkpoint"):
        save_checkpoint(tmp_path / "gone" / "checkpoints", checkpoint(1))
    assert names(tmp_path) == []


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    for step in range(1, 5):
        save_checkpoint(tmp_path, checkpoint(step))
    newest_checkpoint(tmp_path)
    assert "mine" in names(tmp_path)


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def full(path, content):
        Path(path).write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_durably", full)
    with pytest.raises(RunError, match=r"of [\d,]+ bytes in .*: No space left on device; earlier"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert names(tmp_path) == ["step-0000000001"]
    assert_whole(newest_checkpoint(tmp_path), 1)


# === Kills ===

DYING = """
import os, shutil
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from keras_mixer.runs import checkpoints
from keras_mixer.runs.checkpoints import TrainState, save_checkpoint

def dying(function, at):
    calls = [0]
    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == at:
            os._exit(9)
        return function(*arguments, **options)
    return call

for step in (1, 2, 3):
    if step == 3:
        {function} = dying({function}, {call})
    arrays = {{"a/kernel": np.full((50, 20), step, "f4"), "b/seed": np.full(2, step, "u4")}}
    save_checkpoint(Path({folder!r}), TrainState(step, arrays, {{"step": step, "rows": []}}))
"""

# What dies at which of its calls, and the step of the newest checkpoint that is left.
DEATHS = {
    "before the first file": ("checkpoints.write_durably", 1, 2),
    "before the second file": ("checkpoints.write_durably", 2, 2),
    "before the manifest": ("checkpoints.write_durably", 3, 2),
    "before the rename": ("os.rename", 1, 2),
    "before pruning": ("shutil.rmtree", 2, 3),
}


@pytest.mark.parametrize(("function", "call", "left"), DEATHS.values(), ids=DEATHS.keys())
def test_a_kill_at_every_point_of_a_write(tmp_path, function, call, left):
    code = DYING.format(folder=str(tmp_path), function=function, call=call)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert_whole(newest_checkpoint(tmp_path), left)
    save_checkpoint(tmp_path, checkpoint(3))
    assert_whole(newest_checkpoint(tmp_path), 3)


def test_files_are_flushed_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    """Else a power cut could keep the name and lose the content."""
    events = []
    for name in ("fsync", "rename"):
        original = getattr(os, name)

        def noted(*arguments, _name=name, _original=original):
            events.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(os, name, noted)
    save_checkpoint(tmp_path, checkpoint(1))
    assert events == ["fsync"] * 4 + ["rename", "fsync"]  # three files, their folder; its parent


def test_manifest_lists_every_file_with_its_sha256(tmp_path):
    import hashlib

    save_checkpoint(tmp_path, checkpoint(1))
    folder = tmp_path / "step-0000000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in FILES[:2]:
        content = (folder / name).read_bytes()
        assert manifest[name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert manifest[name]["bytes"] == len(content)


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    """It would be removed, and its work lost, if a disk is unavailable for a moment."""
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))

    def read(path, most, read=checkpoints.read_regular):
        if "0002" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, most)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "read_regular", read)
        with pytest.raises(RunError, match="step-0000000002 cannot be read now: .*nothing was ch"):
            newest_checkpoint(tmp_path)
    assert_whole(newest_checkpoint(tmp_path), 2)


# === The state of a model ===


def compiled():
    sizes = {"channels": 1, "depth": 2, "dim": 4, "num_classes": 2}
    model = build_mixer((4, 4), (2, 2), **sizes, dropout=0.1, stochastic_depth=0.1)
    accuracy = keras.metrics.CategoricalAccuracy("accuracy")
    optimizer = build_optimizer("adamw", 0.1, model.trainable_variables, ema=0.9)
    model.compile(optimizer, "categorical_crossentropy", metrics=[accuracy], jit_compile=False)
    return model, [*model.metrics[0].variables, *accuracy.variables]


def test_everything_that_a_step_changes_comes_back():
    """Weights, moments, average, counters, metrics, and the states of the seed generators."""
    model, metric_variables = compiled()
    before = gather_state(model, metric_variables)
    data = np.random.default_rng(0)
    images, labels = data.normal(size=(8, 4, 4, 1)), np.eye(2)[data.integers(0, 2, 8)]
    model.train_on_batch(images, labels)
    changed = {
        n for n, a in gather_state(model, metric_variables).items() if (a != before[n]).any()
    }
    for part in ("kernel", "momentum", "average", "iteration", "seed_generator", "meters"):
        assert any(part in name for name in changed), part
    restore_state(model, metric_variables, before)
    for name, array in gather_state(model, metric_variables).items():
        np.testing.assert_array_equal(array, before[name])


def test_names_do_not_depend_on_what_was_built_before_in_the_process():
    assert gather_state(*compiled()).keys() == gather_state(*compiled()).keys()


def test_a_state_of_another_model_is_refused():
    model, metric_variables = compiled()
    arrays = gather_state(model, metric_variables)
    del arrays[next(iter(arrays))]
    with pytest.raises(RunError, match="of another model; differing: model/0000/stem/kernel"):
        restore_state(model, metric_variables, arrays)
