"""Tests the command line as users meet it: `train.py` and `keras-mixer COMMAND`."""

import json
import re
import resource
import shutil

import pytest
from PIL import Image

from keras_mixer.commands import few_shot, models, shared, studies, training, weights
from keras_mixer.commands.table import COMMANDS
from keras_mixer.config.options import describe

QUICK = ["--depth=2", "--dim=8", "--batch_size=64", "--num_steps=2", "--jit=false"]


def test_the_main_job_from_nothing_to_a_saved_model(command, run, tmp_path):
    done = command(*QUICK, "--scheduler", "cosine", "--lr", "0.1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"test: \d+\.\d\d% of 360 images", done.stdout)
    assert (tmp_path / "saved_models" / "mlp_mixer" / "1" / "saved_model.pb").is_file()
    for name in ("flags.txt", "config.json", "history.csv", "metrics.json", "best/model.json"):
        assert (tmp_path / "output" / name).is_file()
    assert "epoch 2/2" in done.stderr
    assert not re.search(r"^[IWE]0000|oneDNN|cuInit", done.stderr, re.M), "no chatter"

    status, out, err = run("train", *QUICK, "--scheduler", "cosine", "--lr", "0.1")
    assert (status, out) == (0, done.stdout)
    assert err == "output is complete; nothing was changed\n"
    assert not (tmp_path / "saved_models" / "mlp_mixer" / "2").exists()

    flags = ("--flagfile=output/flags.txt", "--output_dir=new", "--export=false")
    assert run("train", *flags)[0] == 0
    metrics = [json.loads((tmp_path / d / "metrics.json").read_text()) for d in ("output", "new")]
    assert metrics[0]["test"] == metrics[1]["test"]


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


@pytest.fixture
def without(tmp_path):
    """Makes a folder of modules that stand in for libraries and fail when they are imported."""

    def stand_ins(*names):
        for name in names:
            (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
        return tmp_path

    return stand_ins


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """A folder with everything that can be wrong in it."""
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
    command, place, without, arguments, message
):
    done = command(*arguments, cwd=place, path=without("tensorflow", "keras", "jax"))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message.lower() in lines[0].lower()
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "name", "status", "words"),
    [
        (["--help"], None, 0, "(default: 0.001)"),
        (["--depht=3"], None, 2, "Did you mean: depth ?"),
        ([], "--help", 0, "commands:"),
    ],
)
def test_help_and_misspelt_flags_are_answered_at_once(
    command, without, arguments, name, status, words
):
    """Within a second of computing, for which no large library can be imported."""
    path = without("tensorflow", "keras", "jax", "sklearn", "scipy")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*arguments, verb=name, path=path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status
    assert words in done.stdout + done.stderr
    assert "" in (done.stdout, done.stderr)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_help_of_train_says_first_that_num_steps_counts_epochs_and_has_three_examples(run):
    usage, purpose, _, *examples = run("train", "--help")[1].split("\n\n")[:4]
    assert usage == "usage: keras-mixer train [--flag=value ...]"
    assert purpose.startswith(
        "Trains a Mixer for --num_steps epochs, evaluates it once on the test"
    )
    assert [line[:18] for line in examples[0].splitlines()[1:]] == 3 * ["  python train.py "]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_flags_and_help(run, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: keras-mixer {name}")
    assert "Examples:\n  " in out
    foreign = "--top_k=3" if name in ("train", "preview") else "--depth=3"
    status, out, err = run(name, "x", foreign)
    assert (status, out) == (2, "")
    assert "unknown command line flag" in err


def test_every_command_is_in_the_table_and_in_the_overview(run):
    public = [
        getattr(module, name)
        for module in (few_shot, models, studies, training, weights)
        for name in vars(module)
        if name[0].islower()
    ]
    written = {f for f in public if getattr(f, "__module__", "").startswith(shared.__package__)}
    written = {f for f in written if f.__module__ != shared.__name__}
    assert written == {command.run for command in COMMANDS.values()}
    status, overview, _ = run("--help")
    assert status == 0
    assert all(f"\n  {name} " in overview for name in COMMANDS)


def test_the_nearest_command_is_suggested(run):
    status, _, err = run("evaluat")
    assert status == 2
    assert "did you mean evaluate?" in err


def test_evaluate_and_export_a_run(command, run, trained, tmp_path):
    done = command(trained.directory, "--format=json", "--output=scores.json", verb="evaluate")
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert scores["top1"] == trained.scores["test"]["top1"]
    assert "precision" in run("evaluate", trained.directory, "--eval_split=validation")[1]

    status, out, _ = run("export", trained.directory, "--name=digits")
    assert status == 0
    assert (tmp_path / out.strip() / "saved_model.pb").is_file()


def test_predict_with_a_run(command, run, trained, tmp_path, write_image):
    write_image(tmp_path / "in" / "a.png", trained.dataset.test.pixels[0])
    status, out, _ = run("predict", trained.directory, "in/*.png")
    assert status == 0 and out.startswith("in/a.png: ")
    (tmp_path / "in" / "b.png").write_text("broken")
    status, out, _ = run("predict", trained.directory, "in", "--top_k=2", "--format=csv")
    assert status == 1, "one image could not be read"
    assert out.splitlines()[0] == "file,rank,class,probability,error"
    assert len(out.splitlines()) == 4

    kaggle = (trained.directory, "in", "--format=kaggle")
    done = command(*kaggle, "--output=submission.csv", verb="predict")
    assert done.returncode == 1, "one image could not be read"
    assert done.stdout == ""
    assert re.fullmatch(r"in/b.png: not a .*; it is not in the submission\n", done.stderr)
    header, line = (tmp_path / "submission.csv").read_text().splitlines()
    assert header == "id,0,1,2,3,4,5,6,7,8,9"
    assert line.startswith("a,")
    assert len(line.split(",")) == 11
    status, out, err = run("predict", *kaggle, "in/a.png")
    assert (status, out) == (2, "")
    assert err.startswith("error: --format=kaggle: 2 images share their names")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate", "expected exactly one RUN, received 0"),
        ("evaluate nowhere", "nowhere: not a run directory"),
        ("evaluate {run} --output=no/where.json", "--output=no/where.json"),
        ("predict {run}", "expected a run and at least one image"),
        ("predict nowhere x.png", "nowhere: no such checkpoint"),
        ("export nowhere", "nowhere: not a run directory"),
    ],
)
def test_commands_report_bad_input_in_one_line(run, trained, line, message):
    status, out, err = run(*line.format(run=trained.directory).split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_damaged_best_weights_are_named_and_not_scored(run, trained, tmp_path):
    shutil.copytree(trained.directory, tmp_path / "run")
    path = tmp_path / "run" / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    status, out, err = run("evaluate", "run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "run/best/model.safetensors: damaged" in err


def test_help_text_is_wrapped():
    for command in COMMANDS.values():
        assert max(map(len, describe(command.options, "").splitlines())) <= 100
