"""Tests `keras_mixer/jobs.py`: a whole job from a config to an export, and many of them."""

import dataclasses
import itertools
import json
import logging
import runpy
import shutil
import sys
from types import SimpleNamespace

import keras
import pytest
from conftest import ROOT

from keras_mixer import Config, jobs, run_job
from keras_mixer.config.options import as_flags
from keras_mixer.inference import evaluate as evaluate_module
from keras_mixer.training import fit as fit_module
from keras_mixer.training.signals import Interrupted

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
    assert run.facts == {"selected_epoch": 1, "saved_model": f"{config.export_dir}/mlp_mixer/1"}
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


def test_stopped_before_its_export_a_job_continues_with_that_alone(finished, tmp_path, monkeypatch):
    config, run = finished
    shutil.copytree(run.directory, tmp_path / "run")
    metrics = run.scores | {"facts": {"selected_epoch": 1}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    config = dataclasses.replace(config, output_dir=f"{tmp_path}/run", export_dir=str(tmp_path))
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trains again"))
    monkeypatch.setattr(evaluate_module, "evaluate_run", lambda *_: pytest.fail("scores again"))
    again = run_job(config)
    assert again.scores == run.scores
    assert again.facts["saved_model"] == f"{tmp_path}/mlp_mixer/1"
    assert (tmp_path / "mlp_mixer" / "1" / "saved_model.pb").is_file()


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

    def stop(run):
        passed.extend(bool(logger.filter(record)) for record in records)
        raise Interrupted(15)

    monkeypatch.setattr(fit_module, "fit_run", stop)
    before = list(logger.filters)
    with pytest.raises(Interrupted):
        jobs.JobSequence(1).run("a", Config(**QUICK, output_dir=str(tmp_path / "a")))
    assert passed == [False, True]
    assert logger.filters == before
