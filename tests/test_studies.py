"""Tests `keras_mixer/studies/resizing.py` and `transfer.py` on the digits."""

import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from keras_mixer import Config, InputError, load_mixer
from keras_mixer.commands.studies import _finetuning
from keras_mixer.data.datasets import AVG5
from keras_mixer.inference.evaluate import compute_logits
from keras_mixer.jobs import JobSequence
from keras_mixer.runs.run import read_history, read_metrics
from keras_mixer.signals import Interrupted
from keras_mixer.studies import transfer
from keras_mixer.studies.resizing import Shape, parse_shape, study_resizing
from keras_mixer.studies.transfer import (
    FINE_TUNED,
    SCRATCH,
    Result,
    as_table,
    study_transfer,
)
from keras_mixer.training import fit as fit_module
from keras_mixer.weights.registry import Published


def config_of(directory):
    return json.loads((directory / "config.json").read_text())["config"]


@pytest.fixture
def no_training(monkeypatch):
    """Once called, makes every training fail."""

    def fail(run, callbacks):
        pytest.fail(f"trains {run.directory}")

    return lambda: monkeypatch.setattr(fit_module, "fit_run", fail)


@pytest.fixture
def counted(monkeypatch):
    """The names of the runs that were trained, in order; the one at `stop_at` is stopped."""
    trained, real = SimpleNamespace(names=[], stop_at=None), fit_module.fit_run

    def fit_run(run, callbacks):
        trained.names.append(run.directory.name)
        if len(trained.names) == trained.stop_at:
            raise Interrupted(15)
        real(run, callbacks)

    monkeypatch.setattr(fit_module, "fit_run", fit_run)
    return trained


# === Resizing ===


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("56/4", Shape((56, 56), (4, 4))),
        ("56x28/4", Shape((56, 28), (4, 4))),
        ("12x10/3x2", Shape((12, 10), (3, 2))),
    ],
)
def test_shapes_are_read(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["56", "56/", "56x/4", "-8/2", "a/b", "8/2/1"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(InputError, match="expected image/patch such as 56/8"):
        parse_shape(text)


def test_resizing_measures_before_and_after_training(trained, tmp_path, no_training):
    shapes = [parse_shape("16/2")]
    table = study_resizing([trained.directory], shapes, 1, tmp_path)
    before = f"{100 * trained.scores['test']['top1']:.2f}"
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[4:5]]
    assert "Test top-1 in percent, of 1 run trained with --flip=true, --crop_padding=1." in table
    assert f"As trained, on 8×8 / 2×2: {before}." in table
    assert rows[0][:2] == ["16×16 / 2×2", "8×8"]

    model = load_mixer(trained.directory, (16, 16), (2, 2), "tile")
    logits, labels = compute_logits(model, model.spec, trained.dataset.test)
    assert rows[0][3] == f"{100 * (logits.argmax(axis=1) == labels).mean():.2f}"

    folder = tmp_path / trained.directory.name
    for row, column, name in [(0, 4, "interpolate"), (0, 5, "tile"), (0, 6, "scratch")]:
        metrics = json.loads((folder / f"16x16-2x2-{name}" / "metrics.json").read_text())
        assert rows[row][column] == f"{100 * metrics['test']['top1']:.2f}"

    arms = {name: config_of(folder / f"16x16-2x2-{name}") for name in ("interpolate", "scratch")}
    assert arms["interpolate"]["checkpoint"] == str(trained.directory)
    assert arms["scratch"]["checkpoint"] is None
    aside = ("checkpoint", "resize_tokens", "output_dir")
    one, other = ({k: v for k, v in arm.items() if k not in aside} for arm in arms.values())
    assert one == other, "the same sizes, recipe and budget"

    no_training()
    assert study_resizing([trained.directory], shapes, 1, tmp_path) == table
    both = [*shapes, parse_shape("12/2")]
    *_, header, _, first, second = (
        study_resizing([trained.directory], both, 0, tmp_path).split("\n\nWhere")[0].splitlines()
    )
    assert header.endswith("| untrained: tiled |"), "without training only these"
    assert first.split("|")[1:5] == table.splitlines()[4].split("|")[1:5]
    assert second.startswith("| 12×12 / 2×2 | 6×6 | ")
    assert second.endswith("| – |"), "not a whole multiple of 4×4"


def test_resizing_refuses_before_it_trains(trained, tmp_path, no_training):
    no_training()
    with pytest.raises(InputError, match="patch_shape=2,2 does not divide image_shape=9,9"):
        study_resizing([trained.directory], [parse_shape("8/2"), parse_shape("9/2")], 1, tmp_path)
    with pytest.raises(InputError, match="not a run directory"):
        study_resizing([tmp_path], [parse_shape("8/2")], 1, tmp_path)
    twice = [trained.directory, trained.directory.parent / "." / trained.directory.name]
    with pytest.raises(InputError, match="given twice"):
        study_resizing(twice, [parse_shape("8/2")], 1, tmp_path)


# === Transfer ===


@pytest.fixture
def preset(trained):
    return Config(
        checkpoint=str(trained.directory), batch_size=64, num_steps=2, optimizer="adamw",
        jit="false",
    )  # fmt: skip


def test_transfer_chooses_on_held_out_images_and_tests_once(preset, tmp_path, counted):
    arguments = {("digits", FINE_TUNED): preset}, [1e-5, 0.01], [3, 4], tmp_path, True
    counted.stop_at = 2
    with pytest.raises(Interrupted):
        study_transfer(*arguments)
    counted.stop_at = None
    [tuned, scratch] = study_transfer(*arguments)
    whole = ["lr-1e-05", "lr-0.01", "lr-0.01-seed-3", "lr-0.01-seed-4"] * 2
    assert counted.names == [*whole[:2], *whole[1:]], "what was finished is not trained again"
    assert [tuned.start, scratch.start] == [FINE_TUNED, SCRATCH]
    for result in (tuned, scratch):
        folder = tmp_path / "digits" / result.start.replace(" ", "-")
        for lr, top1 in result.choice.items():
            assert read_metrics(folder / f"lr-{lr:g}")[0].keys() == {"validation"}
            assert float(read_history(folder / f"lr-{lr:g}")[-1]["val_accuracy"]) == top1
        assert result.choice[result.lr] == max(result.choice.values())
        assert [run.config.seed for run in result.runs] == [3, 4]
        assert {run.config.lr for run in result.runs} == {result.lr}
        assert all(run.dataset.validation is None for run in result.runs)
        assert all(len(run.dataset.train) == 1437 for run in result.runs)
        assert result.scores("top1") == [100 * r.scores["test"]["top1"] for r in result.runs]
    assert tuned.runs[0].config.checkpoint
    assert scratch.runs[0].config.checkpoint is None
    sizes = ("depth", "dim", "num_steps", "batch_size", "image_shape", "tokens_mlp_dim")
    for name in sizes:
        assert getattr(tuned.runs[0].config, name) == getattr(scratch.runs[0].config, name)
    assert min(tuned.scores("top1")) > max(scratch.scores("top1")), "it starts from better weights"
    assert as_table(study_transfer(*arguments), {}) == as_table([tuned, scratch], {})
    assert len(counted.names) == 9


@pytest.mark.parametrize("own_split", [False, True])
def test_learning_rates_are_compared_by_the_weights_that_final_runs_keep(
    folder, tmp_path, monkeypatch, own_split
):
    """The last ones; those of the best epoch if the data have a validation split of their own."""
    if own_split:
        for split in ("train", "val", "test"):
            shutil.copytree(folder, tmp_path / "split" / split)
    (tmp_path / "history.csv").write_text("epoch,val_accuracy\n1,0.75\n2,0.5\n")
    run = SimpleNamespace(directory=tmp_path, scores={"validation": {"top1": 0.75}})
    monkeypatch.setattr(transfer.JobSequence, "run", lambda self, name, config: run)
    data = tmp_path / "split" if own_split else folder
    config = Config(dataset="folder", data_dir=str(data))
    result = transfer._train_arm(JobSequence(3), ("x", FINE_TUNED), config, [1, 2], [0], tmp_path)
    assert set(result.choice.values()) == {0.75 if own_split else 0.5}


def test_one_learning_rate_leaves_nothing_to_choose(preset, tmp_path, counted):
    [result] = study_transfer({("p", FINE_TUNED): preset}, [0.01], [0], tmp_path)
    assert result.choice == {}
    assert counted.names == ["lr-0.01-seed-0"]
    more = study_transfer({("p", FINE_TUNED): preset}, [0.01, 1e-5], [0], tmp_path)[0]
    assert counted.names[1:] == ["lr-0.01", "lr-1e-05"], "a larger grid keeps what was trained"
    assert more.scores("top1") == result.scores("top1")


def test_transfer_refuses_before_it_trains(preset, tmp_path, no_training):
    no_training()
    other = {"checkpoint": str(tmp_path / "none"), "batch_size": 64}
    arms = {("a", FINE_TUNED): preset, ("b", FINE_TUNED): Config(**other)}
    with pytest.raises(InputError, match="no such checkpoint"):
        study_transfer(arms, [0.1], [0], tmp_path)
    without = Config(checkpoint=preset.checkpoint, batch_size=64, validation_fraction=0.0)
    arms = {("a", FINE_TUNED): preset, ("b", FINE_TUNED): without}
    with pytest.raises(InputError, match=r"b: no images are held out.*--lrs=0.1,0.2"):
        study_transfer(arms, [0.1, 0.2], [0], tmp_path)


def result_of(dataset, *scores):
    """A result with the given top-1 per seed, and 10 points more of top-5."""
    images = SimpleNamespace(train=range(1000), split={"test": range(100)}.get)
    runs = [
        SimpleNamespace(
            config=SimpleNamespace(dataset=dataset, seed=seed, eval_split="test"),
            dataset=images,
            directory=None,
            scores={"test": {"top1": top1, "top5": top1 + 0.1}},
        )
        for seed, top1 in enumerate(scores)
    ]
    return Result(dataset, FINE_TUNED, {0.01: 0.5, 0.03: 0.75, 0.1: 0.6}, 0.03, runs)


def test_avg5_is_the_mean_of_five_sets_within_each_seed(monkeypatch):
    monkeypatch.setattr("keras_mixer.studies.transfer.made_on", lambda directories: [])
    scores = [(0.1 * i, 0.1 * i + 0.02) for i in range(1, 6)]
    results = [result_of(name, *pair) for name, pair in zip(AVG5, scores, strict=True)]
    published = {
        "cifar10": Published(0.9682, "a paper", ""), "avg5": Published(0.925, "its Table 3", ""),
    }  # fmt: skip
    lines = as_table(results, {FINE_TUNED: published}).splitlines()
    assert lines[3] == (
        f"| cifar10 | fine-tuned | 1,000, 100 | 0.03 | 21.00 ± {statistics.stdev([20, 22]):.2f} | "
        "31.00 ± 1.41 | 96.82 |"
    )
    assert lines[7] == "| Avg-5 | fine-tuned |  |  | 31.00 ± 1.41 | 41.00 ± 1.41 | 92.50 |"
    choice = "cifar10, fine-tuned, validation top-1 by lr, seed 0: 0.01: 50.00, 0.03: 75.00, "
    assert f"{choice}0.1: 60.00; chosen: 0.03." in lines
    del results[1].choice[0.1]
    ended = f"{choice[:-2]}; chosen: 0.03, at the end of what was tried."
    assert ended in as_table(results, {}).splitlines()
    assert "Published avg5: its Table 3." in lines
    four = as_table(results[1:], {FINE_TUNED: published}).splitlines()
    assert four[6].startswith("| mean of 4 | fine-tuned |")
    assert "92.50" not in four[6]


# === As commands ===


def test_transfer_compares_checkpoints(run, trained, tmp_path):
    """One table, a row for each; models of one architecture are trained from scratch once."""
    assert run("convert", trained.directory, "one.safetensors")[0] == 0
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    (tmp_path / "mine.flags").write_text("--batch_size=64\n--jit=false\n")
    words = ["--checkpoint=one.safetensors,two.safetensors", "--datasets=mine.flags", "--seeds=0"]
    words += ["--lrs=0.01", "--scratch", "--output=t.md", "--", "--num_steps=1"]
    status, _, err = run("transfer", *words)
    assert status == 0, err
    rows = [line.split(" | ") for line in (tmp_path / "t.md").read_text().splitlines()[2:5]]
    starts = ["one.safetensors", "two.safetensors", "from scratch, as one.safetensors"]
    assert [row[1] for row in rows] == starts
    assert rows[0][4] == rows[1][4] > rows[2][4], "the same weights"
    folders = {path.name for path in (tmp_path / "runs" / "transfer" / "mine").iterdir()}
    assert folders == {*starts[:2], "from-scratch,-as-one.safetensors"}


def test_data_dir_is_for_datasets_in_files_whose_flagfile_has_none(tmp_path, monkeypatch):
    """--data_dir after -- is not for embedded images, nor for a flagfile with its own."""
    monkeypatch.chdir(tmp_path)
    Path("birds.flags").write_text("--dataset=folder\n--data_dir=birds\n")
    Path("photos.flags").write_text("--dataset=folder\n")
    Path("small.flags").write_text("--dataset=digits\n")
    extra = ["--data_dir", "elsewhere", "--num_steps=3"]
    configs = [_finetuning(f"{name}.flags", extra) for name in ("birds", "photos", "small")]
    assert [config.data_dir for config in configs] == ["birds", "elsewhere", None]
    assert {config.num_steps for config in configs} == {3}


def test_transfer_from_an_official_file_to_other_images_and_patches(run, trained, tmp_path):
    assert run("convert", trained.directory, "start.npz")[0] == 0
    (tmp_path / "mine.flags").write_text(
        "--image_shape=12\n--patch_shape=3\n--batch_size=64\n--num_steps=9\n--jit=false\n"
    )
    words = "--checkpoint=start.npz --datasets=mine.flags --seeds=1 --lrs=0.1 --output=t.md"
    words += " -- --num_steps=1 --flip"
    status, _, err = run("transfer", *words.split())
    assert status == 0, err
    text = (tmp_path / "t.md").read_text()
    assert "| mine | fine-tuned | 1,437, 360 | 0.1 |" in text
    assert text.endswith(f"`keras-mixer transfer {words}`.\n")
    config = config_of(tmp_path / "runs" / "transfer" / "mine" / "fine-tuned" / "lr-0.1-seed-1")
    assert (config["num_steps"], config["flip"], config["image_shape"]) == (1, True, [12, 12])
    assert "patch kernels resampled" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("transfer", "--checkpoint: expected the weights to start from"),
        (
            "transfer --checkpoint=x --datasets=photos -- --learning_rate=0.5",
            "--lr after --: is one of --lrs; leave it out there",
        ),
        (
            "transfer --checkpoint=x --datasets=photos -- --seed=7",
            "--seed after --: is set by transfer for every run; leave it out there, and give --see",
        ),
        (
            "transfer --checkpoint=x --datasets=birds",
            "--datasets=birds: expected a path that ends in .flags, or one of cifar10, ",
        ),
        ("resizing", "expected at least one RUN"),
        ("resizing x --shapes=8", "--shapes: expected image/patch such as 56/8"),
        ("resizing x --output=no/where.md", "--output=no/where.md: its folder does not"),
    ],
)
def test_studies_report_bad_input_in_one_line(run, line, message):
    status, out, err = run(*line.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")


@pytest.mark.slow
def test_resizing_as_a_command(run, trained, tmp_path):
    status, _, err = run("resizing", trained.directory, "--shapes=8/2", "--output=r.md")
    assert status == 0, err
    text = (tmp_path / "r.md").read_text()
    before = f"{100 * trained.scores['test']['top1']:.2f}"
    assert f"| 8×8 / 2×2 | 4×4 | {before} | – |" in text, "the same shape is the same model"
    assert f"Generated by `keras-mixer resizing {trained.directory} --shapes=8/2" in text
