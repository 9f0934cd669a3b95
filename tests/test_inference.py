"""Tests `keras_mixer/inference/`: evaluation, prediction, export."""

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from conftest import SMALL, TINY, read_history
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

import keras_mixer
from keras_mixer import Config, InputError, RunError, fit, load_mixer
from keras_mixer.inference import evaluate as evaluate_module
from keras_mixer.inference import predict as predict_module
from keras_mixer.inference.evaluate import as_table, compute_logits, evaluate, score, score_run
from keras_mixer.inference.export import saved_model
from keras_mixer.inference.predict import (
    FORMATS,
    as_submission,
    classify,
    expand,
    predict_files,
    submission_ids,
)
from keras_mixer.inference.read_image import as_list
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.preprocessing.resize import resize_images, to_model_range
from keras_mixer.weights.convert import convert_weights


def spec_of(num_classes, names=None, loss="softmax"):
    architecture = SMALL.replace(channels=1, num_classes=num_classes)
    return ModelSpec(architecture, names, loss=loss)


PROBABILITIES = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid}


@pytest.fixture(scope="module")
def model(trained):
    return load_mixer(trained.best)


# === Evaluation ===


def test_scores_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    scores = score(logits, np.array([0, 1, 1, 2]), spec_of(3, ("a", "b", "c")))
    assert scores["top1"] == 0.75
    assert scores["top5"] == 1.0
    assert scores["n"] == 4
    assert scores["loss"] == pytest.approx(-np.log([0.7, 0.6, 0.3, 0.6]).mean())
    assert scores["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    a, b, c = scores["classes"]
    assert (a["precision"], a["recall"], a["n"]) == (0.5, 1.0, 1)
    assert (b["precision"], b["recall"], b["n"]) == (1.0, 0.5, 2)
    assert b["f1"] == pytest.approx(2 / 3)
    assert c["f1"] == 1.0
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert scores["balanced_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)


@pytest.mark.parametrize("label, correct", [(0, (1, 1)), (4, (0, 1)), (5, (0, 0)), (11, (0, 0))])
def test_of_equal_classes_the_first_ones_count_as_more_likely(label, correct):
    scores = score(np.zeros((3, 12)), np.full(3, label), spec_of(12))
    assert (scores["top1"], scores["top5"]) == correct


def test_means_over_classes_are_scikit_learns():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(300, 5)), generator.integers(0, 4, 300)
    scores = score(logits, labels, spec_of(5))
    predicted = logits.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is predicted, but has no images
        assert scores["balanced_accuracy"] == pytest.approx(
            balanced_accuracy_score(labels, predicted)
        )
    found = f1_score(labels, predicted, labels=range(4), average="macro")
    assert scores["macro_f1"] == pytest.approx(found)


def test_top5_counts_the_five_most_likely_classes():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 12)), generator.integers(0, 12, 200)
    ranks = (logits > logits[np.arange(200), labels][:, None]).sum(axis=1)
    scores = score(logits, labels, spec_of(12))
    assert scores["top5"] == (ranks < 5).mean()
    assert 0.2 < scores["top5"] < 0.7


def test_a_class_without_images_does_not_stop_the_scores():
    scores = score(np.eye(3)[[0, 1]], np.array([0, 1]), spec_of(3, ("a", "b", "never seen")))
    assert scores["classes"][2] == {
        "name": "never seen", "precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0,
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7, 128, 1000])
def test_every_image_counts_once_at_any_batch_size(trained, model, batch_size):
    split = trained.dataset.test.take(np.arange(50))
    logits, labels = compute_logits(model, model.spec, split, batch_size=batch_size)
    np.testing.assert_array_equal(labels, split.labels)
    np.testing.assert_allclose(logits, model(to_model_range(split.pixels)), atol=1e-5)


def test_evaluation_agrees_with_what_training_saw(trained):
    scores = evaluate(trained, split="validation").scores
    row = read_history(trained)[trained.selected_epoch - 1]
    assert scores["top1"] == pytest.approx(float(row["val_accuracy"]), abs=1e-6)
    assert scores["loss"] == pytest.approx(float(row["val_loss"]), abs=1e-5)
    assert scores["n"] == 144


def test_metrics_hold_validation_and_test_scores(trained):
    scores = trained.scores
    assert scores["test"].keys() == {"top1", "top5", "loss", "n"}
    assert scores["test"]["n"] == 360
    assert scores["validation"]["n"] == 144
    assert scores["test"]["top1"] > 0.5, "it has learned"


def test_the_test_set_is_scored_once(trained, monkeypatch):
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *_, **__: pytest.fail("scored again"))
    assert score_run(trained) == trained.scores


def test_table_shows_every_class_and_the_confusion(trained):
    scores = evaluate(trained).scores
    table = as_table(scores)
    assert f"top-1 {scores['top1']:.2%}" in table
    for row in scores["classes"]:
        assert f"{row['f1']:.2%}" in table
    assert " ".join(str(n) for n in scores["confusion"][3]) in " ".join(table.split())


# === Evaluation on other data ===


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory, trained):
    """Class folders of 5 test images of each of three digits, and their indices in the test set."""
    folder, test = tmp_path_factory.mktemp("few"), trained.dataset.test
    indices = [i for digit in (1, 3, 7) for i in np.flatnonzero(test.labels == digit)[:5]]
    for index in indices:
        path = folder / str(test.labels[index]) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(test.pixels[index].squeeze()).save(path)
    return folder, np.array(indices)


def test_a_run_is_scored_on_a_folder_of_some_of_its_classes(run, trained, few_digits):
    """In gray, as the model was trained, and with the classes of the model, by name."""
    folder, indices = few_digits
    words = ["--dataset=folder", "--data_dir", folder, "--format=json"]
    status, out, err = run("evaluate", trained.directory, *words)
    assert status == 0, err
    found, test = json.loads(out), trained.dataset.test.take(indices)
    logits, labels = compute_logits(load_mixer(trained.best), trained.spec, test)
    expected = score(logits, labels, trained.spec)
    for name in ("loss", "ece", "nll", "brier"):  # sums, whose last bits depend on the processor
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-9)
    assert found == {"split": "all images", **expected}
    assert [row["n"] for row in found["classes"]] == [0, 5, 0, 5, 0, 0, 0, 5, 0, 0]


def test_weights_without_class_names_are_scored_in_the_order_of_the_data(run, trained, tmp_path):
    convert_weights(trained.directory, tmp_path / "mixer.npz")
    status, out, err = run("evaluate", "mixer.npz", "--dataset=digits", "--test_fraction=0.2")
    assert status == 0, err
    assert (
        "mixer.npz has no class names: its classes are taken in the numeric order of the data's"
        in err
    )
    assert f"test: 360 images, top-1 {trained.scores['test']['top1']:.2%}" in out
    convert_weights(trained.directory, tmp_path / "mixer.safetensors")
    status, out, _ = run("evaluate", "mixer.safetensors", "--dataset=digits", "--format=json")
    assert (json.loads(out)["split"], json.loads(out)["n"]) == ("all images", 1797)


def test_what_cannot_be_scored_is_one_line(run, trained, few_digits, folder, tmp_path):
    convert_weights(trained.directory, tmp_path / "mixer.npz")
    on_folder = ("--dataset=folder", "--data_dir")
    for words, message in [
        ((trained.directory, *on_folder, folder), "does not know 3 of the data's 3 classes: ant,"),
        (("mixer.npz", *on_folder, few_digits[0]), "has 10 classes without names, the data have 3"),
        (("mixer.npz",), "mixer.npz: not a run directory .*; to evaluate on other images: --data"),
        (("preset:cifar10",), "preset:cifar10: no such run; to evaluate on other images: --data"),
        ((trained.directory, "--data_dir", few_digits[0]), "--dataset=digits is embedded"),
        ((trained.directory, "--test_fraction=0.5"), "--test_fraction=0.5 is for other data than"),
        (
            (trained.directory, *on_folder, few_digits[0], "--eval_split=test"),
            "--eval_split=test: this dataset has no test split; give one of train",
        ),
    ]:
        status, out, err = run("evaluate", *words)
        assert (status, out) == (2, "")
        assert re.search(f"^error: .*{message}", err.splitlines()[-1])


def test_a_single_class_is_enough_to_score_a_model(run, trained, few_digits, tmp_path):
    shutil.copytree(few_digits[0] / "7", tmp_path / "one" / "7")
    words = ["--dataset=folder", "--data_dir=one", "--format=json"]
    status, out, err = run("evaluate", trained.directory, *words)
    assert status == 0, err
    assert [row["n"] for row in json.loads(out)["classes"]][7] == json.loads(out)["n"] == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_no_scores(value):
    with pytest.raises(InputError, match="the model's outputs are not finite"):
        score(np.full((3, 4), value), np.zeros(3, int), spec_of(4))
    with pytest.raises(InputError, match="there are no images to score"):
        score(np.zeros((0, 4)), np.zeros(0, int), spec_of(4))


def test_a_missing_split_is_named(trained):
    dataset = dataclasses.replace(trained.dataset, test=None)
    message = "--eval_split=test: this dataset has no test split; give one of train, validation"
    with pytest.raises(InputError, match=message):
        evaluate(dataclasses.replace(trained, dataset=dataset), split="test")


# === Prediction ===


@pytest.fixture
def images(tmp_path, trained, write_image):
    """The first test digits as files of several kinds and sizes, and three broken ones."""
    folder = tmp_path / "images"
    for index in range(6):
        pixels = trained.dataset.test.pixels[index]
        write_image(folder / f"{index}.png", pixels)
    big = Image.fromarray(trained.dataset.test.pixels[0].squeeze()).resize((64, 48))
    (folder / "deep").mkdir()
    big.convert("RGB").save(folder / "deep" / "big.jpg")
    (folder / "truncated.png").write_bytes((folder / "0.png").read_bytes()[:-20])
    (folder / "text.jpg").write_text("hello")
    return folder


def test_files_folders_and_globs_are_found(images):
    assert len(expand([str(images)])) == 9
    assert len(expand([str(images / "*.png")])) == 7
    assert len(expand([str(images / "**" / "*.jpg")])) == 2
    assert expand(["nowhere.png", str(images / "*.gif")]) == ["nowhere.png", str(images / "*.gif")]


def test_predictions_are_the_models_own_and_broken_files_do_not_stop_them(trained, model, images):
    names = trained.dataset.class_names
    paths = [*expand([str(images)]), "nowhere.png"]
    rows = {Path(row["file"]).name: row for row in predict_files(model, paths, top_k=3)}
    assert len(rows) == 10
    for index in range(6):
        pixels = trained.dataset.test.pixels[index : index + 1]
        probabilities = tf.nn.softmax(model(to_model_range(pixels)))[0].numpy()
        best = np.argsort(-probabilities)[:3]
        found = rows[f"{index}.png"]["predictions"]
        assert [p["class"] for p in found] == [names[i] for i in best]
        np.testing.assert_allclose(
            [p["probability"] for p in found], probabilities[best], atol=1e-6
        )
    assert len(rows["big.jpg"]["predictions"]) == 3
    assert rows["truncated.png"]["error"] == "truncated"
    assert rows["text.jpg"]["error"] == "not a JPEG, PNG, BMP, WebP or GIF image"
    assert rows["nowhere.png"]["error"] == "no such file"


def test_dangling_links_are_reported(images):
    (images / "link.png").symlink_to(images / "gone.png")
    assert expand([str(images / "link.png")]) == [str(images / "link.png")]
    assert str(images / "link.png") not in expand([str(images / "*.png")])


def test_predictions_in_every_format(model, images):
    rows = list(predict_files(model, expand([str(images)]), top_k=2))
    assert json.loads(FORMATS["json"](rows)) == rows
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"](rows))))
    assert len(lines) == 7 * 2 + 2
    assert {line["rank"] for line in lines} == {"1", "2", ""}
    assert FORMATS["table"](rows).count("\n") == 9


def test_names_cannot_break_the_output():
    row = {"file": "=cmd()\x1b[31m\n.png", "predictions": [{"class": "+a", "probability": 1.0}]}
    (line,) = csv.DictReader(io.StringIO(FORMATS["csv"]([row])))
    assert line["file"].startswith("'=cmd()")
    assert line["class"] == "'+a"
    assert "\x1b" not in FORMATS["table"]([row])
    assert json.loads(FORMATS["json"]([row])) == [row]


def test_more_images_than_a_batch(model, images, monkeypatch):
    paths = expand([str(images)])
    whole = list(predict_files(model, paths))
    monkeypatch.setattr(predict_module, "EVALUATION_BATCH_SIZE", 4)
    for one, other in zip(whole, predict_files(model, paths), strict=True):
        assert one["file"] == other["file"]
        assert [p["class"] for p in one.get("predictions", [])] == [
            p["class"] for p in other.get("predictions", [])
        ]


# === From Python ===

FORMS = {  # of an image, by what makes it from the path and the pixels of a PNG file
    "string": lambda path, pixels: str(path),
    "bytes": lambda path, pixels: bytes(path),
    "path": lambda path, pixels: path,
    "content": lambda path, pixels: io.BytesIO(path.read_bytes()),
    "picture": lambda path, pixels: Image.open(path),
    "array": lambda path, pixels: pixels,
    "gray array": lambda path, pixels: pixels[..., 0],
    "color array": lambda path, pixels: pixels.repeat(3, axis=-1),
    "array with alpha": lambda path, pixels: np.dstack([*[pixels] * 3, pixels // 2]),
    "tensor": lambda path, pixels: tf.constant(pixels),
    "array not in a row": lambda path, pixels: np.asfortranarray(pixels[::-1])[::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form_are_predicted_as_on_the_command_line(trained, model, images, form):
    paths = [images / f"{index}.png" for index in range(3)]
    given = [
        FORMS[form](path, pixels)
        for path, pixels in zip(paths, trained.dataset.test.pixels, strict=False)
    ]
    expected = [row["predictions"] for row in predict_files(model, list(map(str, paths)), 4)]
    assert keras_mixer.predict(model, given, top_k=4) == expected
    (alone,) = keras_mixer.predict(model, given[0], top_k=4)
    assert [p["class"] for p in alone] == [p["class"] for p in expected[0]]
    batch = keras_mixer.preprocess(given, model)
    assert (batch.shape, batch.dtype) == ((3, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(batch, to_model_range(trained.dataset.test.pixels[:3]))
    np.testing.assert_array_equal(keras_mixer.preprocess(given[0], model), batch[:1])
    probabilities = tf.nn.softmax(model.predict(batch, verbose=0)).numpy()
    found = [[p["probability"] for p in row] for row in expected]
    np.testing.assert_allclose(found, -np.sort(-probabilities)[:, :4], atol=1e-6)


def test_lists_of_images_come_in_several_forms(trained, model, images):
    paths = [str(images / f"{index}.png") for index in range(3)]
    expected = keras_mixer.predict(model, paths)
    pixels = trained.dataset.test.pixels[:3]
    for given in (tuple(paths), np.array(paths), iter(paths), pixels, tf.constant(pixels)):
        assert keras_mixer.predict(model, given) == expected
    mixed = keras_mixer.predict(model, [paths[0], pixels[1], Image.open(paths[2])], top_k=1)
    assert mixed == [row[:1] for row in expected]
    assert keras_mixer.predict(str(trained.directory), paths) == expected
    assert keras_mixer.predict(trained.directory, pixels[0])[0][0]["class"] == mixed[0][0]["class"]
    np.testing.assert_array_equal(
        keras_mixer.preprocess(paths, trained.directory), to_model_range(pixels)
    )
    assert keras_mixer.predict(model, []) == []
    assert keras_mixer.preprocess([], model).shape == (0, 8, 8, 1)


def test_a_single_image_is_a_list_of_one():
    for one in ("a.png", b"a.png", Path("a.png"), io.BytesIO(), NOISE):
        assert as_list(one) == [one]
    assert len(as_list(np.zeros((8, 8, 3), np.uint8))) == 1
    assert len(as_list(np.zeros((5, 8, 8, 3), np.uint8))) == 5
    assert as_list(iter(["a.png", "b.png"])) == ["a.png", "b.png"]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8))
VEILED = NOISE.convert("RGBA")
VEILED.putalpha(NOISE.convert("L"))
WIDE = np.random.default_rng(1).integers(0, 65536, (9, 11), np.uint16)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation

PALETTE = NOISE.convert("P")
CORNER = {
    name: picture.getpixel((0, 0)) for name, picture in (("color", NOISE), ("index", PALETTE))
}

PICTURES = {
    **{m: (NOISE.convert(m), "PNG", {}) for m in ("1", "L", "LA", "P", "RGB")},
    "half transparent": (VEILED, "PNG", {}),
    "palette with alpha": (PALETTE, "PNG", {"transparency": bytes(range(256))}),
    "one color transparent": (NOISE, "PNG", {"transparency": CORNER["color"]}),
    "16 bits": (Image.fromarray(WIDE), "PNG", {}),
    "gif": (PALETTE, "GIF", {}),
    "transparent gif": (PALETTE, "GIF", {"transparency": CORNER["index"]}),
    "webp": (VEILED, "WEBP", {"lossless": True, "exact": True}),
    "cmyk jpeg": (NOISE.convert("CMYK"), "JPEG", {}),
    "png that says it is turned": (NOISE, "PNG", {"exif": TURNED}),
    "turned jpeg": (NOISE, "JPEG", {"exif": TURNED, "quality": 95}),
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PICTURES)
def test_opened_pictures_are_prepared_as_their_files_are(tmp_path, name, channels):
    """JPEGs but for 2 levels, where Pillow brings another libjpeg."""
    picture, kind, options = PICTURES[name]
    picture.save(tmp_path / "image", kind, **options)
    shape = {"image_shape": (11, 9), "patch_shape": (11, 9)} if name.startswith("turned") else {
        "image_shape": (9, 11), "patch_shape": (9, 11)}  # fmt: skip
    model = SimpleNamespace(spec=ModelSpec(SMALL.replace(channels=channels, **shape)))
    by_file = keras_mixer.preprocess(tmp_path / "image", model)
    with Image.open(tmp_path / "image") as picture:
        opened = keras_mixer.preprocess(picture, model)
    assert by_file.std() > 0.1
    assert np.abs(opened - by_file).max() <= (2 / 127.5 if kind == "JPEG" else 0)


def test_gray_is_the_luma_of_color_and_color_is_repeated_gray(photos):
    gray, color = (
        SimpleNamespace(spec=ModelSpec(SMALL.replace(channels=channels))) for channels in (1, 3)
    )
    photo = photos[0][:8, :12]
    luma = (photo.astype(int) @ [19595, 38470, 7471] + 32768 >> 16).astype(np.uint8)
    expected = to_model_range(luma[None, ..., None])
    np.testing.assert_array_equal(keras_mixer.preprocess(photo, gray), expected)
    np.testing.assert_array_equal(
        keras_mixer.preprocess(luma, color), np.repeat(expected, 3, axis=-1)
    )


PHOTO = np.arange(8 * 8 * 3).reshape(8, 8, 3).astype(np.uint8)
REFUSED = {
    "floats to 1": (
        (PHOTO // 191).astype("float32"),
        r"images\[0\]: expected uint8 from 0 to 255, received float32 from 0.0 to 1.0; scale it to "
        r"0 to 255 and convert it with \.round\(\).astype\('uint8'\)$",
    ),
    "16 bits": (PHOTO.astype("uint16") * 300, "received uint16 from 0 to 57300; scale it"),
    "truth values": (PHOTO > 7, "received bool from False to True"),
    "NaN": (PHOTO * np.nan, "received float64 from nan to nan"),
    "32 bits in Pillow": (Image.fromarray(PHOTO[..., 0] / np.float32(255)), "float32 from 0.0 to"),
    "second of a list": ([PHOTO, PHOTO / 255], r"images\[1\]: expected uint8"),
    "nothing": (None, "received NoneType; give a path"),
    "text": ([["a"]], "received <U1; give a path"),
    "channels": (PHOTO[..., :2], r"channels, received \(8, 8, 2\)$"),
    "channels first": (PHOTO.transpose(2, 0, 1), r"received \(3, 8, 8\)$"),
    "two batches": ([PHOTO[None]], r"received \(1, 8, 8, 3\)$"),
    "no pixels": (PHOTO[:0], r"received \(0, 8, 3\)$"),
    "no file": ("nowhere.png", "^nowhere.png: no such file$"),
    "no file in a list": ([PHOTO, Path("nowhere.png")], "^nowhere.png: no such file$"),
    "bytes of a file": (b"\x89PNG\0" * 9999, "no such file$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_in_one_line(model, name):
    images, message = REFUSED[name]
    for call in (lambda: keras_mixer.predict(model, images),
                 lambda: keras_mixer.preprocess(images, model)):  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) < 1100


def test_damaged_images_are_named(model, images):
    with pytest.raises(InputError, match=r"images/truncated.png: truncated$"):
        keras_mixer.predict(model, [images / "0.png", images / "truncated.png"])
    with pytest.raises(
        InputError, match="images/deep: expected an image, received a folder of 1; give"
    ):
        keras_mixer.predict(model, images / "deep")
    (images / "half.jpg").write_bytes((images / "deep" / "big.jpg").read_bytes()[:-300])
    with (
        Image.open(images / "half.jpg") as half,
        pytest.raises(InputError, match=r"images\[0\]: Pillow cannot read it \(.*truncated"),
    ):
        keras_mixer.predict(model, half)


def test_a_model_must_know_its_preprocessing(images):
    model = keras_mixer.build_mixer(**vars(SMALL))
    for call in (keras_mixer.predict, lambda *two: keras_mixer.preprocess(*reversed(two))):
        with pytest.raises(
            InputError, match="received Functional without; load it with load_mixer"
        ):
            call(model, images / "0.png")
        with pytest.raises(InputError, match="nowhere: no such checkpoint"):
            call("nowhere", images / "0.png")


def test_top_k_is_at_least_one(model, images):
    with pytest.raises(InputError, match="top_k: expected an integer at least 1, received 0"):
        keras_mixer.predict(model, images / "0.png", top_k=0)


# === A submission ===


def test_a_submission_holds_every_class_in_the_models_order(trained, model, images):
    names = trained.dataset.class_names
    paths = [p for p in expand([str(images)]) if Path(p).stem in "012345"]
    found = list(classify(model, paths))
    ids = submission_ids(paths)
    assert ids == ["0", "1", "2", "3", "4", "5"]
    text = as_submission([(id, p) for id, (_, p) in zip(ids, found, strict=True)], names)
    header, *lines = csv.reader(io.StringIO(text))
    assert header == ["id", *names]
    expected = tf.nn.softmax(model(to_model_range(trained.dataset.test.pixels[:6]))).numpy()
    for line, row in zip(lines, expected, strict=True):
        probabilities = np.array(line[1:], float)
        np.testing.assert_allclose(probabilities, row, atol=1e-6)
        assert abs(probabilities.sum() - 1) < 1e-6
    assert [line[0] for line in lines] == ids


@pytest.mark.parametrize("loss", PROBABILITIES)
def test_probabilities_of_a_thousand_classes_sum_to_one(images, loss):
    """As text, too, and closer than float32 or six digits come."""
    logits = np.random.default_rng(0).normal(0, 3, (1, 1000)).astype(np.float32)
    model = SimpleNamespace(
        spec=spec_of(1000, loss=loss),
        input_shape=(None, 8, 12, 1),
        predict_on_batch=lambda images: logits,
    )
    ((_, probabilities),) = classify(model, [str(images / "0.png")])
    np.testing.assert_allclose(probabilities, PROBABILITIES[loss](logits[0]), rtol=1e-5)
    text = as_submission([("0", probabilities)], [str(i) for i in range(1000)])
    _, line = csv.reader(io.StringIO(text))
    assert abs(np.array(line[1:], float).sum() - 1) < 1e-8
    assert min(np.array(line[1:], float)) > 0


def test_names_in_a_submission_are_as_kaggle_has_them():
    names = ['=a,"b"', "+c\nd", "-é"]
    text = as_submission([("x,y\udcff", np.array([0.5, 0.25, 0.25]))], names)
    header, line = csv.reader(io.StringIO(text))
    assert header == ["id", *names]
    assert line == ["x,y\\xff", "0.5", "0.25", "0.25"]
    text.encode()


def test_images_that_share_an_id_are_refused():
    with pytest.raises(InputError, match=r"2 images share their names.*: a/1\.png, b/1\.jpg$"):
        submission_ids(["a/1.png", "a/2.png", "b/1.jpg"])


# === Export ===

SERVE = """
import importlib.machinery, json, sys

class Refusal:
    # Finds keras and keras_mixer, since TensorFlow asks where keras lies, but imports neither.
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("keras", "tf_keras", "keras_mixer"):
            return importlib.machinery.ModuleSpec(name, self, origin="refused")

    def create_module(self, spec):
        raise ImportError(f"{spec.name} must not be needed")

    def exec_module(self, module):
        raise ImportError(f"{module} must not be needed")

sys.meta_path.insert(0, Refusal())
import numpy as np
import tensorflow as tf

serve = tf.saved_model.load(sys.argv[1]).signatures
results = {}
for path in sys.argv[2:]:
    content = tf.io.read_file(path)
    by_bytes = serve["serve_bytes"](image_bytes=tf.stack([content, content]))
    channels = serve["serving_default"].structured_input_signature[1]["images"].shape[-1]
    pixels = tf.io.decode_jpeg(content, channels=channels, dct_method="INTEGER_ACCURATE")
    by_pixels = serve["serving_default"](images=pixels[None])
    results[path] = {
        name: {
            "logits": answer["logits"].numpy().tolist(),
            "probabilities": answer["probabilities"].numpy().tolist(),
            "class_names": [[n.decode() for n in row] for row in answer["class_names"].numpy()],
        }
        for name, answer in (("bytes", by_bytes), ("pixels", by_pixels))
    }
assert not any(name.split(".")[0] in ("keras", "keras_mixer") for name in sys.modules)
print(json.dumps(results))
"""


@pytest.mark.parametrize(("precision", "loss"), [("float32", "softmax"), ("bfloat16", "sigmoid")])
def test_tensorflow_alone_serves_what_the_model_computes(tmp_path, folder, precision, loss):
    """After training in either precision, on real images of several sizes."""
    config = Config(
        **{**TINY, "dataset": "folder", "data_dir": str(folder), "image_shape": (8, 8),
           "patch_shape": (4, 4), "batch_size": 8, "num_steps": 2},
        precision=precision, loss=loss, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run = fit(config)
    target = keras_mixer.export(run, export_dir=tmp_path / "exports", name="pets")
    assert target == tmp_path / "exports" / "pets" / "1"
    paths = [str(p) for p in sorted(folder.rglob("*.*g"))[:8]]
    script = subprocess.run(
        [sys.executable, "-c", SERVE, str(target), *paths],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    answers = json.loads(script.stdout.splitlines()[-1])
    model = load_mixer(run.best)
    sizes = set()
    for path in paths:
        pixels = tf.io.decode_image(tf.io.read_file(path), channels=3)
        if path.endswith("jpg"):
            pixels = np.asarray(Image.open(path))  # the same DCT as ours
        sizes.add(pixels.shape)
        expected = model(to_model_range(resize_images(pixels, (8, 8)))[None])[0]
        for answer in (*answers[path]["bytes"]["logits"], *answers[path]["pixels"]["logits"]):
            np.testing.assert_allclose(
                answer, expected, atol=1e-5 if path.endswith("png") else 0.05
            )
        for answer in answers[path].values():
            np.testing.assert_allclose(
                answer["probabilities"], PROBABILITIES[loss](answer["logits"]), atol=1e-6
            )
            assert answer["class_names"] == [["ant", "bee", "cat"]] * len(answer["logits"])
    assert len(sizes) > 3


def test_versions_count_up_and_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "digits" / "7").mkdir(parents=True)
    (tmp_path / "digits" / "notes").mkdir()
    assert keras_mixer.export(trained, export_dir=tmp_path, name="digits").name == "8"
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == ["7", "8", "notes"]


def test_an_export_that_disagrees_is_not_published(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match="differs from the model"):
        keras_mixer.export(trained, export_dir=tmp_path, name="digits")
    assert list((tmp_path / "digits").iterdir()) == []


def test_an_export_dir_that_cannot_be_written_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--export_dir=.*file: cannot write"):
        keras_mixer.export(trained, export_dir=tmp_path / "file", name="digits")
