"""Tests `keras_mixer/jobs.py`: a whole job from a config to an export, and many of them."""

import collections
import csv
import dataclasses
import errno
import gc
import itertools
import logging
import os
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest
import tensorflow as tf
from conftest import ROOT, rewrite
from tensorflow.python.eager import context
from tensorflow.python.framework import ops
from tensorflow.python.framework.func_graph import FuncGraph

from keras_mixer import Config, InputError, build_mixer, fit, jobs, load_mixer, run_job
from keras_mixer.config.options import as_flags
from keras_mixer.files import write_sealed
from keras_mixer.inference import evaluate as evaluate_module
from keras_mixer.inference.export import formats
from keras_mixer.inference.export.formats import export
from keras_mixer.inference.export.versions import check_target, make_unfinished
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.run import read_history, read_metrics
from keras_mixer.signals import Interrupted
from keras_mixer.training import fit as fit_module

QUICK = {"depth": 1, "dim": 8, "batch_size": 64, "num_steps": 1, "jit": "false"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config of a finished job and its run; read them, do not change them."""
    folder = tmp_path_factory.mktemp("jobs")
    config = Config(**QUICK, output_dir=str(folder / "run"), export_dir=str(folder / "exports"))
    return config, run_job(config)


def files(folder):
    """Returns content and modification time of every file in a folder, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_a_job_trains_scores_and_exports_and_given_again_changes_nothing(finished, capsys):
    config, run = finished
    assert {name: scores["n"] for name, scores in run.scores.items()} == {
        "validation": 144, "test": 360,
    }  # fmt: skip
    assert (run.selected_epoch, run.saved_model) == (1, f"{config.export_dir}/mlp_mixer/1")
    before = files(run.directory.parent)
    assert run_job(config).scores == run.scores
    assert capsys.readouterr().err == f"{run.directory} is complete; nothing was changed\n"
    assert files(run.directory.parent) == before


def test_a_job_is_what_train_py_does_with_the_same_flags(finished, tmp_path, monkeypatch, capsys):
    config, run = finished
    config = dataclasses.replace(config, output_dir=f"{tmp_path}/run", export_dir=str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", *as_flags(config)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(ROOT / "train.py", run_name="__main__")
    assert exit.value.code == 0
    assert f"test: {run.scores['test']['top1']:.2%} of 360 images" in capsys.readouterr().out
    assert (tmp_path / "mlp_mixer" / "1" / "saved_model.pb").is_file()
    weights = [path / "best" / "model.safetensors" for path in (run.directory, tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_shows_what_it_is_in_one_line(finished):
    _, run = finished
    test, validation = (f"{run.scores[name]['top1']:.2%}" for name in ("test", "validation"))
    assert repr(run) == (
        f"Run('{run.directory}': 10 classes, 1 epoch, validation: {validation} of 144 images, "
        f"test: {test} of 360 images)"
    )


def test_callbacks_of_the_user_see_every_epoch_and_may_stop_the_run(tmp_path, capsys):
    class Watcher(keras.callbacks.Callback):
        seen = ()

        def on_epoch_end(self, epoch, logs=None):
            self.seen = (*self.seen, epoch)
            assert logs.keys() >= {"loss", "accuracy", "val_loss", "val_accuracy"}
            self.model.stop_training = epoch == 1

    watcher = Watcher()
    config = Config(**QUICK | {"num_steps": 4}, output_dir=str(tmp_path / "run"))
    run = fit(config, callbacks=[watcher])
    assert watcher.seen == (0, 1)
    assert "stopped by a callback at step 40 of 80" in capsys.readouterr().err
    assert newest_checkpoint(run.checkpoints).step == 40
    fit(config, callbacks=[watcher])
    assert watcher.seen == (0, 1, 2, 3), "continued, to the end"


def test_a_checkpoint_of_keras_is_the_plain_model_whatever_computes_it(tmp_path):
    plain = build_mixer((8, 8), (2, 2), channels=1, depth=1, dim=8, num_classes=10)
    settings = QUICK | {"jit": "auto", "accumulation": 2, "layer_decay": 0.5}
    config = Config(**settings, lr=0.1, output_dir=str(tmp_path / "run"))
    whole, weights, log = (str(tmp_path / name) for name in ("a.keras", "a.weights.h5", "a.csv"))
    save, only_weights = (keras.callbacks.ModelCheckpoint(path) for path in (whole, weights))
    only_weights.save_weights_only = True
    run = fit(config, callbacks=[save, only_weights, keras.callbacks.CSVLogger(log)])
    loaded = keras.models.load_model(whole)
    assert type(loaded) is type(plain)
    plain.load_weights(weights)
    trained = load_mixer(run.directory).get_weights()
    for expected, *found in zip(trained, loaded.get_weights(), plain.get_weights(), strict=True):
        assert all((array == expected).all() for array in found)
    [row] = csv.DictReader(Path(log).read_text().splitlines())
    assert float(row["learning_rate"]) == run.history[0]["lr"] > 0


def test_callbacks_of_keras_that_set_the_learning_rate_are_refused_before_the_first_step(tmp_path):
    config = Config(**QUICK, output_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="ReduceLROnPlateau sets the learning rate, as --sched"):
        run_job(config, callbacks=[keras.callbacks.ReduceLROnPlateau()])


def test_stopped_before_its_export_a_job_continues_with_that_alone(finished, tmp_path, monkeypatch):
    config, run = finished
    shutil.copytree(run.directory, tmp_path / "run")
    metrics = run.scores | {"facts": {"selected_epoch": 1}}
    write_sealed(tmp_path / "run" / "metrics.json", metrics)
    config = dataclasses.replace(config, output_dir=f"{tmp_path}/run", export_dir=str(tmp_path))
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trains again"))
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *_, **__: pytest.fail("scores again"))
    again = run_job(config)
    assert again.scores == run.scores
    assert again.saved_model == f"{tmp_path}/mlp_mixer/1"
    assert (tmp_path / "mlp_mixer" / "1" / "saved_model.pb").is_file()


def test_killed_between_publishing_and_noting_it_a_job_publishes_nothing_again(finished, tmp_path):
    config, run = finished
    shutil.copytree(run.directory, tmp_path / "run")
    home = Path(config.export_dir) / config.name
    before = sorted(os.listdir(home))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    rewrite(tmp_path / "run" / "metrics.json", lambda values: values["facts"].pop("saved_model"))
    assert run_job(config).saved_model == run.saved_model
    assert sorted(os.listdir(home)) == before


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    left = Path(make_unfinished(tmp_path))
    dead = left.rename(tmp_path / left.name.replace(str(os.getpid()), str(child.pid)))
    own, other = Path(make_unfinished(tmp_path)), tmp_path / ".export-elsewhere.1.x"
    other.mkdir()
    assert not dead.exists()
    Path(make_unfinished(tmp_path)).rmdir()
    assert own.exists(), "of a process that is alive"
    assert other.exists(), "of another computer"


def test_a_damaged_history_is_named_and_written_again_once_metrics_are_gone(finished, tmp_path):
    config, run = finished
    directory = tmp_path / "run"
    shutil.copytree(run.directory, directory)
    config = dataclasses.replace(config, output_dir=str(directory), export=False)
    content = (directory / "history.csv").read_bytes()
    (directory / "history.csv").write_bytes(content.replace(b"0.", b"1.", 1))
    with pytest.raises(InputError, match=r"history\.csv: damaged; remove metrics\.json"):
        read_history(directory)
    (directory / "metrics.json").unlink()
    assert run_job(config).scores == run.scores
    assert (directory / "history.csv").read_bytes() == content


def test_a_model_of_other_classes_is_not_exported_as_a_new_version(finished, folder, tmp_path):
    config, run = finished
    data = {
        "dataset": "folder",
        "data_dir": str(folder),
        "image_shape": 8,
        "patch_shape": 4,
        "batch_size": 8,
    }
    other = Config(**QUICK | data, output_dir=str(tmp_path / "run"), export_dir=config.export_dir)
    message = (
        r"--name=mlp_mixer: .*/1 serves the classes 0, 1, 2, …, this model ant, bee, cat; a se"
    )
    with pytest.raises(InputError, match=message):
        run_job(other)
    assert not (tmp_path / "run").exists(), "refused before anything is written"
    with pytest.raises(InputError, match=message):
        export(fit(other), export_dir=config.export_dir, name=config.name)
    assert os.listdir(f"{config.export_dir}/mlp_mixer") == ["1"]
    check_target(config.export_dir, "another", run.spec)
    check_target(config.export_dir, config.name, run.spec)


@pytest.mark.parametrize("export_dir", ["file", "file/deeper", "/proc/nowhere"])
def test_an_export_that_cannot_be_written_is_refused_before_training(tmp_path, export_dir):
    (tmp_path / "file").touch()
    path = tmp_path / export_dir  # an absolute one stays as it is
    config = Config(**QUICK, output_dir=str(tmp_path / "run"), export_dir=str(path))
    with pytest.raises(InputError, match=f"^--export_dir={path}: cannot write to "):
        run_job(config)
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        tf.errors.UnknownError(
            None, None, "{{function_node x}} /a/b.tempstate; No space left on device [Op:SaveV2]"
        ),
    ],
    ids=["ours", "TensorFlow's"],
)
def test_a_full_disk_at_export_loses_no_score(finished, tmp_path, monkeypatch, run, error):
    config, done = finished
    shutil.copytree(done.directory, tmp_path / "run")
    metrics = done.scores | {"facts": {"selected_epoch": 1}}
    write_sealed(tmp_path / "run" / "metrics.json", metrics)
    words = ["train", *as_flags(config), f"--output_dir={tmp_path}/run", "--export_dir=exports"]

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(formats, "flush_tree", fail)
        status, out, err = run(*words)
    assert (status, out) == (1, "")
    *_, last = err.splitlines()
    assert last.startswith("error: cannot export to exports/mlp_mixer: No space left on device;")
    assert f"test: {done.scores['test']['top1']:.2%} of 360 images" in last
    assert os.listdir(tmp_path / "exports" / "mlp_mixer") == [], "nothing half written"
    status, out, _ = run(*words)
    assert (status, "exported: exports/mlp_mixer/1" in out) == (0, True)


def test_an_average_too_slow_for_the_run_is_named(run, tmp_path):
    sizes = "--depth=1", "--dim=8", "--jit=false", "--batch_size=512", "--schedule_unit=step"
    words = "train", *sizes, "--num_steps=3", "--warmup_step=0", "--export=false", "--overwrite"
    _, _, err = run(*words, "--ema=0.9995")
    assert err.count("--ema=0.9995: after 3 steps, 99.9% of the initial weights would remain") == 1
    assert "--ema=0.2154 leaves 1%" in err
    assert "initial weights" not in run(*words, "--ema=0.2154")[2], "the advice works"


@pytest.fixture
def without_test(folder, tmp_path):
    """Class folders under train/ and val/, as of ImageNet and Imagenette."""
    for index, split in enumerate(("train", "val")):
        for path in sorted(folder.rglob("*.*"))[index::2]:
            target = tmp_path / "imagenette" / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path / "imagenette"


def test_without_test_images_validation_is_scored_aloud(without_test, run, tmp_path):
    sizes = "--image_shape=8", "--patch_shape=4", "--depth=1", "--dim=8", "--jit=false"
    data = "--dataset=folder", "--data_dir=imagenette"
    words = *data, *sizes, "--num_steps=1", "--export=false"
    status, out, err = run("train", *words, "--eval_split=test")
    assert status == 2
    assert "--eval_split=test: this dataset has no test split; give one of train, validation" in err
    assert run("train", *words, "--eval_split=validation")[0] == 0, "the advice works"

    status, out, err = run("train", *words, "--output_dir=run")
    assert status == 0, err
    assert "there are no test images: the validation images are scored, which have also cho" in err
    assert out.startswith("validation: ")
    assert "of 18 images" in out
    assert read_metrics(tmp_path / "run")[0].keys() == {"validation"}
    assert "is complete; nothing was changed" in run("train", *words, "--output_dir=run")[2]

    assert run("evaluate", "run")[1].startswith("validation: 18 images, top-1 ")
    assert "| – |" in run("report", "run")[1], "it has no test score"
    status, out, err = run(
        "fewshot", "run", *data, "--shots=2", "--l2=1,4", "--seeds=0", "--validation_fraction=0.2"
    )
    assert status == 0, err
    assert "the validation images are scored instead" in err
    assert "test: 18 images of 3 classes" in out
    assert "L2: 4 validation images" in out, "of the training images"


def test_a_sequence_prints_its_progress_and_repeats_no_finished_job(tmp_path, monkeypatch, capsys):
    clock = itertools.count(step=600)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    configs = [Config(**QUICK, export=False, output_dir=str(tmp_path / name)) for name in "ab"]
    sequence = jobs.JobSequence(3)
    first, _ = (sequence.run(config.output_dir[-1], config) for config in configs)
    said = capsys.readouterr().err.splitlines()
    assert "[1/3] a" in said
    assert "[2/3] b, about 20 min left if all take as long" in said
    before = files(tmp_path)
    assert jobs.JobSequence(3).run("a", configs[0]).scores == first.scores
    assert capsys.readouterr().err == ""
    assert files(tmp_path) == before


def test_warnings_of_retracing_are_silenced_during_a_job_alone(tmp_path, monkeypatch):
    logger = logging.getLogger("tensorflow")
    records = [
        logging.makeLogRecord({"msg": text}) for text in ("5 calls triggered retracing", "other")
    ]
    passed = []

    def stop(run, callbacks):
        passed.extend(bool(logger.filter(record)) for record in records)
        raise Interrupted(15)

    monkeypatch.setattr(fit_module, "fit_run", stop)
    before = list(logger.filters)
    with pytest.raises(Interrupted):
        jobs.JobSequence(1).run("a", Config(**QUICK, output_dir=str(tmp_path / "a")))
    assert passed == [False, True]
    assert logger.filters == before


def in_memory():
    """Counts what a run makes, by kind: Python's objects, and what TensorFlow has registered."""
    for _ in range(3):  # what has a finalizer is freed a pass later
        gc.collect()
    types = collections.Counter(map(type, gc.get_objects()))
    kinds = (FuncGraph, keras.Model, keras.Variable, keras.optimizers.Optimizer, tf.data.Dataset)
    counts = collections.Counter()
    for kind in kinds:
        counts[kind.__name__] = sum(n for type, n in types.items() if issubclass(type, kind))
    counts["functions"] = len(context.context().list_function_names())
    counts["gradients"] = len(ops.gradient_registry.list())
    return counts


def test_nothing_of_a_finished_run_stays_in_memory(tmp_path):
    """Of many runs in one process, each would take its weights and those of its optimizer."""
    references, counts = [], []

    class Witness(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            variables = self.model.variables + self.model.optimizer.variables
            handles = [variable.value.handle for variable in variables]
            references.extend(map(weakref.ref, [self.model, self.model.optimizer, *handles]))

    for name in "abc":  # what all runs share is made by the first, or by the second
        config = Config(**QUICK | {"jit": "auto", "export": False}, output_dir=f"{tmp_path}/{name}")
        run_job(config, [Witness()])
        counts.append(in_memory())
    assert len(references) > 3 * 20
    assert sum(reference() is not None for reference in references) == 0
    assert not counts[2] - counts[1], "more than after the run before"
