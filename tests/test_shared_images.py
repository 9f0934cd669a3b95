"""Tests `keras_mixer/data/shared_images.py`: the same image in several splits."""

import dataclasses
import shutil

import numpy as np
import pytest
from test_tfrecords import load, shapes  # noqa: F401

from keras_mixer.data import shared_images
from keras_mixer.data.shared_images import note_shared_images
from keras_mixer.data.sources import open_dataset


def said(dataset, capsys):
    capsys.readouterr()
    note_shared_images(dataset)
    return capsys.readouterr().err


@pytest.fixture
def split_folder(folder, tmp_path):
    """Class folders under train, val and test, with the names of one another but other images."""
    for index, split in enumerate(("train", "val", "test")):
        for path in sorted(folder.rglob("*.*"))[index::3]:
            target = tmp_path / "split" / split / path.parent.name / f"{split}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path / "split"


def test_files_are_compared_by_content_and_named(split_folder, capsys):
    assert said(open_dataset("folder", split_folder), capsys) == ""
    shutil.copy(split_folder / "train/ant/train-0.png", split_folder / "test/bee/other.png")
    assert said(open_dataset("folder", split_folder), capsys) == (
        "1 image is in several splits, byte for byte, which makes scores too good: "
        "train/ant/train-0.png (train) = test/bee/other.png (test)\n"
    )
    for number, path in enumerate(sorted((split_folder / "train").rglob("*.png"))[1:4]):
        shutil.copy(path, split_folder / f"val/ant/{number}.png")
    text = said(open_dataset("folder", split_folder), capsys)
    assert text.startswith("4 images are in several splits, byte for byte")
    assert text.count(" = ") == 3 and text.endswith("; …\n")


def test_one_more_byte_or_the_same_split_twice_is_nothing(split_folder, capsys):
    content = (split_folder / "train/ant/train-0.png").read_bytes()
    (split_folder / "test/ant/longer.png").write_bytes(content + b"\0")
    (split_folder / "train/ant/again.png").write_bytes(content)
    assert said(open_dataset("folder", split_folder), capsys) == ""


def test_only_files_of_equal_sizes_are_read(split_folder, capsys, monkeypatch):
    dataset = open_dataset("folder", split_folder)
    monkeypatch.setattr(type(dataset.train), "content", lambda *_: pytest.fail("reads a file"))
    monkeypatch.setattr(type(dataset.train), "sizes", lambda self: self.labels + 10 * len(self))
    even = dataclasses.replace(dataset, validation=None, test=dataset.test.take(np.arange(5)))
    assert said(even, capsys) == ""


def test_images_in_memory_are_compared(capsys):
    digits = open_dataset("digits")
    assert said(digits, capsys) == ""
    shared = dataclasses.replace(digits, test=digits.train.take(np.array([7, 3])))
    assert "number 3 (train) = number 1 (test); number 7 (train) = number 0 (test)" in said(
        shared, capsys
    )


def test_records_are_compared(shapes, capsys):  # noqa: F811
    dataset = load(shapes)
    assert said(dataset, capsys) == ""
    shared = dataclasses.replace(dataset, test=dataset.train.take(np.arange(2)))
    assert said(shared, capsys).startswith("2 images are in several splits")


def test_what_would_take_long_is_said_and_left_out(capsys, monkeypatch):
    monkeypatch.setattr(shared_images, "MOST_BYTES", 1000)
    assert "are not compared for identical images" in said(open_dataset("digits"), capsys)
