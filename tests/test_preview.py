"""Tests `keras_mixer/reports/preview.py`: the contact sheet shows what a model will be given."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from keras_mixer import Config
from keras_mixer.__main__ import main
from keras_mixer.preprocessing.input_pipeline import evaluation_batches
from keras_mixer.reports.preview import CAPTION, contact_sheet
from keras_mixer.runs.open_run import plan_run

FACTOR, CELL = 12, 100  # digits of 8 pixels are enlarged to 96; 4 of margin


def tile(sheet, row, column):
    """The pixels of one tile at the size of the image, which was enlarged by repetition."""
    top, left = row * (CELL + CAPTION) + 2, column * CELL + 2
    pixels = np.asarray(sheet)[top : top + 96, left : left + 96]
    assert (pixels.reshape(8, FACTOR, 8, FACTOR, 3).std(axis=(1, 3)) == 0).all()
    return pixels[::FACTOR, ::FACTOR]


@pytest.fixture(scope="module")
def sheet_of():
    return lambda draws=3, **fields: contact_sheet(plan_run(Config(**fields)), 4, draws)


def test_rows_are_images_and_columns_their_draws(sheet_of):
    """Without augmentation every column is the first; each epoch has an order of its own."""
    sheet = sheet_of()
    run = plan_run(Config())
    indices = np.linspace(0, len(run.dataset.train) - 1, 4).astype(int)
    assert sheet.size == (4 * CELL, 4 * (CELL + CAPTION))
    for row, index in enumerate(indices):
        for column in range(4):
            expected = run.dataset.train.pixels[index].repeat(3, axis=-1)
            np.testing.assert_array_equal(tile(sheet, row, column), expected)


def test_draws_are_those_of_the_flags(sheet_of):
    sheet = sheet_of(flip=True, draws=12)
    for row in range(4):
        plain = tile(sheet, row, 0)
        draws = [tile(sheet, row, column) for column in range(1, 13)]
        mirrored = [np.array_equal(draw, plain[:, ::-1]) for draw in draws]
        assert all(m or np.array_equal(d, plain) for m, d in zip(mirrored, draws, strict=True))
        assert 0 < sum(mirrored) < 12


def test_every_augmentation_can_be_shown(sheet_of):
    fields = {"inception_crop": 0.3, "randaugment": (2, 10), "color_jitter": 0.3, "mixup": 0.4,
              "random_erasing": 1.0, "cutmix": 1.0, "class_weights": "balanced"}  # fmt: skip
    plain, sheet = sheet_of(draws=1), sheet_of(draws=1, **fields)
    np.testing.assert_array_equal(tile(plain, 0, 0), tile(sheet, 0, 0))
    assert (tile(plain, 0, 1) != tile(sheet, 0, 1)).any()


def test_the_first_column_is_what_evaluation_sees(tmp_path, write_image):
    for name in ("a", "b"):
        for index in range(4):
            write_image(tmp_path / name / f"{index}.png", (40, 60, 3), seed=index)
    fields = {"dataset": "folder", "data_dir": str(tmp_path), "image_shape": (96, 96),
              "validation_fraction": 0.0, "test_fraction": 0.0, "eval_crop": 0.5}  # fmt: skip
    run = plan_run(Config(**fields))
    sheet = np.asarray(contact_sheet(run, 8, 0))
    expected, _ = next(iter(evaluation_batches(run.dataset.train, run.spec)))
    np.testing.assert_allclose(sheet[2:98, 2:98], expected[0] * 127.5 + 127.5, atol=0.51)


def test_command_writes_the_picture(command, tmp_path):
    done = command("--flip", "--images=2", "--draws=1", "--output=sheet.png", verb="preview")
    assert (done.returncode, done.stdout) == (0, "sheet.png\n"), done.stderr
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (2 * CELL, 2 * (CELL + CAPTION))
    done = command("--output=sheet.txt", verb="preview")
    assert done.returncode == 2
    assert "ends in .png" in done.stderr


def test_standard_output_receives_the_picture_and_nothing_else(monkeypatch):
    received = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(received))
    assert main(["preview", "--images=1", "--draws=0", "--output=-"]) == 0
    sys.stdout.flush()
    content = received.getvalue()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (CELL, CELL + CAPTION)
