"""Tests `keras_mixer/inference/robustness.py` and `evaluate --corruptions`."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import GOLDEN

from keras_mixer import InputError, load_mixer
from keras_mixer.inference import robustness
from keras_mixer.inference.evaluate import match_data
from keras_mixer.inference.robustness import FROST_NOTE, corruption_scores
from keras_mixer.preprocessing.corruption_constants import CORRUPTIONS
from keras_mixer.preprocessing.corruptions import corrupt
from keras_mixer.preprocessing.resize import to_model_range

FEW = 40


@pytest.fixture(scope="module")
def subject(trained):
    """The trained run and a few of its test images."""
    subject = match_data(load_mixer(trained.best), trained.dataset, "test")
    return subject._replace(split=trained.dataset.test.take(np.arange(FEW)))


def accuracy(model, split, corruption, severity, seed):
    """Of images corrupted one by one."""
    corrupted = [
        corrupt(image, corruption, severity, index, seed)
        for index, image in enumerate(split.pixels)
    ]
    return np.mean(predictions(model, np.stack(corrupted)) == split.labels)


def predictions(model, pixels):
    return model(to_model_range(pixels)).numpy().argmax(axis=1)


def test_accuracies_are_those_of_corrupted_images_one_by_one(subject):
    scores = corruption_scores(subject, ("gaussian_noise", "fog"), (1, 5), seed=4)
    for name, row in scores["top1"].items():
        expected = [accuracy(subject.model, subject.split, name, s, 4) for s in (1, 5)]
        assert row["by_severity"] == expected
        assert row["mean"] == pytest.approx(np.mean(expected))
    means = [row["mean"] for row in scores["top1"].values()]
    assert scores["mean"] == pytest.approx(np.mean(means))
    assert scores["severities"] == [1, 5] and scores["seed"] == 4 and scores["note"] is None


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_do_not_change_the_images(subject, batch_size):
    names = ("impulse_noise", "elastic_transform")
    one = corruption_scores(subject, names, (5,))
    assert corruption_scores(subject._replace(batch_size=batch_size), names, (5,)) == one


def test_labels_are_those_of_the_model(subject):
    """Of data with the model's classes in another order."""
    moved = dataclasses.replace(subject.split, labels=(subject.split.labels + 3) % 10)
    other = subject._replace(split=moved, class_of=(np.arange(10) - 3) % 10)
    one, same = (corruption_scores(s, ("contrast",), (1,)) for s in (subject, other))
    assert one == same


def test_outputs_that_are_not_finite_are_no_scores(subject, monkeypatch):
    monkeypatch.setattr(robustness, "_corrupted", lambda images, *_: images * np.nan)
    with pytest.raises(InputError, match="not finite"):
        corruption_scores(subject, ("fog",))


# === The command ===


@pytest.fixture
def few(trained, monkeypatch):
    """Leaves only a few images to evaluate in the run's test split."""
    from keras_mixer.commands import models

    def read(*arguments):
        dataset = trained.dataset
        few = dataclasses.replace(dataset, test=dataset.test.take(np.arange(FEW)))
        return dataclasses.replace(trained, dataset=few)

    monkeypatch.setattr(models, "read_run", read)


def test_evaluate_all_corruptions(run, trained, few):
    status, out, err = run("evaluate", trained.directory, "--corruptions=all", "--format=json")
    assert (status, err) == (0, "")
    scores = json.loads(out)
    found = scores["corruptions"]
    assert list(found["top1"]) == list(CORRUPTIONS)
    assert found["severities"] == [1, 2, 3, 4, 5] and found["note"] == FROST_NOTE
    split = trained.dataset.test.take(np.arange(FEW))
    by_hand = accuracy(load_mixer(trained.best), split, "glass_blur", 3, 0)
    assert found["top1"]["glass_blur"]["by_severity"][2] == by_hand
    assert found["mean"] == pytest.approx(
        np.mean([r["by_severity"] for r in found["top1"].values()])
    )
    assert found["mean"] < scores["top1"]


def test_corruptions_as_a_table(run, trained, few, tmp_path):
    words = ("--corruptions=frost,contrast,frost", "--severities=5,1", "--seed=2")
    status, out, err = run("evaluate", trained.directory, *words, "--output=scores.json")
    assert (status, err) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())
    found, lines = scores["corruptions"], out.splitlines()
    start = lines.index("top-1 on corrupted images (seed 2; at the model's image size)")
    assert lines[start + 1].split() == ["corruption", "mean", *["severity", "1", "severity", "5"]]
    for line, name in zip(lines[start + 2 :], ("frost", "contrast"), strict=False):
        row = found["top1"][name]
        cells = [f"{value:.2%}" for value in (row["mean"], *row["by_severity"])]
        assert line.split() == [name, *cells]
    assert lines[start + 4].split() == ["mean", "over", "all", f"{found['mean']:.2%}"]
    assert lines[start + 5].split() == ["clean", f"{scores['top1']:.2%}"]
    assert lines[start + 6] == FROST_NOTE


@pytest.mark.parametrize(
    "words, message",
    [
        ("--corruptions=fogg", "--corruptions: expected one of all, gaussian_noise, "),
        ("--corruptions=", "--corruptions: expected "),
        ("--corruptions=fog --severities=0", "at least 1 and at most 5, received 0"),
        ("--corruptions=fog --severities=1,6", "at least 1 and at most 5, received 1,6"),
        ("--corruptions=fog --severities=x", "--severities"),
        ("--corruptions=fog --seed=-1", "--seed: expected an integer at least 0"),
    ],
)
def test_bad_input_is_one_line(run, trained, words, message):
    status, out, err = run("evaluate", trained.directory, *words.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_color_images_of_files_that_are_resized(run, tmp_path, write_image):
    """Of varied size, for weights without a run; corrupted at the size of the model's images."""
    expected = np.load(GOLDEN / "official_mixer_expected.npz")
    for label in range(expected["logits"].shape[1]):
        write_image(tmp_path / "data" / str(label) / "a.png", (20 + label, 30, 3), seed=label)
    shape = "--image_shape={},{}".format(*expected["images"].shape[1:3])
    assert run("convert", GOLDEN / "official_mixer.npz", "model", shape)[0] == 0
    words = ("--dataset=folder", "--data_dir=data", "--corruptions=snow,jpeg_compression")
    status, out, err = run("evaluate", "model", *words, "--format=json")
    assert status == 0, err
    found = json.loads(out)
    assert found["n"] == expected["logits"].shape[1]
    assert list(found["corruptions"]["top1"]) == ["snow", "jpeg_compression"]
