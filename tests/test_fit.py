"""Tests `keras_mixer/training/fit.py`: exact runs, which go on as if never interrupted."""

import csv
import os
import random
import signal
import time
from pathlib import Path

import keras
import kill_runs
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY

import keras_mixer.training.fit as fit_module
from keras_mixer import Config, InputError, RunError, fit
from keras_mixer.data.sources import open_dataset
from keras_mixer.training.callbacks import averaged
from keras_mixer.training.checkpoints import newest_checkpoint
from keras_mixer.training.optimizers import ema_variables
from keras_mixer.training.signals import Interrupted
from keras_mixer.weights import model_folder


@pytest.fixture
def config(tmp_path):
    def make(directory="run", **fields):
        return Config(**{**TINY, "output_dir": str(tmp_path / directory), **fields})

    return make


def rows(run):
    with open(run.directory / "history.csv") as file:
        return list(csv.DictReader(file))


def state(run):
    """Everything that must not depend on interruptions, as comparable values."""
    checkpoint = newest_checkpoint(run.checkpoints)
    best, facts = model_folder.read_weights(run.best)
    history = rows(run)
    for row in history:
        del row["seconds"], row["images_per_second"]
    arrays = {**checkpoint.arrays, **{f"best {k}": v for k, v in best.items()}}
    return {k: v.tobytes() for k, v in arrays.items()} | {"rows": history, "facts": facts}


@pytest.fixture
def interrupted(monkeypatch):
    """Trains, and sends this process a signal after so many steps, as a terminal would."""

    def run(config, step, number=signal.SIGTERM):
        class Interrupting(fit_module.Saver):
            steps_left = step

            def on_train_batch_end(self, batch, logs=None):
                self.steps_left -= 1
                if self.steps_left == 0:
                    os.kill(os.getpid(), number)
                super().on_train_batch_end(batch, logs)

        with monkeypatch.context() as patch:
            patch.setattr(fit_module, "Saver", Interrupting)
            with pytest.raises(Interrupted) as error:
                fit(config)
        return error.value

    return run


# === What a run leaves behind ===


def test_history_has_a_row_per_epoch(config):
    run = fit(config())
    history = rows(run)
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert [row["step"] for row in history] == ["20", "40", "60"]
    assert float(history[-1]["lr"]) > 0, "the rate of the last step, not of the one after"
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "images_per_second"):
        assert all(float(row[name]) > 0 for row in history)


def test_best_weights_are_those_of_the_best_validation_epoch(config):
    run = fit(config(num_steps=4))
    _, facts = model_folder.read_weights(run.best)
    ranks = [(float(r["val_accuracy"]), -float(r["val_loss"])) for r in rows(run)]
    assert facts["epoch"] == 1 + ranks.index(max(ranks))


def test_same_seed_same_bits_other_seed_other_bits(config):
    one, two, other = fit(config("a")), fit(config("b")), fit(config("c", seed=1))
    assert state(one) == state(two)
    assert state(one) != state(other)


def test_without_validation_the_last_weights_are_kept(config):
    run = fit(config(validation_fraction=0.0, ema=0.0))
    assert model_folder.read_weights(run.best)[1]["epoch"] == 3
    assert rows(run)[-1]["val_accuracy"] == ""
    last = newest_checkpoint(run.checkpoints).arrays
    kernel = next(v for k, v in last.items() if k.endswith("/stem/kernel") and "model" in k)
    np.testing.assert_array_equal(model_folder.read_weights(run.best)[0]["stem/kernel"], kernel)


def test_a_length_in_steps_may_end_within_an_epoch(config):
    run = fit(config(num_steps=47, warmup_step=5, schedule_unit="step"))
    assert [row["step"] for row in rows(run)] == ["20", "40", "47"]
    assert newest_checkpoint(run.checkpoints).step == 47


# === Interrupted and continued ===


def test_interrupted_anywhere_it_continues_bit_for_bit(config, interrupted):
    """Twice in one run, once within an epoch and once at its end, and once in the first step."""
    expected = state(fit(config("undisturbed")))
    interrupted(config(), 1)
    interrupted(config(), 26)
    interrupted(config(), 13)  # step 40, the end of the second epoch
    assert state(fit(config())) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"jit": "true"},
        {"optimizer": "sgd", "clip_norm": 1.0, "label_smoothing": 0.1, "layer_decay": 0.5},
        {"num_steps": 47, "warmup_step": 5, "schedule_unit": "step"},
    ],
    ids=str,
)
def test_other_settings_continue_bit_for_bit(config, interrupted, fields):
    expected = state(fit(config("undisturbed", **fields)))
    interrupted(config(**fields), 27)
    assert state(fit(config(**fields))) == expected


def test_a_frozen_backbone_continues_bit_for_bit(config, interrupted, trained):
    fields = {"dim": 16, "dropout": 0.0, "stochastic_depth": 0.0, "freeze": "backbone",
              "checkpoint": str(trained.directory)}  # fmt: skip
    expected = state(fit(config("undisturbed", **fields)))
    interrupted(config(**fields), 27)
    assert state(fit(config(**fields))) == expected


EVERYTHING_RANDOM = {
    "inception_crop": 0.3, "randaugment": (2, 10), "color_jitter": 0.3, "random_erasing": 0.5,
    "mixup": 0.4, "cutmix": 1.0, "class_weights": "balanced", "accumulation": 2,
}  # fmt: skip


def test_with_every_augmentation_it_continues_bit_for_bit(config, interrupted):
    expected = state(fit(config("undisturbed", **EVERYTHING_RANDOM)))
    interrupted(config(**EVERYTHING_RANDOM), 27)
    assert state(fit(config(**EVERYTHING_RANDOM))) == expected


def test_images_from_files_continue_bit_for_bit(config, interrupted, folder):
    fields = {"dataset": "folder", "data_dir": str(folder), "image_shape": (8, 8),
              "patch_shape": (4, 4), "batch_size": 4}  # fmt: skip
    expected = state(fit(config("undisturbed", **fields)))
    interrupted(config(**fields), 8)
    assert state(fit(config(**fields))) == expected


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
    assert f"damaged checkpoint passed over: {folder}/{newest}" in said
    assert "at step 20 of 60" in said


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signals_give_the_status_that_shells_expect(config, interrupted, number, status):
    assert interrupted(config(), 3, number).exit_status == status
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


def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(config):
    with pytest.raises(RunError, match=r"is not finite any more by step \d+, at learning rate"):
        fit(config(optimizer="sgd", lr=1000.0, warmup_step=0, save_every=1, save_unit="step"))
    found = newest_checkpoint(config_path(config) / "checkpoints")
    for name, array in (found.arrays if found else {}).items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_an_image_that_goes_bad_during_the_run_is_named(config, folder, monkeypatch, damage):
    fields = {"dataset": "folder", "data_dir": str(folder), "image_shape": (8, 8),
              "patch_shape": (4, 4), "batch_size": 25}  # fmt: skip
    path = Path(os.fsdecode(open_dataset("folder", folder).train.images[3]))

    def spoil(*arguments, drive=fit_module._drive):
        path.unlink() if damage == "removed" else path.write_bytes(path.read_bytes()[:60])
        drive(*arguments)

    monkeypatch.setattr(fit_module, "_drive", spoil)
    with pytest.raises(InputError, match=f"1 unreadable image, mend or remove: {path}"):
        fit(config(**fields))


def test_other_backends_are_refused(config, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(InputError, match="not on jax; unset KERAS_BACKEND"):
        fit(config())


# === The best weights ===


def test_best_weights_of_an_epoch_that_is_repeated_are_not_trusted(config, interrupted, capsys):
    """Killed between best/ and the checkpoint: best/ is of an epoch that the checkpoint lacks."""
    expected = state(fit(config("undisturbed", num_steps=4)))
    interrupted(config(num_steps=4), 42)
    run = fit_module.open_run(config(num_steps=4))
    with run as opened:
        arrays, facts = model_folder.read_weights(opened.best)
        strange = {name: array + 1 for name, array in arrays.items()}
        model_folder.write_weights(opened.best, strange, **{**facts, "step": 60, "val_accuracy": 0.9})
    found = state(fit(config(num_steps=4)))
    if found["facts"]["step"] > 40:  # an epoch after the interruption is the best one
        assert found == expected
    assert found["best stem/kernel"] != (arrays["stem/kernel"] + 1).tobytes()


def test_damaged_best_weights_are_said_aloud_and_replaced(config, interrupted, capsys):
    interrupted(config(num_steps=4), 42)
    path = Path(config().output_dir) / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    run = fit(config(num_steps=4))
    assert "takes its place" in capsys.readouterr().err
    assert model_folder.read_weights(run.best)[1]["step"] > 42


# === Signals at awkward moments ===


def test_a_signal_before_the_first_step_of_a_continued_run(config, interrupted, monkeypatch):
    interrupted(config(), 13)
    build = fit_module._validation_batches

    def signalled(run):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(run)

    monkeypatch.setattr(fit_module, "_validation_batches", signalled)
    with pytest.raises(Interrupted):
        fit(config())
    assert newest_checkpoint(config_path(config) / "checkpoints").step == 13


def test_a_signal_in_the_last_step_is_not_swallowed(config, interrupted):
    expected = state(fit(config("undisturbed")))
    assert interrupted(config(), 60).exit_status == 143
    assert state(fit(config())) == expected


# === The moving average ===


def test_validation_uses_the_average_and_training_goes_on_from_the_weights():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse")
    own = [v.numpy() for v in model.trainable_variables]
    for index, average in enumerate(ema_variables(optimizer)):
        average.assign(tf.fill(average.shape, float(index) + 7))
    with averaged(model):
        assert float(model.trainable_variables[0][0, 0]) == 7
    for variable, value in zip(model.trainable_variables, own, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_best_weights_are_the_average(config):
    run = fit(config(num_steps=1))
    arrays = newest_checkpoint(run.checkpoints).arrays
    averages = [v for k, v in arrays.items() if "average" in k and "stem" in k and "kernel" in k]
    assert len(averages) == 1
    np.testing.assert_array_equal(model_folder.read_weights(run.best)[0]["stem/kernel"], averages[0])


# === Starting from a checkpoint ===


def test_a_run_can_start_from_anothers_weights(config, trained):
    run = fit(
        Config(
            checkpoint=str(trained.directory),
            output_dir=config("next").output_dir,
            num_steps=1,
            lr=1e-9,
            warmup_step=0,
            batch_size=64,
        )
    )
    before, after = (model_folder.read_weights(r.best)[0] for r in (trained, run))
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-6)
    assert float(rows(run)[0]["val_accuracy"]) > 0.5


# === In processes of their own ===


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """Two kills after the first step; `python tests/kill_runs.py --kills=20` does more."""
    expected, seconds = kill_runs.undisturbed(tmp_path / "undisturbed")
    dice, kills, attempt = random.Random(0), 0, 0
    while kills < 2:
        directory = tmp_path / f"killed{attempt}"
        done, found = kill_runs.disturbed(directory, 0.8 * seconds, 2 - kills, dice)
        assert kill_runs.differences(expected, found) == []
        kills, attempt = kills + done, attempt + 1
        assert attempt < 10, "the runs end before they can be killed"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signalled_process_saves_and_tells_how_to_go_on(tmp_path, number, status):
    process = kill_runs.start(tmp_path / "run", "--save_every=1000", "--num_steps=1000")
    kill_runs.wait_for_first_step(process)
    time.sleep(0.5)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == status
    assert "to continue: python train.py" in said
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").step > 0
