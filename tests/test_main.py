"""Tests the command line as users meet it: `train.py` and `keras-mixer COMMAND`."""

import io
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, rewrite
from PIL import Image

from keras_mixer import InputError
from keras_mixer.commands import (
    few_shot,
    launch,
    models,
    report,
    shared,
    studies,
    sweep,
    training,
    weights,
)
from keras_mixer.commands.table import COMMANDS
from keras_mixer.config.command_line import describe

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
    assert err.startswith("output is complete; nothing was changed\n")
    assert not (tmp_path / "saved_models" / "mlp_mixer" / "2").exists()

    flags = ("--flagfile=output/flags.txt", "--output_dir=new", "--export=false")
    assert run("train", *flags)[0] == 0
    metrics = [json.loads((tmp_path / d / "metrics.json").read_text()) for d in ("output", "new")]
    # In this process, TensorFlow may have other numbers of threads, hence other last bits.
    assert metrics[0]["test"] == pytest.approx(metrics[1]["test"], rel=1e-4)


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
    "no checkpoint": (["--checkpoint=nowhere"], "--checkpoint: nowhere: no such checkpoint"),
    "warm-up": (["--warmup_epochs=40"], "--warmup_epochs=40 must be below --epochs=30"),
    "file in the way": (["--output_dir=file"], "file exists"),
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
    shutil.copy(trained.directory / "config.json", folder / "run")
    rewrite(folder / "run" / "config.json", lambda record: record["config"].update(lr=0.001))
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


def test_help_of_train_has_three_examples(run):
    usage, purpose, _, *examples = run("train", "--help")[1].split("\n\n")[:4]
    assert usage == "usage: keras-mixer train [--flag=value ...]"
    assert purpose.startswith("Trains a Mixer for --epochs epochs, evaluates it once on the test")
    assert [line[:18] for line in examples[0].splitlines()[1:]] == 3 * ["  python train.py "]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_flags_and_help(run, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: keras-mixer {name}")
    assert "Examples:\n  " in out
    foreign = "--top_k=3" if name in ("train", "preview", "benchmark") else "--depth=3"
    status, out, err = run(name, "x", foreign)
    assert (status, out) == (2, "")
    of_train = "--depth is a flag of train: put it after --"
    assert (
        of_train if name in ("sweep", "transfer", "launch") else "unknown command line flag"
    ) in err


def test_every_command_is_in_the_table_and_in_the_overview(run):
    public = [
        getattr(module, name)
        for module in (few_shot, launch, models, report, studies, sweep, training, weights)
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
        ("evaluate", "expected exactly one RUN or checkpoint, received 0"),
        ("evaluate nowhere", "nowhere: no such run"),
        ("evaluate {run} --output=no/where.json", "--output=no/where.json"),
        ("predict {run}", "expected a run and at least one image"),
        ("predict nowhere x.png", "nowhere: no such checkpoint"),
        ("export nowhere", "nowhere: no such checkpoint"),
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


# === Standard input ===


@pytest.fixture
def stdin(monkeypatch):
    """Puts bytes on standard input; returns the file that they are read from."""

    def put(content):
        file = io.BytesIO(content)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        return file

    return put


@pytest.fixture
def digits(tmp_path, trained, write_image):
    """Two different digits: one.png and "BM two.png", whose name starts like a BMP."""
    for index, name in enumerate(("one", "BM two")):
        write_image(tmp_path / "in" / f"{name}.png", trained.dataset.test.pixels[index])
    return tmp_path / "in"


def rows_of(run, *arguments):
    status, out, err = run("predict", *arguments, "--format=json")
    assert err == ""
    return status, json.loads(out)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG", "GIF", "WEBP"])
def test_an_image_on_standard_input_is_predicted_as_its_file_is(run, trained, digits, stdin, kind):
    content = io.BytesIO()
    Image.open(digits / "one.png").save(content, kind)
    (digits / "file").write_bytes(content.getvalue())
    stdin(content.getvalue())
    status, (before, piped, after) = rows_of(run, trained.directory, "in/file", "-", "in/one.png")
    assert (status, before["file"], piped["file"]) == (0, "in/file", "-")
    assert piped["predictions"] == before["predictions"]
    assert after["file"] == "in/one.png"
    stdin(content.getvalue())
    lines = run("predict", trained.directory, "-", "--format=csv", "--top_k=1")[1].splitlines()
    assert lines[1].startswith("-,1,")
    stdin(content.getvalue()[:40])
    status, (row,) = rows_of(run, trained.directory, "-")
    assert (status, row["file"]) == (1, "-")
    assert row["error"]


@pytest.mark.parametrize(
    "listed, found",
    [
        (b"BM two.png\none.png\n", ["BM two.png", "one.png"]),
        (b"\r\none.png\r\n\r\nBM two.png", ["one.png", "BM two.png"]),
        (b"BM two.png\0one.png\0", ["BM two.png", "one.png"]),
        (b"line\nfeed.png\0one.png", ["line\nfeed.png", "one.png"]),
        (b"*.png\n", ["BM two.png", "line\nfeed.png", "one.png"]),
        (b"-\nnone.png\n", ["-", "none.png"]),
    ],
)
def test_names_on_standard_input_count_as_if_they_were_arguments(
    run, trained, digits, stdin, monkeypatch, listed, found
):
    shutil.copy(digits / "one.png", digits / "line\nfeed.png")
    stdin(listed)
    monkeypatch.chdir(digits)
    status, rows = rows_of(run, trained.directory, "one.png", "-", "BM two.png")
    assert [row["file"] for row in rows] == ["one.png", *found, "BM two.png"]
    errors = [row.get("error") for row in rows if not os.path.exists(row["file"])]
    assert errors == ["no such file"] * (2 if "-" in found else 0)
    assert status == (1 if errors else 0)


@pytest.mark.parametrize("content", [b"", b"\n \n", None])
def test_an_empty_or_closed_standard_input_is_refused(run, trained, stdin, monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", None) if content is None else stdin(content)
    status, out, err = run("predict", trained.directory, "-")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "on standard input; received nothing" in err


# === --output ===


@pytest.fixture
def shell(tmp_path):
    """Runs a command line in a shell, with `keras-mixer report RUN` for {report}."""

    def run(line, directory):
        report = shlex.join([sys.executable, "-m", "keras_mixer", "report", str(directory)])
        return subprocess.run(
            ["sh", "-c", line.format(report=report)],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    "line",
    ["{report} --output=- >> log", "{report} --output=link | cat >> log"],
)
def test_standard_output_is_written_to(shell, trained, tmp_path, line):
    (tmp_path / "log").write_text("before\n")
    (tmp_path / "link").symlink_to("/dev/stdout")
    done = shell(f"{line}; echo after >> log", trained.directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    first, *table, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert table[0].startswith("| ")
    assert sorted(os.listdir(tmp_path)) == ["link", "log"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_standard_output_is_one_line_and_status_1(shell, trained):
    done = shell("{report} --output=- > /dev/full", trained.directory)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr


def test_a_pipe_is_not_opened_before_its_content_is_there(run, trained, tmp_path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    checking = threading.Thread(target=shared.check_writable, args=[str(pipe)], daemon=True)
    checking.start()
    checking.join(timeout=30)
    reader.join(timeout=0.2)
    assert (checking.is_alive(), reader.is_alive()) == (False, True)
    status, out, err = run("report", trained.directory, "--output=pipe")
    reader.join(timeout=30)
    assert (status, out, err) == (0, "", "")
    assert pipe.is_fifo() and received[0].startswith("| ")


@pytest.mark.parametrize(
    "path, message",
    [
        ("folder", "it is a folder"),
        ("to_folder", "it is a folder"),
        ("nowhere/file", "its folder does not exist; create .*nowhere,"),
        ("to_nowhere", "its folder does not exist; create .*elsewhere,"),
        ("file/file", "Not a directory"),
        ("circle", "levels of symbolic links"),
        ("x" * 300, "File name too long"),
        ("locked/file", "no permission to write to it"),
        ("locked/pipe", "no permission to write to it"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "locked"):
        os.mkdir(folder)
    links = {"to_folder": "folder", "to_nowhere": "elsewhere/file", "circle": "circle"}
    for link, target in links.items():
        os.symlink(target, link)
    (tmp_path / "file").write_text("")
    os.mkfifo("locked/pipe")
    # As root, nothing is locked.
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    with pytest.raises(InputError, match=f"^--output={path}: .*{message}"):
        shared.check_writable(path)
    shared.check_writable("file")
    shared.check_writable("new")


# === What all commands have ===


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_versions(run, words):
    status, out, _ = run(*words)
    assert status == 0
    assert re.fullmatch(r"keras_mixer [\d.]+ \(TensorFlow [\d.]+, Keras .*Python [\d.]+\)\n", out)


def test_verbosity_says_less(run, trained, tmp_path):
    words = ["train", *QUICK, "--num_steps=1", "--export=false"]
    status, out, err = run(*words, "--output_dir=a", "--verbosity=warning")
    assert (status, err) == (0, "")
    assert out.startswith("validation: "), "results are printed nevertheless"
    (tmp_path / "unfinished").mkdir()
    for level, printed in (("warning", True), ("error", False)):
        status, _, err = run("report", "a", "unfinished", f"--verbosity={level}")
        assert (status, "left out" in err) == (0, printed)
    assert run("report", "unfinished", "--verbosity=error")[2].startswith("error: none of")
    assert "left out" in run("report", "a", "unfinished")[2], "the level is that of one command"


def test_a_preset_is_found_by_its_name_from_anywhere(run, tmp_path):
    """Other flags win wherever they stand; hyphens are as good as underscores."""
    words = ["--num-steps=2", "--preset=digits", "--warmup_step", "0", "--dim=8", "--export=false"]
    status, _, err = run("train", *words, "--depth=1", "--batch-size=512", "--output-dir=a")
    assert status == 0, err
    given = (tmp_path / "a" / "flags.txt").read_text().split()
    assert {"--ema=0.98", "--num_steps=2", "--dim=8", "--batch_size=512"} <= set(given)
    assert not any(flag.startswith("--preset") for flag in given), "the values are, not the name"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["preset"] == "digits"
    status, out, _ = run("report", "a")
    assert "--num_steps=2" in out
    status, _, err = run("train", "--preset=digit")
    assert (status, "did you mean digits?" in err) == (2, True)
    assert "  --preset\n" in run("train", "--help")[1]
    assert "  --preset\n" not in run("evaluate", "--help")[1]


def test_after_training_the_next_commands_are_printed_and_work(run, tmp_path, write_image):
    words = ["--depth=1", "--dim=8", "--num_steps=1", "--batch_size=512", "--export=false"]
    status, _, err = run("train", *words, "--output_dir=a run")
    assert status == 0
    write_image(tmp_path / "digit.png", (8, 8, 1))
    lines = [line.split("  ")[1] for line in err.split("next:\n")[1].splitlines()]
    assert [line.split()[1] for line in lines] == ["evaluate", "predict", "report"]
    for line in lines:
        words = shlex.split(line.replace("IMAGE...", "digit.png"))
        assert words[0] == "keras-mixer"
        assert run(*words[1:])[0] == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--flagfile=", "--flagfile: expected the path of a file, received nothing"),
        ("--name=a\0b", "--name: expected a value without NUL characters"),
        ("--data_dir=a\0b", "--data_dir: expected a value without NUL characters"),
    ],
)
def test_values_that_no_path_has_are_refused(run, word, message):
    status, out, err = run("train", word)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
