"""Tests `keras_mixer/training/fit.py`: interrupted runs end with the bits of uninterrupted ones."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, read_history

import keras_mixer.runs.open_run as open_module
import keras_mixer.training.batches as batches_module
import keras_mixer.training.fit as fit_module
from keras_mixer import Config, InputError, RunError, fit
from keras_mixer.data.sources import open_dataset
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.resume import Progress
from keras_mixer.runs.run import check_best
from keras_mixer.signals import Interrupted
from keras_mixer.training import callbacks
from keras_mixer.training.callbacks import use_ema_weights
from keras_mixer.training.optimizers import ema_variables
from keras_mixer.weights import model_folder


@pytest.fixture
def config(tmp_path):
    def make(directory="run", **fields):
        return Config(**{**TINY, "output_dir": str(tmp_path / directory), **fields})

    return make


def state(run):
    """Everything that must not depend on interruptions, as comparable values."""
    checkpoint = newest_checkpoint(run.checkpoints)
    best, facts = model_folder.read_weights(run.best)
    history = read_history(run)
    for row in history:
        del row["seconds"], row["images_per_second"]
    arrays = {**checkpoint.arrays, **{f"best {k}": v for k, v in best.items()}}
    return {k: v.tobytes() for k, v in arrays.items()} | {"rows": history, "facts": facts}


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def assert_exact(config, interrupted):
    """Asserts that a run interrupted after so many steps ends as if nothing had happened."""

    def check(*steps, **fields):
        expected = state(fit(config("undisturbed", **fields)))
        for step in steps:
            interrupted(config(**fields), step)
        assert state(fit(config(**fields))) == expected

    return check


# === What a run leaves behind ===


def test_history_has_a_row_per_epoch(config):
    run = fit(config())
    history = read_history(run)
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert [row["step"] for row in history] == ["20", "40", "60"]
    assert float(history[-1]["lr"]) > 0, "the rate of the last step, not of the one after"
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "images_per_second"):
        assert all(float(row[name]) > 0 for row in history)


def test_best_weights_are_those_of_the_best_validation_epoch(config):
    run = fit(config(num_steps=4))
    _, facts = model_folder.read_weights(run.best)
    ranks = [(float(r["val_accuracy"]), -float(r["val_loss"])) for r in read_history(run)]
    assert facts["epoch"] == 1 + ranks.index(max(ranks))


def test_same_seed_same_bits_other_seed_other_bits(config):
    one, two, other = fit(config("a")), fit(config("b")), fit(config("c", seed=1))
    assert state(one) == state(two)
    assert state(one) != state(other)


def test_without_validation_the_last_weights_are_kept(config):
    run = fit(config(validation_fraction=0.0, ema=0.0))
    assert model_folder.read_weights(run.best)[1]["epoch"] == 3
    assert read_history(run)[-1]["val_accuracy"] == ""
    last = newest_checkpoint(run.checkpoints).arrays
    kernel = next(v for k, v in last.items() if k.endswith("/stem/kernel") and "model" in k)
    np.testing.assert_array_equal(model_folder.read_weights(run.best)[0]["stem/kernel"], kernel)


def test_a_length_in_steps_may_end_within_an_epoch(config):
    run = fit(config(num_steps=47, warmup_step=5, schedule_unit="step"))
    assert [row["step"] for row in read_history(run)] == ["20", "40", "47"]
    assert newest_checkpoint(run.checkpoints).step == 47


# === Interrupted and continued ===


def test_interrupted_anywhere_it_continues_bit_for_bit(assert_exact):
    """In the first step, within an epoch, and at step 40, which ends the second epoch."""
    assert_exact(1, 26, 13)


EVERYTHING_RANDOM = {
    "inception_crop": 0.3, "randaugment": (2, 10), "color_jitter": 0.3, "random_erasing": 0.5,
    "mixup": 0.4, "cutmix": 1.0, "class_weights": "balanced", "accumulation": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"precision": "float16"}, marks=pytest.mark.slow),
        pytest.param({"jit": "true"}, marks=pytest.mark.slow),
        {"optimizer": "sgd", "clip_norm": 1.0, "label_smoothing": 0.1, "layer_decay": 0.5},
        {"num_steps": 47, "warmup_step": 5, "schedule_unit": "step", "precision": "bfloat16"},
        pytest.param(EVERYTHING_RANDOM, id="everything random"),
    ],
    ids=str,
)
def test_other_settings_continue_bit_for_bit(assert_exact, fields):
    assert_exact(27, **fields)


def test_a_frozen_backbone_continues_bit_for_bit(assert_exact, trained):
    fields = {"dim": 16, "dropout": 0.0, "stochastic_depth": 0.0, "freeze": "backbone"}
    assert_exact(27, **fields, checkpoint=str(trained.directory))


def test_images_from_files_continue_bit_for_bit(assert_exact, folder):
    fields = {"image_shape": (8, 8), "patch_shape": (4, 4), "batch_size": 4}
    assert_exact(8, dataset="folder", data_dir=str(folder), **fields)


def test_continued_from_the_checkpoint_before_a_damaged_one(config, interrupted, capsys):
    expected = state(fit(config("undisturbed")))
    interrupted(config(save_every=10, save_unit="step"), 27)
    folder = config().output_dir + "/checkpoints"
    newest = max(os.listdir(folder))
    with open(f"{folder}/{newest}/arrays.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    assert state(fit(config())) == expected
    said = capsys.readouterr().err
    assert f"damaged checkpoint skipped: {folder}/{newest}" in said
    assert "at step 20 of 60" in said


def test_a_signal_gives_the_status_that_shells_expect(config, interrupted):
    assert interrupted(config(), 3, signal.SIGHUP).exit_status == 129
    assert newest_checkpoint(config_path(config) / "checkpoints").step == 3


def config_path(config):
    return Path(config().output_dir)


def test_a_finished_run_is_left_alone(config):
    run = fit(config())
    before = state(run)
    times = {p: p.stat().st_mtime_ns for p in run.directory.rglob("*") if p.is_file()}
    fit(config())
    assert state(run) == before
    now = {p: p.stat().st_mtime_ns for p in run.directory.rglob("*") if p.is_file()}
    assert {p: t for p, t in now.items() if p.name != ".lock"} == {
        p: t for p, t in times.items() if p.name != ".lock"
    }


# === What can go wrong ===


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(config):
    with pytest.raises(RunError, match=r"is not finite by step \d+, at learning rate"):
        fit(config(optimizer="sgd", lr=1000.0, warmup_step=0, save_every=1, save_unit="step"))
    found = newest_checkpoint(config_path(config) / "checkpoints")
    for name, array in (found.arrays if found else {}).items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize("reader", ["keep_in_memory", "training_batches"])
@pytest.mark.parametrize("damage", ["truncated", "removed", "a folder"])
def test_an_image_that_goes_bad_during_the_run_is_named(
    config, folder, monkeypatch, damage, reader
):
    """While it is decoded to be kept, or in training, if the images do not fit in memory."""
    fields = {"dataset": "folder", "data_dir": str(folder), "image_shape": (8, 8),
              "patch_shape": (4, 4), "batch_size": 25}  # fmt: skip
    path = Path(os.fsdecode(open_dataset("folder", folder).train.paths[3]))

    read = getattr(batches_module, reader)

    def spoil(*arguments, **options):
        content = path.read_bytes()[:60]
        path.unlink()
        if damage == "truncated":
            path.write_bytes(content)
        elif damage == "a folder":
            path.mkdir()
        return read(*arguments, **options)

    if reader == "training_batches":
        monkeypatch.setattr("keras_mixer.preprocessing.input_pipeline.KEPT_BYTES", 0)
    monkeypatch.setattr(batches_module, reader, spoil)
    advice = "repair or remove, or skip with --bad_images=skip"
    with pytest.raises(InputError, match=f"1 unreadable image, {advice}: {path}"):
        fit(config(**fields))


# === The best weights ===


def test_best_weights_of_an_epoch_that_is_repeated_are_not_trusted(config, interrupted, capsys):
    """Killed between best/ and the checkpoint: best/ is of an epoch that the checkpoint lacks."""
    expected = state(fit(config("undisturbed", num_steps=4)))
    interrupted(config(num_steps=4), 42)
    best = config_path(config) / "best"
    arrays, facts = model_folder.read_weights(best)
    strange = {name: array + 1 for name, array in arrays.items()}
    model_folder.write_weights(best, strange, **{**facts, "step": 60, "val_accuracy": 0.9})
    found = state(fit(config(num_steps=4)))
    if found["facts"]["step"] > 40:  # an epoch after the interruption is the best one
        assert found == expected
    assert found["best stem/kernel"] != (arrays["stem/kernel"] + 1).tobytes()


@pytest.mark.parametrize("change", [{"step": 18}, {"step": 60, "run": "another"}])
def test_best_weights_from_before_the_checkpoint_are_refused(config, interrupted, change):
    """As from a backup: the best epoch so far would be lost, and a worse one taken for it."""
    interrupted(config(num_steps=4), 42)
    best = config_path(config) / "best"
    arrays, facts = model_folder.read_weights(best)
    older = {name: array + 1 for name, array in arrays.items()}
    model_folder.write_weights(best, older, **{**facts, **change})
    with pytest.raises(RunError, match="best holds other weights than those of epoch .*restore"):
        fit(config(num_steps=4))
    model_folder.write_weights(best, arrays, **facts)
    assert fit(config(num_steps=4)).scores == {}


def test_damaged_best_weights_are_reported_and_replaced(config, interrupted, capsys):
    interrupted(config(num_steps=4), 42)
    path = config_path(config) / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    run = fit(config(num_steps=4))
    assert "replaced by the best epoch from here on" in capsys.readouterr().err
    assert model_folder.read_weights(run.best)[1]["step"] > 42


# === Signals at awkward moments ===


def test_a_signal_before_the_first_step_of_a_continued_run(config, interrupted, monkeypatch):
    interrupted(config(), 13)

    def signalled(*arguments, batches=batches_module.evaluation_batches, **others):
        os.kill(os.getpid(), signal.SIGTERM)
        return batches(*arguments, **others)

    monkeypatch.setattr(batches_module, "evaluation_batches", signalled)
    with pytest.raises(Interrupted):
        fit(config())
    assert newest_checkpoint(config_path(config) / "checkpoints").step == 13


def test_a_signal_in_the_last_step_is_not_swallowed(config, interrupted):
    expected = state(fit(config("undisturbed")))
    assert interrupted(config(), 60).exit_status == 143
    assert state(fit(config())) == expected


# === EMA ===


def test_validation_uses_the_ema_and_training_continues_from_the_weights():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse")
    own = [v.numpy() for v in model.trainable_variables]
    for index, average in enumerate(ema_variables(optimizer)):
        average.assign(tf.fill(average.shape, float(index) + 7))
    with use_ema_weights(model):
        assert float(model.trainable_variables[0][0, 0]) == 7
    for variable, value in zip(model.trainable_variables, own, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_best_weights_are_the_ema(config):
    run = fit(config(num_steps=1))
    arrays = newest_checkpoint(run.checkpoints).arrays
    averages = [v for k, v in arrays.items() if "average" in k and "stem" in k and "kernel" in k]
    assert len(averages) == 1
    np.testing.assert_array_equal(
        model_folder.read_weights(run.best)[0]["stem/kernel"], averages[0]
    )


# === Starting from a checkpoint ===


def test_a_run_can_start_from_anothers_weights(config, trained):
    fields = {"num_steps": 1, "lr": 1e-9, "warmup_step": 0, "batch_size": 64}
    output_dir = config("next").output_dir
    run = fit(Config(**fields, checkpoint=str(trained.directory), output_dir=output_dir))
    before, after = (model_folder.read_weights(r.best)[0] for r in (trained, run))
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-6)
    assert float(read_history(run)[0]["val_accuracy"]) > 0.5


def test_a_pretrained_file_is_read_once_and_its_arrays_are_released(config, trained, monkeypatch):
    """Training does not need it: the test removes it once the run is open."""
    start = Path(shutil.copytree(trained.best, config_path(config).with_name("start")))
    read, paths = open_module.read_pretrained, []
    monkeypatch.setattr(
        open_module, "read_pretrained", lambda path, *rest: paths.append(path) or read(path, *rest)
    )
    fields = {"checkpoint": str(start), "dim": 16, "num_steps": 1}
    with open_module.open_run(config(**fields)) as run:
        shutil.rmtree(start)
        references = [weakref.ref(array) for array in run.pretrained.arrays.values()]
        fit_module.fit_run(run)
        assert [reference() for reference in references] == [None] * len(references)
    assert paths == [str(start)]


@pytest.mark.parametrize("steps_per_epoch, said", [(100, "2 min an epoch, 17 min"), (4, None)])
def test_the_time_of_a_long_run_is_logged_before_its_first_epoch_ends(
    monkeypatch, capsys, steps_per_epoch, said
):
    clock = itertools.count()  # a second per step
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = SimpleNamespace(total_steps=1000, steps_per_epoch=steps_per_epoch)
    bar = SimpleNamespace(disable=True, add_task=lambda *_, **__: 0)
    progress = Progress()
    watcher = callbacks.ProgressBar(run, progress, bar)
    for progress.step in range(1, 20):
        watcher.on_train_batch_end(progress.step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "first step done after 1.0 s, compilation included"
    assert lines[1:] == ([f"about {said} in all"] if said else [])


# === In processes of their own ===


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened():
    """One kill; `python tools/kill_runs.py --kills=100` does more."""
    command = [sys.executable, ROOT / "tools" / "kill_runs.py", "--kills=1"]
    command += ["--", "--jit=false", "--export=false"]  # quicker
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 1 | 1 | 1 |" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_and_prints_how_to_continue(tmp_path, number, status):
    flags = ["--depth=2", "--dim=8", "--save_every=1000", "--num_steps=1000", "--output_dir=run"]
    flags.append("--jit=false")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert any("first step done" in line for line in process.stderr)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == status
    assert f"to continue: python {ROOT / 'train.py'} --depth=2" in said
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").step > 0


# === Files of other runs, and files that are gone ===


def test_checkpoints_of_another_seed_are_refused(config, interrupted):
    interrupted(config("other", seed=1), 20)
    interrupted(config(), 25)
    folder = config_path(config) / "checkpoints"
    shutil.rmtree(folder)
    shutil.copytree(config_path(config).with_name("other") / "checkpoints", folder)
    with pytest.raises(RunError, match="step-0000000020 is a checkpoint of another run"):
        fit(config())


def test_weights_of_another_run_are_not_scored(config):
    """Neither when a finished run is given again, nor if it is not scored yet."""
    run, other = fit(config()), fit(config("other", seed=1))
    shutil.copy(other.best / "model.safetensors", run.best)
    with pytest.raises(RunError, match="holds other weights than those of epoch"):
        fit(config())
    with open_module.open_run(config()) as opened, pytest.raises(InputError, match="did not save"):
        check_best(opened)


@pytest.mark.parametrize("removed", ["checkpoints", "checkpoints/*"])
def test_a_run_without_its_checkpoints_is_refused_or_repeated(config, interrupted, capsys, removed):
    """A kill before the first checkpoint leaves an empty folder, and the run begins again."""
    interrupted(config(), 25)
    for path in config_path(config).glob(removed):
        shutil.rmtree(path)
    if removed == "checkpoints":
        with pytest.raises(RunError, match="has a history of 1 epochs but nothing in checkpoints/"):
            fit(config())
    else:
        expected = state(fit(config("undisturbed")))
        assert state(fit(config())) == expected
        assert "no checkpoint was saved in 1 epochs of" in capsys.readouterr().err


def test_checkpoints_that_are_gone_or_cannot_be_listed_are_not_none(config, monkeypatch):
    """As on an empty mount: the run would begin again, over best/ and history.csv."""
    run = fit(config(save_every=2))
    before = files_in(run.directory)
    with monkeypatch.context() as patched:
        listdir = os.listdir

        def refuse(path):
            if path == run.checkpoints:
                raise PermissionError(errno.EACCES, "Permission denied")
            return listdir(path)

        patched.setattr(os, "listdir", refuse)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="checkpoints cannot be listed now, nothing was"):
                fit(config(save_every=2, overwrite=overwrite))
    assert files_in(run.directory) == before
    for path in run.checkpoints.iterdir():
        shutil.rmtree(path)
    with pytest.raises(RunError, match="nothing in checkpoints/ to continue from; restore it, or"):
        fit(config(save_every=2))
    assert files_in(run.directory).items() <= before.items()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_directory_is_taken_away_ends_and_does_not_make_it_again(config, replaced):
    directory = config_path(config)

    def take_away(*_):
        shutil.rmtree(directory)
        if replaced:
            with open_module.open_run(config(seed=1)):
                pass

    taken = keras.callbacks.LambdaCallback(on_epoch_begin=take_away)
    with pytest.raises(RunError, match="holds another run" if replaced else "is gone: it was"):
        fit(config(), callbacks=[taken])
    assert not (directory / "history.csv").exists()
    assert directory.exists() == replaced
