"""Tests `keras-mixer sweep`: spaces, what is tried and what is not, workers, tables, plots."""

import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from conftest import ROOT

from keras_mixer import InputError, RunError
from keras_mixer.errors import InUseError
from keras_mixer.runs.run import read_metrics
from keras_mixer.signals import Interrupted
from keras_mixer.studies import space, sweep, trials
from keras_mixer.studies.space import Choice, Range, parse_space

# === Spaces ===


def test_a_space_is_read():
    text = "learning_rate=1e-3..1e-2:log; dropout = 0, 0.1 ;depth=2..4; randaugment=2,9|2,15; "
    assert parse_space(text) == {
        "lr": Range(0.001, 0.01, True, False),
        "dropout": Choice(("0", "0.1")),
        "depth": Range(2, 4, False, True),
        "randaugment": Choice(("2,9", "2,15")),
    }
    joined = parse_space("dim + tokens_mlp_dim=8,16; weight_decay=0,0.1")
    assert joined == {"dim+tokens_mlp_dim": Choice(("8", "16")), "decay": Choice(("0", "0.1"))}
    assert parse_space("decay=0..0.5")["decay"] == Range(0.0, 0.5, False, False)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected what to vary"),
        ("lr=", "lr: expected values that differ"),
        ("lr=1,,2", "where one is empty"),
        ("lr=1,1", "where one is given twice"),
        ("dropuot=1,2", "received 'dropuot'; did you mean dropout?"),
        ("seed=1,2", "an option of train.py that changes the result"),
        ("lr=1,2;decay+lr=3,4", "lr is given twice"),
        ("lr+no=1,2", "received 'no'"),
        ("lr=2..1", "the smaller one first"),
        ("lr=0..1:log", "both positive with :log"),
        ("lr=1..2:lag", "a range of two numbers"),
        ("flip=0.1..0.9", "flip is no number, so it has no range"),
        ("dataset=digits,mnist", "nothing of the dataset"),
        ("lr=nan..1", "a range of two numbers"),
        ("depth=1.5..3", "a range of two integers"),
    ],
)
def test_what_is_no_space_is_refused(text, message):
    with pytest.raises(InputError) as caught:
        parse_space(text)
    assert message in str(caught.value)


def test_a_grid_has_every_combination_once():
    found = space.grid(parse_space("lr=1,2; dropout=0,0.1; batch_size=8,16,32"))
    assert len(found) == len({tuple(setting.values()) for setting in found}) == 12
    assert found[0] == {"lr": "1", "dropout": "0", "batch_size": "8"}
    assert found[1] == {"lr": "1", "dropout": "0", "batch_size": "16"}
    with pytest.raises(InputError, match="--sampler=grid: lr is a range"):
        space.grid(parse_space("lr=1..2; dropout=0,0.1"))


@pytest.mark.parametrize("name, middle", [("lr", 1e-3), ("decay", 0.5), ("depth", 2.5)])
def test_random_values_are_within_their_range_and_uniform(name, middle):
    values = parse_space("lr=1e-4..1e-2:log; decay=0..1; depth=1..4")[name]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sampled = [values.suggest(study.ask(), name) for _ in range(1000)]
    assert values.low <= min(sampled) and max(sampled) <= values.high
    assert 440 < sum(value < middle for value in sampled) < 560
    assert float(values.format_value(sampled[0])) == pytest.approx(sampled[0], rel=1e-3)


# === What is tried ===


class Jobs:
    """In place of `JobSequence`: runs take no time, and score 0.9 by their rate of 0.1."""

    def __init__(self, total, begun=0):
        self.total, self.begun = total, begun

    def run(self, name, config, callbacks=()):
        Jobs.called.append((config.lr, config.seed, config.eval_split))
        if outcome := Jobs.outcomes.get((config.lr, config.seed)):
            raise outcome
        top1 = {0.1: 0.9}.get(config.lr, 0.5) + config.seed / 100
        return SimpleNamespace(config=config, scores={"validation": {"top1": top1}})


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.setattr(sweep, "JobSequence", Jobs)
    monkeypatch.setattr(Jobs, "called", [], raising=False)
    monkeypatch.setattr(Jobs, "outcomes", {}, raising=False)
    monkeypatch.setattr(sweep, "HEARTBEAT", 1)
    monkeypatch.setattr(sweep, "GRACE", 2)
    return Jobs


def search(text="lr=0.01,0.1,1", sampler="grid", seeds=(0,), trials=4, prune=False, flags=()):
    return space.Search(parse_space(text), sampler, trials, seeds, prune, flags)


def study_of(search, folder):
    folder.mkdir(exist_ok=True)
    return sweep.open_study(search, folder, name="it")


def test_the_best_by_validation_is_scored_with_every_seed(jobs, tmp_path):
    it = search(seeds=(0, 1))
    result = sweep.sweep(it, study_of(it, tmp_path), tmp_path, (0, 1, 2))
    tried = [(lr, seed, "validation") for lr in (0.01, 0.1, 1.0) for seed in (0, 1)]
    assert jobs.called == [*tried, *((0.1, seed, None) for seed in (0, 1, 2))]
    assert [(t.setting["lr"], t.top1) for t in result.trials] == [
        ("0.1", pytest.approx(0.905)), ("0.01", pytest.approx(0.505)), ("1", pytest.approx(0.505)),
    ]  # fmt: skip
    assert len(result.runs) == 3
    sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    assert len(jobs.called) == 9, "nothing is tried twice"


def test_a_larger_search_goes_on_and_another_one_is_refused(jobs, tmp_path):
    small = search("lr=1e-3..1e-1:log", "random", trials=2)
    sweep.sweep(small, study_of(small, tmp_path), tmp_path)
    first = list(jobs.called)
    large = search("lr=1e-3..1e-1:log", "random", trials=5)
    result = sweep.sweep(large, study_of(large, tmp_path), tmp_path)
    assert jobs.called[:2] == first and len(jobs.called) == len(result.trials) == 5
    with pytest.raises(InputError) as caught:
        study_of(search("lr=1e-3..1:log", "tpe"), tmp_path)
    message = str(caught.value)
    was = "--study=it holds another search: --space was lr=0.001..0.1:log, now lr=0.001..1:log"
    assert was in message
    assert "--sampler was random, now tpe" in message
    assert "--seeds" not in message


def test_tpe_samples_near_the_best(jobs, tmp_path):
    it = search("lr=0.01,0.03,0.1,0.3,1", "tpe", trials=25)
    sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    rates = [lr for lr, _, _ in jobs.called]  # the first ten are random
    assert rates[10:].count(0.1) > 3 * rates[:10].count(0.1) and rates[10:].count(0.1) > 7


def test_more_trials_of_tpe_are_new_ones(jobs, tmp_path):
    for number in (2, 4, 5):
        it = search("lr=1e-3..1:log", "tpe", trials=number)
        sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    assert len({lr for lr, _, _ in jobs.called}) == 5


def test_random_settings_differ_if_there_are_enough():
    few = search("lr=0.1,0.2;dropout=0,0.1", "random", trials=9)
    assert len(few.settings) == 4
    more = search("lr=0.1,0.2;dropout=0..0.1", "random", trials=9).settings
    assert more[:3] == search("lr=0.1,0.2;dropout=0..0.1", "random", trials=3).settings


def test_a_failed_setting_is_told_and_ends_nothing(jobs, tmp_path, capsys):
    jobs.outcomes[0.01, 0] = RunError("the loss is not finite")
    jobs.outcomes[1.0, 0] = InputError("too large")
    it = search()
    result = sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    assert [(t.setting["lr"], t.state, t.error) for t in result.trials] == [
        ("0.1", "complete", ""),
        ("0.01", "failed", "the loss is not finite"),
        ("1", "failed", "too large"),
    ]
    assert "lr 1: failed: too large" in capsys.readouterr().err
    sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    assert len(jobs.called) == 3, "nor tried again"
    jobs.outcomes[0.1, 0] = RunError("no")
    with pytest.raises(
        RunError, match=r"no setting could be trained: the loss.*; too large; no|no"
    ):
        sweep.sweep(it, study_of(it, tmp_path / "new"), tmp_path)


def test_an_interrupted_setting_is_continued_by_the_next_call(jobs, tmp_path):
    jobs.outcomes[0.1, 1] = Interrupted(signal.SIGTERM)
    it = search(seeds=(0, 1))
    with pytest.raises(Interrupted):
        sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    jobs.outcomes.clear()
    result = sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    assert len(result.trials) == 3 and result.trials[0].top1 == pytest.approx(0.905)
    assert [lr for lr, _, _ in jobs.called] == [0.01, 0.01, 0.1, 0.1, 1.0, 1.0, 0.1, 0.1]


def test_a_setting_that_another_process_trains_is_waited_for(jobs, tmp_path, monkeypatch, caplog):
    """As when that worker was suspended, and its setting queued again."""
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: jobs.outcomes.clear())
    jobs.outcomes[0.1, 0] = InUseError("--output_dir=x is in use")
    it = search()
    result = sweep.sweep(it, study_of(it, tmp_path), tmp_path, (0,))
    assert [trial.state for trial in result.trials] == ["complete"] * 3
    assert [lr for lr, _, _ in jobs.called] == [0.01, 0.1, 0.1, 1.0, 0.1]
    assert caplog.text.count("waiting: --output_dir=x is in use") == 1


def test_a_worker_goes_on_after_its_setting_was_taken_over(jobs, tmp_path, monkeypatch):
    it, run = search(), jobs.run
    study = study_of(it, tmp_path)

    def run_and_lose(self, name, config, callbacks=()):
        if config.lr == 0.1 and len(jobs.called) == 1:  # its heartbeat was late
            [trial] = [t for t in study.trials if t.state.name == "RUNNING"]
            study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params, trial.user_attrs)
        return run(self, name, config, callbacks)

    monkeypatch.setattr(jobs, "run", run_and_lose)
    result = sweep.sweep(it, study, tmp_path)
    assert [trial.state for trial in result.trials] == ["complete"] * 3


def test_a_trial_that_was_not_queued_is_left(jobs, tmp_path):
    """Another worker took the last setting between the question and the answer."""
    it = search()
    study = study_of(it, tmp_path)
    worker = sweep._Worker(it, study, tmp_path)
    study.optimize(worker._train, n_trials=4, catch=RunError)
    assert len(jobs.called) == 3 == len(trials.list_trials(it, study, tmp_path))


def test_what_a_killed_worker_left_is_tried_again(jobs, tmp_path):
    it = search()
    study = study_of(it, tmp_path)
    with pytest.warns(UserWarning, match="Heartbeat"):
        left = study.ask()
    study._storage.record_heartbeat(left._trial_id)
    result = sweep.sweep(it, study, tmp_path)
    assert sorted(lr for lr, _, _ in jobs.called) == [0.01, 0.1, 1.0]
    assert len(result.trials) == 3


def test_settings_below_the_median_are_stopped(jobs, tmp_path, monkeypatch):
    def run(self, name, config, callbacks=()):
        [callback] = callbacks
        for epoch in range(3):
            callback.on_epoch_end(epoch, {"val_accuracy": config.lr * (epoch + 1)})
        return SimpleNamespace(scores={"validation": {"top1": config.lr * 3}})

    monkeypatch.setattr(jobs, "run", run)
    it = search("lr=0.1,0.11,0.12,0.13,0.14,0.01,0.2", prune=True)
    result = sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    states = {t.setting["lr"]: t.state for t in result.trials}
    assert states.pop("0.01") == "pruned"
    assert set(states.values()) == {"complete"}
    assert result.trials[0].setting == {"lr": "0.2"}
    assert result.trials[-1].top1 is None


def test_of_equally_good_settings_the_first_of_the_search_is_chosen(jobs, tmp_path):
    """Also if it was interrupted, and so tried last."""
    it = search("lr=0.2,0.3,0.4")
    jobs.outcomes[(0.2, 0)] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    jobs.outcomes.clear()
    result = sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    assert [trial.setting["lr"] for trial in result.trials] == ["0.2", "0.3", "0.4"]
    assert trials._ties(result.trials) == (
        " 3 are the best; the first of them in the search is taken."
    )
    assert trials._ties(result.trials[:1]) == ""


def test_runs_are_counted_once_though_they_were_interrupted(jobs, tmp_path):
    it = search("lr=0.2,0.3,0.4")
    jobs.outcomes[(0.3, 0)] = KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(it, study_of(it, tmp_path), tmp_path)
    worker = sweep._Worker(it, study_of(it, tmp_path), tmp_path)
    assert (worker.jobs.begun, worker.jobs.total) == (2, 3)


@pytest.mark.parametrize("behind", [0, 2, 3])
def test_a_continued_setting_is_pruned_by_all_of_its_epochs(tmp_path, behind):
    """As one that was never interrupted; what is finished only counts for the others."""
    accuracies = [0.9, 0.72, 0.74]
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
    for _ in range(5):
        trial = study.ask()
        for epoch, value in enumerate((0.6, 0.7, 0.8)):
            trial.report(value, epoch)
        study.tell(trial, 0.8)
    rows = [f"{epoch + 1},{accuracies[epoch]}\n" for epoch in range(behind)]
    if behind:
        (tmp_path / "history.csv").write_text("epoch,val_accuracy\n" + "".join(rows))
    trial = study.ask()
    pruning = sweep.pruning_callback(trial, tmp_path)
    pruning.on_train_begin()
    for epoch in range(behind, 3):
        pruning.on_epoch_end(epoch, {"val_accuracy": accuracies[epoch]})
    pruning.report_history()
    reported = study.get_trials()[-1].intermediate_values
    assert reported == dict(enumerate(accuracies))


def test_a_setting_that_is_no_folder_name():
    found = space.setting_folder(ROOT, {"variant": "S/16", "randaugment": "2,9"})
    assert found.parent == ROOT and "/" not in found.name


def test_databases_that_cannot_be_opened(tmp_path):
    for url in ("sqlite:////no/such/folder/study.db", "nothing", "postgresql+nodriver://host/x"):
        with pytest.raises(InputError, match="--storage: "):
            sweep.open_study(search(), tmp_path, url)
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(InputError, match="--storage: the database .* cannot be opened"):
        study_of(search(), tmp_path)


def test_the_database_is_in_the_folder_whatever_its_name(tmp_path):
    folder = tmp_path / "lr=1?mode=ro%41 {x}#y"
    study_of(search(), folder)
    assert (folder / "study.db").exists() and list(tmp_path.iterdir()) == [folder]


# === As a command ===

FLAGS = ["--depth=1", "--dim=8", "--batch_size=64", "--num_steps=2", "--jit=false"]


def test_command(run, tmp_path, monkeypatch):
    measured = SimpleNamespace(rate=1000.0, first_call=2.0)
    monkeypatch.setattr("keras_mixer.benchmark.measure.measure_training", lambda config: measured)
    space = "lr=0.1,0.001;optimizer=adam;tokens_mlp_dim+channels_mlp_dim=5"
    words = [f"--space={space}", "--output_dir=s", "--test_seeds=0,1"]
    words += ["--output=s.md", "--csv=s.csv", "--", *FLAGS]
    status, _, errors = run("sweep", *words)
    assert status == 0, errors
    # Three runs of 40 steps of 64 images: a seed of each setting, and another of the best.
    assert "settings: 2, seeds of each: 1; 120 steps, with" in errors
    assert "are scored: about 14 s" in errors
    text = (tmp_path / "s.md").read_text()
    assert text.startswith(
        "| lr | optimizer | tokens_mlp_dim+channels_mlp_dim | validation top-1 |"
    )
    assert (
        "**The best by validation, lr 0.1, optimizer adam, tokens_mlp_dim+channels_mlp_dim 5: "
        in text
    )
    assert text.splitlines()[2].startswith("| 0.1 | adam | 5 | ")
    assert "% of 360 test images, mean ± standard deviation over 2 seeds.**" in text
    assert f"Generated by `keras-mixer sweep '--space={space}'" in text
    others = "optimizer=adam,tokens_mlp_dim+channels_mlp_dim=5"
    directory = tmp_path / "s" / f"lr=0.1,{others}" / "seed-0"
    config = json.loads((directory / "config.json").read_text())["config"]
    assert (config["tokens_mlp_dim"], config["channels_mlp_dim"], config["dim"]) == (5, 5, 8)
    scores = {p.parent.name: read_metrics(p)[0] for p in (tmp_path / "s").glob("lr*/seed-0")}
    assert scores["lr=0.001," + others].keys() == {"validation"}
    assert scores["lr=0.1," + others].keys() == {"validation", "test"}
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [(row["lr"], row["seed"], row["epoch"]) for row in rows] == [
        ("0.1", "0", "1"), ("0.1", "0", "2"), ("0.001", "0", "1"), ("0.001", "0", "2"),
        ("0.1", "1", "1"), ("0.1", "1", "2"),
    ]  # fmt: skip
    plots = {path.stem for path in (tmp_path / "s" / "plots").iterdir()}
    assert plots == set(trials.PLOTS)

    status, table, _ = run("report", tmp_path / "s", f"--html={tmp_path / 'page'}")
    assert (status, table.count("--optimizer=adam ")) == (0, 2), "the folder stands for all runs"
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Scores on 360 test images" in page, "though its seed 0 was trained for validation"
    pictures = re.findall('<img src="data:image/svg.xml;base64,([^"]+)" width="([0-9]+)"', page)
    drawn = [(tmp_path / "s" / "plots" / f"{name}.svg").read_bytes() for name in trials.PLOTS]
    assert [base64.b64decode(content) for content, _ in pictures] == drawn
    assert all(100 < int(width) < 3000 for _, width in pictures)

    before = text
    status, _, errors = run("sweep", *words)
    assert (status, "epoch" in errors) == (0, False), "nothing is trained again"
    assert (tmp_path / "s.md").read_text() == before
    status, _, errors = run("sweep", "--space=lr=1,2", "--output_dir=s", "--", *FLAGS)
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds another search" in errors


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--space: expected what to vary"),
        (["--preset=digits"], "--preset is a flag of train: put it after --, as in keras-mixer sw"),
        (["--space=lr=1,2", "--output=no/s.md"], "its folder does not exist"),
        (["--space=lr=-1,-2"], "--lr: expected a number at most 1000.0 and above 0"),
        (["--space=lr=1,2", "--", "--batch_size=5000"], "--batch_size=5000"),
        (["--space=lr=1,2", "--", "--validation_fraction=0"], "there are none: give"),
        (["--space=lr=1,2", "--", "--seed=3"], "--seed after --: is set by the sweep"),
        (["--space=lr=1,2", "--", "--learning_rate=3"], "--lr after --: is in --space"),
        (["--space=lr=1,2", "--", "--output-dir=x"], "give --output_dir before --"),
        (["--space=lr=1,2", "--trials=3"], "a grid has all combinations"),
        (["--space=lr=1,2", "--csv=a", "--output=a"], "is the file of --output"),
        (["--space=lr=1,2", f"--output_dir={__file__}"], "a file is in the way"),
        (["--space=lr=1,2", "--storage=mysql://u:secret@h/x"], "needs another package"),
    ],
)
def test_bad_input_ends_in_one_line(run, words, message):
    status, out, errors = run("sweep", *words)
    assert (status, out) == (2, ""), errors
    assert message in errors.splitlines()[-1]


# === Several workers ===

RATES = ["0.1", "0.03", "0.01", "0.003", "0.001", "0.0003"]


@pytest.fixture
def postgresql():
    """The URL of a database in a server that lives as long as the test."""
    if not (binaries := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg")
    # As root it does not start, nor does another user see into a folder of the test.
    prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp())
    shutil.chown(folder, "postgres") if prefix else None

    def call(program, *words):
        command = [*prefix, binaries[-1].with_name(program), *words]
        subprocess.run(command, cwd="/", check=True, capture_output=True, timeout=60)

    call("initdb", "-D", folder / "data", "-A", "trust", "-U", "mixer")
    options = f"-k {folder} -h ''"  # no port: a socket in the folder
    call("pg_ctl", "-D", folder / "data", "-w", "-o", options, "-l", folder / "log", "start")
    yield f"postgresql+psycopg://mixer@/postgres?host={folder}"
    call("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_three_workers_one_of_them_killed_share_a_study_in_postgresql(tmp_path, postgresql):
    """No setting is lost, and none is trained to its end twice."""
    words = [f"--space=lr={','.join(RATES)}", f"--storage={postgresql}", "--output_dir=s"]
    words += ["--test_seeds=0", "--", *FLAGS[:3], "--num_steps=60", "--jit=false"]
    victim, *others = [
        subprocess.Popen(
            [sys.executable, "-m", "keras_mixer", "sweep", *words],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = []
    assert any(said.append(line) or line.startswith("epoch 3/") for line in victim.stderr), said
    victim.kill()
    victim.communicate()
    tables, errors = zip(*(worker.communicate(timeout=600) for worker in others), strict=True)
    assert [worker.returncode for worker in others] == [0, 0], errors
    assert tables[0] == tables[1]
    assert tables[0].count("| complete |") == 6
    storage = optuna.storages.RDBStorage(postgresql)
    study = optuna.load_study(study_name="sweep", storage=storage)
    done = [t.params["lr"] for t in study.trials if t.state.name == "COMPLETE"]
    assert sorted(done) == sorted(RATES)
    histories = list((tmp_path / "s").glob("lr*/seed-0/history.csv"))
    assert [len(path.read_text().splitlines()) for path in histories] == [61] * 6
    storage.engine.dispose()
