"""Tests the command line as users meet it: `train.py` and `keras-mixer VERB` in processes."""

import json
import re
import shutil

import pytest

from keras_mixer import __main__ as cli
from keras_mixer.config.options import describe
from keras_mixer.commands import weights
from keras_mixer.commands import few_shot
from keras_mixer.commands import models
from keras_mixer.commands import shared
from keras_mixer.commands import studies
from keras_mixer.commands import training

QUICK = ["--depth=2", "--dim=8", "--batch_size=64", "--num_steps=2", "--jit=false"]


def test_the_main_job_from_nothing_to_a_saved_model(command, tmp_path):
    done = command(*QUICK, "--scheduler", "cosine", "--lr", "0.1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"test: \d+\.\d\d% of 360 images", done.stdout)
    assert (tmp_path / "saved_models" / "mlp_mixer" / "1" / "saved_model.pb").is_file()
    for name in ("flags.txt", "config.json", "history.csv", "metrics.json", "best/model.json"):
        assert (tmp_path / "output" / name).is_file()
    assert "epoch 2/2" in done.stderr
    assert not re.search(r"^[IWE]0000|oneDNN|cuInit", done.stderr, re.M), "no chatter"

    again = command(*QUICK, "--scheduler", "cosine", "--lr", "0.1")
    assert again.returncode == 0
    assert "is complete; nothing was changed" in again.stderr
    assert again.stdout == done.stdout
    assert not (tmp_path / "saved_models" / "mlp_mixer" / "2").exists()

    repeated = command("--flagfile=output/flags.txt", "--output_dir=new", "--export=false")
    assert repeated.returncode == 0
    metrics = [json.loads((tmp_path / d / "metrics.json").read_text()) for d in ("output", "new")]
    assert metrics[0]["test"] == metrics[1]["test"]

    (tmp_path / "output" / "metrics.json").unlink()  # as if killed after the last checkpoint
    rescued = command(*QUICK, "--scheduler", "cosine", "--lr", "0.1", "--export=false")
    assert rescued.returncode == 0, rescued.stderr
    assert (
        json.loads((tmp_path / "output" / "metrics.json").read_text())["test"]
        == (metrics[0]["test"])
    )


BAD = {
    "misspelt flag": (["--depht=3"], "did you mean: depth"),
    "stray argument": (["flags/digits.flags"], "presets --flagfile=flags/digits.flags"),
    "patch": (["--patch_shape=3"], "--patch_shape=3,3 does not divide --image_shape=8,8"),
    "classes": (["--num_classes=7"], "the data hold 10 classes"),
    "zero": (["--batch_size=0"], "--batch_size: expected an integer at least 1"),
    "negative": (["--lr=-1"], "--lr: expected a number"),
    "nan": (["--lr=nan"], "--lr: expected a finite number, received nan"),
    "inf": (["--decay=inf"], "--decay: expected a finite number, received inf"),
    "empty": (["--depth="], "--depth: expected an integer, received nothing"),
    "missing folder": (["--dataset=folder", "--data_dir=nowhere"], "no such folder"),
    "empty folder": (["--dataset=folder", "--data_dir=empty"], "holds 0 class folders"),
    "missing labels": (["--dataset=csv", "--data_dir=empty"], "labels.csv: no such file"),
    "missing files": (["--dataset=mnist", "--data_dir=idx"], "expected the file train-images"),
    "unreadable": (["--dataset=folder", "--data_dir=broken"], "b/x.jpg (not a JPEG, PNG, BMP"),
    "no checkpoint": (["--checkpoint=nowhere"], "nowhere: no such checkpoint"),
    "warm-up": (["--warmup_step=40"], "--warmup_step=40 must be below --num_steps=30"),
    "file in the way": (["--output_dir=file"], "a file is in the way"),
    "another run": (["--output_dir=run", "--lr=0.5"], "--lr was 0.001, now 0.5"),
}


@pytest.fixture(scope="module")
def without_tensorflow(tmp_path_factory):
    """A folder of modules that fail loudly when TensorFlow, Keras or JAX are imported."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for name in ("tensorflow", "keras", "jax"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """A folder with everything that can be wrong in it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("place")
    (folder / "empty").mkdir()
    (folder / "idx").mkdir()
    (folder / "idx" / "t10k-labels-idx1-ubyte").write_text("")
    (folder / "file").write_text("")
    for name in ("a", "b"):
        (folder / "broken" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "broken" / name / "good.png")
    (folder / "broken" / "b" / "x.jpg").write_text("hello")
    (folder / "run").mkdir()
    record = json.loads((trained.directory / "config.json").read_text())
    record["config"] |= {"lr": 0.001}
    (folder / "run" / "config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2_before_tensorflow_starts(
    command, place, without_tensorflow, arguments, message
):
    done = command(*arguments, cwd=place, path=without_tensorflow)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message.lower() in lines[0].lower()
    assert done.stdout == ""


def test_help_shows_every_flag_and_exits_0(command, without_tensorflow):
    done = command("--help", path=without_tensorflow)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--warmup_step" in done.stdout
    assert "(default: 0.001)" in done.stdout


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_each_verb_has_its_own_flags_and_help(command, verb):
    done = command("--help", verb=verb)
    assert done.returncode == 0
    assert f"usage: keras-mixer {verb}" in done.stdout
    foreign = "--top_k=3" if verb in ("train", "preview") else "--depth=3"
    refused = command("x", foreign, verb=verb)
    assert refused.returncode == 2
    assert "unknown command line flag" in refused.stderr


def test_every_verb_is_in_the_table():
    public = [
        getattr(module, name)
        for module in (checkpoints, fewshot, models, studies, training)
        for name in vars(module)
        if name[0].islower()
    ]
    written = {f for f in public if getattr(f, "__module__", "").startswith(shared.__package__)}
    written = {f for f in written if f.__module__ != shared.__name__}
    assert written == {verb.run for verb in cli.COMMANDS.values()}


def test_overview_and_unknown_verbs(command, without_tensorflow):
    done = command(verb="--help", path=without_tensorflow)
    assert done.returncode == 0
    for verb in cli.COMMANDS:
        assert f"  {verb}" in done.stdout
    refused = command(verb="evaluat")
    assert refused.returncode == 2
    assert "did you mean evaluate?" in refused.stderr


def test_evaluate_predict_and_export_a_run(command, trained, tmp_path, write_image):
    run = trained.directory
    done = command(run, "--format=json", "--output=scores.json", verb="evaluate")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert scores["top1"] == trained.metrics()["test"]["top1"]
    assert "precision" in command(run, "--eval_split=validation", verb="evaluate").stdout

    write_image(tmp_path / "in" / "a.png", trained.dataset.test.images[0])
    (tmp_path / "in" / "b.png").write_text("broken")
    done = command(run, "in", "--top_k=2", "--format=csv", verb="predict")
    assert done.returncode == 1, "one image could not be read"
    assert done.stdout.splitlines()[0] == "file,rank,class,probability,error"
    assert len(done.stdout.splitlines()) == 4
    (tmp_path / "in" / "b.png").unlink()
    done = command(run, "in/*.png", verb="predict")
    assert done.returncode == 0
    assert done.stdout.startswith("in/a.png: ")

    _check_submission(command, run, tmp_path)

    done = command(run, "--name=digits", verb="export")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip() / "saved_model.pb").is_file()


def _check_submission(command, run, tmp_path):
    (tmp_path / "in" / "broken.png").write_text("broken")
    done = command(run, "in", "--format=kaggle", "--output=submission.csv", verb="predict")
    assert done.returncode == 1, "one image could not be read"
    assert done.stdout == ""
    assert re.fullmatch(r"in/broken.png: not a .*; it is not in the submission\n", done.stderr)
    header, line = (tmp_path / "submission.csv").read_text().splitlines()
    assert header == "id,0,1,2,3,4,5,6,7,8,9"
    assert line.startswith("a,")
    assert len(line.split(",")) == 11
    refused = command(run, "in", "in/a.png", "--format=kaggle", verb="predict")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --format=kaggle: 2 images share their names")
    assert refused.stdout == ""


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("evaluate", [], "expected exactly one RUN, received 0"),
        ("evaluate", ["nowhere"], "nowhere: not a run directory"),
        ("evaluate", ["{run}", "--output=no/where.json"], "--output=no/where.json"),
        ("predict", ["{run}"], "expected a run and at least one image"),
        ("predict", ["nowhere", "x.png"], "nowhere: no such checkpoint"),
        ("export", ["nowhere"], "nowhere: not a run directory"),
    ],
)
def test_verbs_report_bad_input_in_one_line(command, trained, verb, arguments, message):
    done = command(*[a.format(run=trained.directory) for a in arguments], verb=verb)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert message in done.stderr


def test_a_damaged_best_is_named_and_not_scored(command, trained, tmp_path):
    shutil.copytree(trained.directory, tmp_path / "run")
    path = tmp_path / "run" / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = command("run", verb="evaluate")
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_text_is_wrapped():
    for verb in cli.COMMANDS.values():
        assert max(map(len, describe(verb.options, "").splitlines())) <= 100
