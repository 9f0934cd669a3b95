"""Tests `keras_mixer/reports/report.py`: a table of finished runs."""

import csv
import shutil
import statistics

import pytest
from conftest import rewrite

import keras_mixer
from keras_mixer import InputError
from keras_mixer.files import write_sealed
from keras_mixer.reports.experiments import read_experiments
from keras_mixer.runs.run import FORMAT

DATA = "photos: 1,000, 20, 30"
ENVIRONMENT = {"cpu": "a CPU", "cores": "2", "python": "3", "tensorflow": "2", "keras": "3"}


def tabulate(directories):
    return keras_mixer.report(directories).table


@pytest.fixture
def runs(tmp_path):
    """Five finished runs: three seeds of one experiment, and one run of each of two others."""
    made = []
    for index, (flags, top1) in enumerate(
        [
            (["--dim=8", "--seed=1"], 0.9),
            (["--dim=8", "--seed=2"], 0.92),
            (["--dim=8", "--output_dir=x"], 0.97),
            (["--dim=16"], 0.5),
            ([], 0.25),
        ]
    ):
        run = tmp_path / str(index)
        run.mkdir()
        config = {"dataset": "folder", "data_dir": "/data/photos", "seed": index}
        images = {"train": 1000, "validation": 20, "test": 30}
        record = {
            "format": FORMAT, "config": config, "data": {"identity": "", "images": images},
            "environment": ENVIRONMENT,
        }  # fmt: skip
        write_sealed(run / "config.json", record)
        (run / "flags.txt").write_text("".join(f"{flag}\n" for flag in flags))
        scores = {"validation": {"top1": top1 - 0.01}, "test": {"top1": top1}}
        write_sealed(run / "metrics.json", scores)
        with open(run / "history.csv", "w") as file:
            writer = csv.DictWriter(file, ["epoch", "seconds"])
            writer.writeheader()
            writer.writerows({"epoch": e, "seconds": 1.5 + index} for e in range(4))
        made.append(run)
    return made


def test_seeds_of_an_experiment_share_a_row(runs):
    table = tabulate(runs).splitlines()
    std = f"{statistics.stdev([90, 92, 97]):.2f}"
    assert table[2] == f"| `--dim=8` | {DATA} | 3 | 92.00 ± {std} | 93.00 ± {std} | 4 | 10 s |"
    assert table[3] == f"| `--dim=16` | {DATA} | 1 | 49.00 | 50.00 | 4 | 18 s |"
    assert table[4].startswith(f"| `the defaults` | {DATA} | 1 |")
    assert table[-3].startswith("Accuracy in percent, mean ± sample standard deviation")
    assert table[-1] == "Made on a CPU, 2 cores, Python 3, TensorFlow 2, Keras 3."


def test_from_python_a_report_is_data(runs, tmp_path):
    made = keras_mixer.report(
        [*runs[:3], runs[4]], output=tmp_path / "t.md", plot=tmp_path / "p.png"
    )
    first, last = made
    assert first["experiment"] == "--dim=8" and first["data"] == DATA
    assert (first["runs"], first["directories"]) == (3, list(map(str, runs[:3])))
    assert first["test_mean"] == pytest.approx(0.93)
    assert first["test_std"] == pytest.approx(statistics.stdev([0.9, 0.92, 0.97]))
    assert (last["validation_mean"], last["validation_std"]) == (0.24, None)
    assert (first["min_epochs"], first["max_epochs"], first["seconds"]) == (4, 4, 10)
    text = (tmp_path / "t.md").read_text()
    assert text.startswith(str(made)) and f"--plot={tmp_path}/p.png`" in text
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert keras_mixer.report(runs[0]) == keras_mixer.report([str(runs[0])])
    for wrong in (
        {"plot": "p.doc"},
        {"html": runs[0] / "flags.txt"},
        {"output": tmp_path / "no/t"},
    ):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}="):
            keras_mixer.report(runs, **wrong)


def test_one_core_is_one(runs):
    rewrite(runs[0] / "config.json", lambda record: record["environment"].update(cores=1))
    assert tabulate(runs[:1]).endswith("Made on a CPU, 1 core, Python 3, TensorFlow 2, Keras 3.\n")


def test_other_data_get_a_row_of_their_own_and_a_run_counts_once(runs):
    rewrite(runs[2] / "config.json", lambda record: record["data"].update(identity="other"))
    table = tabulate([*runs, runs[0], runs[0] / ".." / "1"]).splitlines()
    assert table[2].startswith(f"| `--dim=8` | {DATA} | 2 |")
    assert table[3].startswith(f"| `--dim=8` | {DATA} | 1 |")


def test_unfinished_runs_are_named_and_left_out(runs, capsys):
    (runs[1] / "metrics.json").unlink()
    (runs[4] / "config.json").unlink()
    table = tabulate(runs)
    assert f"| `--dim=8` | {DATA} | 2 |" in table
    assert "the defaults" not in table
    assert capsys.readouterr().err.splitlines() == [
        f"{runs[1]}: left out: no finished run (it holds no metrics.json)",
        f"{runs[4]}: left out: no finished run (it holds no config.json)",
    ]
    with pytest.raises(InputError, match="none of the directories holds a finished run"):
        tabulate([runs[1], runs[4]])


def test_damaged_runs_are_named_and_left_out(runs, capsys):
    lines = (runs[0] / "history.csv").read_text().splitlines()
    (runs[0] / "history.csv").write_text("\n".join([*lines[:3], "2"]))
    (runs[1] / "history.csv").write_text("epoch,lr\n1,2\nx,y,z\n")
    (runs[2] / "metrics.json").write_text('{"test": {"top1": 0.')
    (runs[3] / "config.json").write_text("[]")
    assert tabulate(runs).count("| `") == 1
    warned = capsys.readouterr().err.splitlines()
    assert warned[:2] == [f"{run}: left out: {run}/history.csv: damaged" for run in runs[:2]]
    assert warned[2].startswith(f"{runs[2]}: left out: {runs[2]}/metrics.json: damaged")
    assert warned[3].startswith(f"{runs[3]}: left out: {runs[3]}/config.json: damaged, or was not")


OTHER_VALUES = {
    "no data": ("config.json", lambda record: record.pop("data")),
    "no identity": ("config.json", lambda record: record["data"].pop("identity")),
    "unhashable": ("config.json", lambda record: record["config"].update(seed=[1])),
    "no options": ("config.json", lambda record: record.update(config=[1])),
    "no folder": ("config.json", lambda record: record["config"].update(data_dir=3)),
    "words": ("config.json", lambda record: record["data"]["images"].update(train="many")),
    "no machine": ("config.json", lambda record: record["environment"].pop("cores")),
    "no accuracy": ("metrics.json", lambda scores: scores["test"].pop("top1")),
    "text": ("metrics.json", lambda scores: scores["test"].update(top1="0.9")),
    "no scores": ("metrics.json", lambda scores: scores.update(test=0.9)),
    "no seals": ("metrics.json", lambda scores: scores.update(seals=[])),
}


@pytest.mark.parametrize(("name", "change"), OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_runs_with_other_values_are_named_and_left_out(runs, capsys, name, change):
    rewrite(runs[1] / name, change)
    assert f"| `--dim=8` | {DATA} | 2 |" in tabulate(runs)
    (warned,) = capsys.readouterr().err.splitlines()
    assert warned.startswith(f"{runs[1]}: left out: ") and name in warned


def test_runs_of_a_sweep_that_were_scored_later_share_a_row(runs):
    """The sweep scores the first seed on validation images, and on the test images at the end."""
    with open(runs[0] / "flags.txt", "a") as file:
        file.write("--eval_split=validation\n")
    assert f"| `--dim=8` | {DATA} | 3 |" in tabulate(runs)
    write_sealed(runs[0] / "metrics.json", {"validation": {"top1": 0.5}})
    table = tabulate(runs).splitlines()
    assert f"| `--dim=8` | {DATA} | 1 | 50.00 | – | 4 | 6 s |" in table
    assert any(line.startswith(f"| `--dim=8` | {DATA} | 2 |") for line in table)


def test_the_same_seed_twice_is_said(runs, tmp_path, capsys):
    shutil.copytree(runs[0], tmp_path / "copy")
    tabulate([runs[0], tmp_path / "copy"])
    assert capsys.readouterr().err == "2 runs of --dim=8 have the same seed, 0\n"


def test_names_do_not_break_the_table(runs):
    (runs[0] / "flags.txt").write_text("--checkpoint=a|b`c\n")
    row = tabulate(runs[:1]).splitlines()[2]
    assert row.startswith("| `` --checkpoint=a\\|b`c `` | ")


def test_report_of_a_real_run(command, trained, tmp_path):
    done = command(trained.directory, "--output=table.md", verb="report")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert f"{100 * trained.scores['test']['top1']:.2f}" in text
    assert "Generated by `keras-mixer report" in text


def test_epochs_of_early_stopped_seeds_are_a_range(runs):
    lines = (runs[0] / "history.csv").read_text().splitlines()
    (runs[0] / "history.csv").write_text("\n".join(lines[:3]) + "\n")
    assert "| 2–4 |" in tabulate(runs[:3])


def test_flags_that_change_no_result_do_not_separate_runs(runs):
    with open(runs[1] / "flags.txt", "a") as file:
        file.write("--tensorboard=true\n--labels=x.csv\n")
    assert f"| `--dim=8` | {DATA} | 3 |" in tabulate(runs)


def test_labels_are_the_words_that_differ(runs):
    names = ["--dim=4 --lr=1", "--dim=8 --lr=1", "--lr=1"]
    for run, name in zip(runs, names, strict=False):
        (run / "flags.txt").write_text(name.replace(" ", "\n"))
    labels = [experiment.label for experiment in read_experiments(runs[:3])]
    assert labels == [["--dim=4"], ["--dim=8"], ["common flags only"]]
    assert read_experiments(runs[:1])[0].label == ["--dim=4", "--lr=1"], "of one, all of them"


PRESET = ["--dataset=mnist", "--dim=8", "--ema=0.98", "--mixup=0.1"]


@pytest.mark.parametrize(
    "preset, flags, name",
    [
        ("p", PRESET, "--preset=p"),
        ("p", [*PRESET[:2], "--ema=0.5", "--lr=0.1", "--seed=3"],
         "--preset=p --mixup=0.0 --ema=0.5 --lr=0.1"),
        ("p", PRESET[2:], "--preset=p --dataset=digits"),
        ("gone", ["--ema=0.5"], "--ema=0.5"),
        (None, PRESET, " ".join(PRESET)),
    ],
)  # fmt: skip
def test_runs_are_named_by_their_preset_and_what_differs(
    runs, tmp_path, monkeypatch, preset, flags, name
):
    (tmp_path / "flags").mkdir()
    (tmp_path / "flags" / "p.flags").write_text("\n".join(PRESET))
    monkeypatch.setattr("keras_mixer.config.presets._PACKAGE", tmp_path)
    (runs[0] / "flags.txt").write_text("".join(f"{flag}\n" for flag in flags))
    rewrite(runs[0] / "config.json", lambda record: record.update(preset=preset))
    assert read_experiments(runs[:1])[0].name == name
