"""Tests `keras_mixer/inference/verify.py` and its command: match or no match."""

import dataclasses
import json
import math
import shutil
from statistics import NormalDist

import numpy as np
import pytest
from conftest import GOLDEN, rewrite
from PIL import Image

from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.__main__ import main
from keras_mixer.commands.weights import VerifyOptions
from keras_mixer.config.data import DatasetOptions
from keras_mixer.data.sources import open_dataset
from keras_mixer.inference.verify import (
    Claim,
    as_text,
    check_classes,
    claim_of,
    claim_of_run,
    interval_of,
    matches,
    verify_accuracy,
)
from keras_mixer.model.architecture import Architecture, ModelSpec, Preprocessing
from keras_mixer.preprocessing.resize import to_model_range
from keras_mixer.weights import model_folder
from keras_mixer.weights.download import cache_path
from keras_mixer.weights.load import model_weights
from keras_mixer.weights.pretrained import read_pretrained
from keras_mixer.weights.registry import OFFICIAL, Published

NAME, FILE = "imagenet1k/Mixer-B_16", GOLDEN / "official_mixer.npz"
SHAPE, CLASSES, IMAGES, RIGHT = (24, 16), 5, 60, 48


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """A folder whose 60 test images have the labels that the golden model gives, but for 12."""
    folder = tmp_path_factory.mktemp("labeled")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE, 3), np.uint8)
    labels = np.asarray(load_mixer(FILE, SHAPE)(to_model_range(pixels))).argmax(1)
    labels[:12] = (labels[:12] + 1 + np.arange(12) % (CLASSES - 1)) % CLASSES
    for name in range(CLASSES):
        (folder / "train" / str(name)).mkdir(parents=True)
        (folder / "test" / str(name)).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(folder / "train" / str(name) / "any.png")
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).save(folder / "test" / str(label) / f"{index:02}.png")
    return folder


@pytest.fixture
def verify(labeled, capsys):
    """Runs the command on the labeled images; returns its status and what it printed."""

    def run(path=FILE, *flags):
        data = ("--dataset=folder", f"--data_dir={labeled}", "--validation_fraction=0")
        status = main(["verify", str(path), *data, "--image_shape=24,16", *flags])
        shown = capsys.readouterr()
        return status, shown.out, " ".join(shown.err.split())

    return run


# === The interval ===


@pytest.mark.parametrize("correct, n, confidence", [
    (48, 60, 0.95), (38_220, 50_000, 0.95), (38_220, 50_000, 0.5), (0, 10, 0.95), (7, 7, 0.99),
])  # fmt: skip
def test_interval_is_wilsons(correct, n, confidence):
    """Wilson 1927: the shares p for which |k/n - p| is z standard deviations of p, at most."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    center, half = correct + z * z / 2, z * math.sqrt(correct * (n - correct) / n + z * z / 4)
    expected = [(center - half) / (n + z * z), (center + half) / (n + z * z)]
    assert interval_of(correct, n, confidence) == pytest.approx(expected, abs=1e-12)


# === Match or no match ===


def test_a_match_says_what_was_done(verify):
    status, out, _ = verify(FILE, "--expected=0.8")
    assert status == 0
    assert out.startswith(f"match: {FILE} on folder, split test\n")
    assert "80.00% top-1 (68.22% to 88.17%, Wilson's interval of 0.95), 100.00% top-5, 60 im" in out
    assert "80.00% ± 0.005 points (--expected)" in out
    assert "eval_crop 0, bilinear, pixels 0 to 255 scaled" in out
    assert "not named in the checkpoint; taken to be in the order of the data" in out


LOW, HIGH = (round(bound, 7) for bound in interval_of(RIGHT, IMAGES, 0.95))


@pytest.mark.parametrize("expected, confidence, match", [
    (0.8, 0.95, True), (0.8, 0.001, True), (0.9, 0.95, False), (0.7, 0.95, True),
    (0.7, 0.5, False), (0.9, 0.999, True),
    (HIGH + 0.00004, 0.95, True), (HIGH + 0.00006, 0.95, False),
    (LOW - 0.00004, 0.95, True), (LOW - 0.00006, 0.95, False),
    (0.0, 0.95, False), (1.0, 0.95, False),
])  # fmt: skip
def test_the_figure_must_lie_in_the_interval_up_to_its_rounding(expected, confidence, match):
    claim = claim_of(FILE, "folder", "test", expected)
    assert matches(claim, RIGHT, IMAGES, confidence) is match


def test_a_score_of_our_own_must_agree_to_the_image():
    claim = Claim(Published(48 / 60, "metrics.json", "", 0.0), exact=True)
    assert [matches(claim, correct, 60, 0.95) for correct in (47, 48, 49)] == [False, True, False]


def test_no_match_is_exit_status_1(verify):
    status, out, _ = verify(FILE, "--expected=0.9")
    assert status == 1 and out.startswith("no match: ")
    assert verify(FILE, "--expected=0.9", "--confidence=0.999")[0] == 0


@pytest.mark.parametrize("top1, rounding, status", [
    (0.89, 0.00005, 1), (0.89, 0.0084, 0),
])  # fmt: skip
def test_a_released_file_is_compared_with_what_was_published(
    verify, monkeypatch, top1, rounding, status
):
    """Without a network: the file lies where a download would have put it."""
    figure = Published(top1, "A. Uthor, Table 7", "by hand", rounding)
    stand_in = {"size": 0.05, "num_classes": CLASSES, "published": {"folder": figure}}
    monkeypatch.setitem(OFFICIAL, NAME, OFFICIAL[NAME]._replace(**stand_in))
    cache_path(NAME).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(FILE, cache_path(NAME))
    found, out, errors = verify(f"official:{NAME}")
    assert found == status
    assert "(A. Uthor, Table 7)" in out and "expected: by hand; the official code resiz" in out
    assert f"\n  weights   {OFFICIAL[NAME].provenance}\n" in out
    assert "trained on ImageNet-1k alone" in errors
    assert verify(cache_path(NAME))[0] == status, "a local copy of that name and size"
    assert verify(f"official:{NAME}", "--expected=0.8")[0] == 0, "the user's own figure wins"


def test_json_holds_the_same(verify):
    status, out, _ = verify(FILE, "--expected=0.5", "--format=json", "--batch_size=7")
    result = json.loads(out)
    assert status == 1 and result["match"] is False
    assert (result["top1"], result["top5"], result["n"]) == (0.8, 1.0, 60)
    assert result["interval"] == pytest.approx([LOW, HIGH], abs=1e-6)
    assert result["expected"]["top1"] == 0.5 and result["class_names_known"] is False


def test_every_image_of_the_split_is_scored(verify):
    _, out, _ = verify(FILE, "--expected=0.2", "--eval_split=train", "--format=json")
    assert json.loads(out)["n"] == CLASSES
    assert json.loads(out)["top1"] == 1 / CLASSES, "one image under every label"


# === Preprocessing ===


def cropped(photo, size=32, side=16):
    """Pillow's way: the short side to 32 pixels, the central 16 of them: an eval_crop of 0.5."""
    width, height = photo.size
    scale = size / min(width, height)
    photo = photo.resize((round(width * scale), round(height * scale)), Image.BILINEAR)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return np.asarray(photo.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("eval_crop, top1", [(0.5, 1.0), (0.0, None)])
def test_images_are_resized_as_the_checkpoint_has_it(tmp_path, capsys, photos, eval_crop, top1):
    """Labels are the model's own on images that Pillow cropped; squashed ones get others."""
    architecture = Architecture(
        image_shape=(16, 16), patch_shape=(4, 4), depth=2, dim=16, channels_mlp_dim=32,
        num_classes=4,
    )  # fmt: skip
    model, generator = build_mixer(**vars(architecture)), np.random.default_rng(1)
    for variable in model.weights:
        variable.assign(generator.normal(scale=0.5, size=variable.shape))
    corners = generator.integers(0, 300, (40, 2))
    cuts = [
        Image.fromarray(photos[i % 2][y : y + 90, x : x + 150]) for i, (y, x) in enumerate(corners)
    ]
    logits = np.asarray(model(to_model_range(np.stack(list(map(cropped, cuts))))))
    bias = model.get_layer("head").bias
    bias.assign(np.asarray(bias) - logits.mean(0))  # so that every class is predicted
    logits = logits - logits.mean(0)
    folder, names, rows = tmp_path / "model", ("a", "b", "c", "d"), ["file,label,split"]
    spec = ModelSpec(architecture, names, Preprocessing(eval_crop))
    model_folder.write_spec(folder, spec)
    model_folder.write_weights(folder, model_weights(model))
    for index, (cut, row) in enumerate(zip(cuts, logits, strict=True)):
        if np.diff(np.sort(row)[-2:]) > 0.05:  # a level's difference in resizing changes none
            rows.append(f"{index}.png,{names[row.argmax()]},test")
        cut.save(tmp_path / f"{index}.png")
    for name in names:
        cuts[0].save(tmp_path / f"{name}.png")
        rows.append(f"{name}.png,{name},train")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    flags = ["--dataset=csv", f"--data_dir={tmp_path}", "--validation_fraction=0", "--format=json"]
    main(["verify", str(folder), *flags, "--expected=0.5"])
    result = json.loads(capsys.readouterr().out)
    assert f"eval_crop {eval_crop:g}, " in result["preprocessing"] and result["class_names_known"]
    assert result["n"] >= 20 and len({row.split(",")[1] for row in rows[1:-4]}) == 4
    assert result["top1"] == 1.0 if top1 else result["top1"] < 1.0


# === A run and its own score ===


def test_a_run_matches_its_own_score_to_the_image(trained, tmp_path, capsys):
    assert main(["verify", str(trained.directory)]) == 0
    out = capsys.readouterr().out
    assert "on its own data, split test" in out
    assert f"{trained.scores['test']['top1']:.2%} to the image (" in out
    assert "named alike in the checkpoint and in the data" in out
    assert main(["verify", str(trained.directory), "--eval_split=validation"]) == 0
    copy = shutil.copytree(trained.directory, tmp_path / "copy")
    one = 1 / trained.scores["test"]["n"]
    lower = trained.scores["test"]["top1"] - one
    rewrite(copy / "metrics.json", lambda metrics: metrics["test"].update(top1=lower))
    assert main(["verify", str(copy)]) == 1, "one image less"
    rewrite(copy / "metrics.json", lambda metrics: metrics.pop("test"))
    capsys.readouterr()
    assert main(["verify", str(copy)]) == 2
    assert "has no score of --eval_split=test; it has validation" in capsys.readouterr().err


def test_the_claim_of_a_run_names_its_file(trained):
    claim = claim_of_run(trained, "test")
    assert claim.exact and claim.published.source == f"{trained.directory}/metrics.json"
    assert claim.published.top1 == trained.scores["test"]["top1"]


# === What is refused, before anything is downloaded or computed ===


@pytest.fixture
def offline(monkeypatch):
    """Any download would fail, and name this address."""
    monkeypatch.setenv("KERAS_MIXER_OFFICIAL", "http://127.0.0.1:1")


REFUSED = {
    "official:imagenet21k/Mixer-B_16 --dataset=imagenet2012":
        "no accuracy of this file itself was found (trained on ImageNet-21k",
    "official:gsam/Mixer-S_8 --dataset=imagenet2012": "no accuracy of this file itself",
    "official:imagenet1k/Mixer-L_16 --dataset=cifar10": "on the test split of imagenet2012 only",
    "official:imagenet1k/Mixer-L_16 --dataset=imagenet2012 --eval_split=train":
        "on the test split of imagenet2012 only",
    f"{FILE} --dataset=digits": "it is none of the released files",
    "official:imagenet1k/Mixer-L_16 --dataset=digits --expected=0.5":
        "has 1,000 classes, the data have 10",
    "official:imagenet21k/Mixer-L_16 --dataset=digits --expected=0.5":
        "has 21,843 classes, the data have 10",
    "official:imagenet1k/Mixer-B16 --dataset=imagenet2012 --expected=0.5":
        "did you mean official:imagenet1k/Mixer-B_16?",
    f"{FILE}": "not a run directory (it holds no config.json); --dataset names other data",
    f"{FILE} --dataset=digits --expected=0.5": "image_shape",
    f"{FILE} --dataset=digits --expected=0.5 --image_shape=24,16":
        "has 5 classes, the data have 10",
    f"{FILE} --dataset=digits --expected=1.5": "--expected: expected a number at least 0.0",
    f"{FILE} --dataset=digits --expected=1 --confidence=1": "--confidence",
    f"{FILE} --dataset=digits --expected=nan": "--expected",
    "": "expected exactly one CHECKPOINT, received 0",
}  # fmt: skip


@pytest.mark.parametrize("line, message", REFUSED.items())
def test_what_cannot_be_verified_is_refused(offline, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert main(["verify", *line.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "127.0.0.1" not in error
    assert error.count("\n") == 1


def test_classes_and_channels_must_be_those_of_the_data(trained):
    dataset, names = trained.dataset, trained.dataset.class_names
    check_classes("x", dataset, 10, 1, names)
    check_classes("x", dataset, 10)
    with pytest.raises(InputError, match="x: has 9 classes, the data have 10"):
        check_classes("x", dataset, 9)
    with pytest.raises(InputError, match="x: has 3 channels, the data have 1"):
        check_classes("x", dataset, 10, 3)
    with pytest.raises(InputError, match="0 is 1, not 0; 1 is 2, not 1; 2 is 3, not 2 and 7 more"):
        check_classes("x", dataset, 10, 1, (*names[1:], names[0]))
    with pytest.raises(InputError, match="the data: 9 is nine, not 9$"):
        check_classes("x", dataset, 10, 1, (*names[:9], "nine"))


def test_the_claim_about_a_released_file_is_the_published_one():
    claim = claim_of(f"official:{NAME}", "imagenet2012", "test")
    assert claim.published.top1 == 0.7644 and not claim.exact
    assert claim_of(f"official:{NAME}", "imagenet2012", "test", 0.5).published.top1 == 0.5


def test_data_flags_have_the_defaults_of_train():
    verify, train = (
        {field.name: field.default for field in dataclasses.fields(options)}
        for options in (VerifyOptions, DatasetOptions)
    )
    assert {"validation_fraction", "test_fraction", "split_seed", "labels"} <= train.keys()
    assert train.items() - {("dataset", "digits")} <= verify.items()


def test_names_cannot_break_the_output(labeled):
    dataset = open_dataset("folder", labeled, 0.0)
    result = verify_accuracy(
        read_pretrained(FILE, SHAPE), FILE, dataset.test, dataset.class_names,
        claim_of(FILE, "folder", "test", 0.8), 0.95, 128,
    )  # fmt: skip
    assert "\x1b" not in as_text(result, "\x1b[31m")
