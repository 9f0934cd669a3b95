"""Tests `--bad_images` and `keras_mixer/preprocessing/bad_images.py`."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest

from keras_mixer import Config, fit
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.model.architecture import Architecture, ModelSpec
from keras_mixer.preprocessing import bad_images
from keras_mixer.preprocessing.bad_images import broken_images_named, find_bad
from keras_mixer.preprocessing.input_pipeline import evaluation_batches
from keras_mixer.weights import model_folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the files that are decoded to find out whether they can be."""
    paths = []

    def note(channels, path, check=bad_images._file_problem):
        paths.append(path)
        return check(channels, path)

    monkeypatch.setattr(bad_images, "_file_problem", note)
    return paths


def break_pixels(path):
    """Damages the middle of a PNG, which its header and end do not show."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def broken(folder, tmp_path):
    """A folder with four broken images, beside a copy without them."""
    for name in ("ant/new.png", "ant/cut.png", "bee/text.jpg"):
        shutil.copy(folder / "cat" / "8.png", folder / name)
    shutil.copytree(folder, tmp_path / "clean")
    break_pixels(folder / "ant" / "new.png")
    (folder / "ant" / "cut.png").write_bytes((folder / "ant" / "cut.png").read_bytes()[:200])
    (folder / "bee" / "text.jpg").write_text("no image")
    break_pixels(folder / "cat" / "4.png")
    for name in ("ant/new.png", "ant/cut.png", "bee/text.jpg", "cat/4.png"):
        (tmp_path / "clean" / name).unlink()
    return folder


BAD = ("ant/cut.png", "ant/new.png", "bee/text.jpg", "cat/4.png")


def config(data, output, **fields):
    fields = {"bad_images": "skip", "batch_size": 8, "dropout": 0.1, "flip": True, **fields}
    return Config(
        dataset="folder", data_dir=str(data), image_shape=(8, 8), patch_shape=(4, 4), depth=1,
        dim=8, warmup_step=0, num_steps=2, output_dir=str(output), **fields,
    )  # fmt: skip


def test_a_run_that_skips_is_the_run_on_a_folder_without_them(broken, tmp_path, capsys):
    skipping = fit(config(broken, tmp_path / "skipping"))
    assert "4 of 39 images are bad and skipped: ant/cut.png (truncated)" in capsys.readouterr().err
    clean = fit(config(tmp_path / "clean", tmp_path / "cleaned", bad_images="error"))
    assert skipping.dataset.identity == clean.dataset.identity
    for name, array in model_folder.read_weights(clean.best)[0].items():
        assert np.array_equal(array, model_folder.read_weights(skipping.best)[0][name]), name
    lines = (tmp_path / "skipping" / "skipped.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["image"] for row in rows] == list(BAD)
    assert [row["reason"] for row in rows][::2] == [
        "truncated",
        "not a JPEG, PNG, BMP, WebP or GIF image",
    ]
    assert all(row["reason"] for row in rows)
    assert not (tmp_path / "cleaned" / "skipped.jsonl").exists()


def test_a_run_that_skips_goes_on_only_while_the_same_images_are_left(broken, tmp_path):
    fit(config(broken, tmp_path / "run"))
    assert fit(config(broken, tmp_path / "run")).finished is False, "scoring is another step"
    break_pixels(broken / "cat" / "6.png")
    with pytest.raises(InputError, match="trained on other data"):
        fit(config(broken, tmp_path / "run"))


def test_by_default_damage_is_an_error_that_names_the_flag(broken, tmp_path):
    with pytest.raises(InputError, match=r"2 unreadable images, .*--bad_images=skip: .*ant/cut"):
        fit(config(broken, tmp_path / "run", bad_images="error"))
    for name in BAD[::2]:
        (broken / name).unlink()
    with pytest.raises(InputError, match=r"unreadable image.*skip: .*/ant/new\.png \("):
        fit(config(broken, tmp_path / "run", bad_images="error"))


def test_files_that_can_be_decoded_are_decoded_once(broken, decoded):
    for expected in (39, 4, 4):
        assert len(open_dataset("folder", broken, find_bad=find_bad).skipped) == 4
        assert len(decoded) == expected
        decoded.clear()
    assert len(open_dataset("folder", broken.parent / "clean").train) > 0


def test_a_csv_file_may_list_broken_images(broken, tmp_path):
    names = [path.relative_to(broken) for path in broken.rglob("*.??g")]
    rows = "".join(f"{name},{name.parent}\n" for name in names)
    (broken / "labels.csv").write_text(f"file,label\n{rows}")
    dataset = open_dataset("csv", broken, find_bad=find_bad)
    assert [place for place, _ in dataset.skipped] == list(BAD)
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 35


@pytest.mark.parametrize("left", ["", "train"])
def test_a_class_without_a_readable_image_is_refused(folder, tmp_path, left):
    if left:
        folder.rename(tmp_path / "train")
        shutil.copytree(tmp_path / "train", folder / "test")
        (tmp_path / "train").rename(folder / "train")
    for path in (folder / left / "bee").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="--bad_images=skip: no readable image is left of bee"):
        open_dataset("folder", folder, find_bad=find_bad)


def test_images_in_memory_are_never_bad():
    assert open_dataset("digits", find_bad=find_bad).skipped == ()


def test_a_run_that_only_began_begins_anew_when_it_is_to_skip(broken, tmp_path, capsys):
    """As the error of a broken image proposes; a run that has saved something is kept."""
    for name in BAD[::2]:
        (broken / name).unlink()
    with pytest.raises(InputError, match="--bad_images=skip"):
        fit(config(broken, tmp_path / "run", bad_images="error"))
    run = fit(config(broken, tmp_path / "run"))
    assert "saved nothing: it starts over" in capsys.readouterr().err
    assert len(run.dataset.skipped) == 2
    break_pixels(broken / "cat" / "6.png")
    with pytest.raises(InputError, match="trained on other data"):
        fit(config(broken, tmp_path / "run"))


def test_the_list_of_skipped_images_is_that_of_the_last_start(broken, tmp_path):
    fit(config(broken, tmp_path / "run"))
    (broken / "ant" / "another.png").write_bytes(b"x")
    fit(config(broken, tmp_path / "run"))
    assert "another.png" in (tmp_path / "run" / "skipped.jsonl").read_text()


def test_names_of_images_forge_no_line(broken, capsys):
    (broken / "ant" / "x\nerror: forged.png").write_bytes(b"x")
    open_dataset("folder", broken, find_bad=find_bad)
    assert "ant/x\\nerror: forged.png (" in capsys.readouterr().err


def test_what_is_wrong_with_the_machine_is_no_bad_image(folder, monkeypatch):
    monkeypatch.setattr(bad_images, "check_image_file", lambda path: os.strerror(errno.EMFILE))
    with pytest.raises(InputError, match="0.png: Too many open files; it may be readable"):
        open_dataset("folder", folder, find_bad=find_bad)


def test_a_pipe_that_takes_an_images_place_ends_the_run_by_name(folder, monkeypatch):
    """TensorFlow would wait for somebody to write to it."""
    monkeypatch.setattr(bad_images, "_IDLE", 0.1)
    spec = ModelSpec(
        Architecture(image_shape=(8, 8), patch_shape=(4, 4), depth=1, dim=8, num_classes=3)
    )
    split = open_dataset("folder", folder).train
    path = os.fsdecode(split.paths[3])
    os.remove(path)
    os.mkfifo(path)
    message = re.escape(f"{path} (not a regular file)")
    with pytest.raises(InputError, match=message), broken_images_named(split):
        list(evaluation_batches(split, spec))
