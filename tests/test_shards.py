"""Tests `keras_mixer/inference/shards.py`: many images, by several processes, after any kill."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from keras_mixer import InputError, load_mixer
from keras_mixer.files import locked
from keras_mixer.inference import shards as shards_module
from keras_mixer.inference.predict import predictions_as_text
from keras_mixer.inference.shards import Shards

SIZE = 7


@pytest.fixture(scope="module")
def model(trained):
    return load_mixer(trained.best)


@pytest.fixture
def images(tmp_path, trained, write_image):
    """Forty test digits, two of which are broken."""
    paths = [tmp_path / "images" / f"{index:02d}.png" for index in range(40)]
    for path, pixels in zip(paths, trained.dataset.test.pixels, strict=False):
        write_image(path, pixels)
    for index in (3, 39):
        paths[index].write_text("broken")
    return list(map(str, paths))


@pytest.fixture
def opened(tmp_path, images):
    def make(images=images, weights="abc", size=SIZE, format="csv", top_k=2, folder="shards"):
        return Shards(tmp_path / folder, images, weights, size=size, format=format, top_k=top_k)

    return make


def contents(folder):
    """The lines of all shards, without the headers of all but the first."""
    first, *others = [path.read_text() for path in sorted(folder.glob("*.csv"))]
    return first + "".join(text.split("\n", 1)[1] for text in others)


NUMBER = re.compile(r"(?<=,)[\d.]+(?:e-\d+)?")


def assert_same_predictions(received, expected):
    """The same images and classes; the last bits of probabilities depend on the batch size."""
    assert NUMBER.sub("#", received) == NUMBER.sub("#", expected)
    numbers = (list(map(float, NUMBER.findall(text))) for text in (received, expected))
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", ["csv", "kaggle"])
def test_shards_together_are_the_predictions_of_all_images(opened, model, images, format):
    whole, failed = predictions_as_text(model, images, format, 2)
    shards = opened(format=format)
    assert shards.predict(model) == (38, failed) == (38, 2)
    assert len(list(shards.folder.glob("*.csv"))) == 6
    assert_same_predictions(contents(shards.folder), whole)


def test_no_images_at_all_are_no_shards(opened, model):
    assert opened(images=[]).predict(model) == (0, 0)


def test_interrupted_it_goes_on_with_what_is_left(opened, model, monkeypatch):
    predicted = []

    def predict(model, paths, *rest):
        predicted.append(len(paths))
        if len(predicted) == 3:
            raise KeyboardInterrupt
        return predictions_as_text(model, paths, *rest)

    monkeypatch.setattr(shards_module, "predictions_as_text", predict)
    with pytest.raises(KeyboardInterrupt):
        opened().predict(model)
    assert opened().predict(model) == (38, 2)
    assert predicted == [7, 7, 7, 7, 7, 7, 5], "the third is repeated, the first two are not"
    assert opened().predict(model) == (38, 2)
    assert len(predicted) == 7


@pytest.mark.parametrize("damage", ["missing", "cut", "counts"])
def test_damaged_shards_are_predicted_again(opened, model, damage):
    shards = opened()
    shards.predict(model)
    before, path = contents(shards.folder), shards.folder / "00002.csv"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        counts = shards.folder / ".state" / "00002.json"
        counts.write_text(counts.read_text().replace('"failed": 0', '"failed": 1'))
    assert opened().predict(model) == (38, 2)
    assert contents(shards.folder) == before


def test_a_shard_that_another_process_has_is_waited_for(opened, model, monkeypatch):
    monkeypatch.setattr(shards_module, "WAIT", 0.01)
    shards, other = opened(), opened()
    taken, release = threading.Event(), threading.Event()

    def work():
        with locked(other._state(1, "lock")):
            taken.set()
            release.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    taken.wait(60)
    done = threading.Thread(target=shards.predict, args=(model,))
    done.start()
    while len(list(shards.folder.glob("*.csv"))) < 5:
        time.sleep(0.01)
    assert done.is_alive() and not (shards.folder / "00001.csv").exists()
    release.set()
    done.join(60)
    thread.join()
    assert not done.is_alive() and (shards.folder / "00001.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["other.png"]}, "differing: images"),
        ({"weights": "other", "top_k": 1}, "differing: model, top_k"),
        ({"size": 8}, "differing: shard_size"),
        ({"format": "json"}, "differing: format"),
    ],
)
def test_a_folder_of_other_predictions_is_refused(opened, model, change, message):
    opened().predict(model)
    with pytest.raises(InputError, match=f"holds other predictions .{message}"):
        opened(**change)


def test_other_images_under_the_same_names_are_refused(opened, model, images, write_image):
    opened().predict(model)
    write_image(Path(images[5]), (9, 8, 1))
    with pytest.raises(InputError, match="differing: images"):
        opened()


def test_other_folders_are_refused(opened, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(InputError, match="notes holds other files; give a new"):
        opened(folder="notes")
    assert (tmp_path / "notes" / "todo.txt").exists()
    with pytest.raises(InputError, match="--output_dir=.*todo.txt: .*"):
        opened(folder="notes/todo.txt")
    shards = opened()
    (shards.folder / "predictions.json").write_text("{}")
    with pytest.raises(InputError, match="predictions.json: damaged"):
        opened()


def test_a_process_that_is_killed_leaves_its_shard_to_the_others(trained, images, tmp_path, model):
    """As a user runs them: two at once, one is killed, the other ends with exact counts."""
    line = [
        *(sys.executable, "-m", "keras_mixer", "predict", str(trained.directory)),
        *("images", "--output_dir=out", "--shard_size=2", "--format=csv", "--top_k=2"),
    ]
    start = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    killed, other = (subprocess.Popen(line, **start, **streams) for _ in range(2))
    while not list(tmp_path.glob("out/*.csv")) and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, err = other.communicate(timeout=300)
    assert (other.returncode, err) == (1, "")
    assert out == "40 images in out: 38 predicted, 2 could not be read\n"
    relative = [os.path.relpath(path, tmp_path) for path in images]
    with contextlib.chdir(tmp_path):
        whole, _ = predictions_as_text(model, relative, "csv", 2)
    assert_same_predictions(contents(tmp_path / "out"), whole)


def test_flags_that_do_not_fit_together_end_in_one_line(command, trained):
    for flags, message in (
        (("--output=a.csv", "--output_dir=a"), "--output and --output_dir: give one of them"),
        (("--shard_size=5",), "--shard_size=5 needs --output_dir"),
    ):
        done = command(trained.directory, "x.png", *flags, verb="predict")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
