"""Tests `keras_mixer.evaluate` on data of all kinds, and `evaluate --expected`."""

import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, TINY, randomize, rewrite
from PIL import Image

import keras_mixer
from keras_mixer import Config, InputError, build_mixer, load_mixer
from keras_mixer.inference.calibration import wilson_interval
from keras_mixer.inference.evaluate import _compare
from keras_mixer.inference.published import published_accuracy
from keras_mixer.model.architecture import Architecture, ModelSpec, Preprocessing
from keras_mixer.preprocessing.resize import to_model_range
from keras_mixer.weights import model_folder, official
from keras_mixer.weights.download import cache_path
from keras_mixer.weights.load import model_weights
from keras_mixer.weights.registry import OFFICIAL, Published

NAME, FILE = "imagenet1k/Mixer-B_16", GOLDEN / "official_mixer.npz"
SHAPE, CLASSES, IMAGES, RIGHT = (24, 16), 5, 60, 48


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    return load_mixer(FILE, SHAPE)


@pytest.fixture(scope="module")
def labels(pixels, model):
    """The labels that the golden model gives to the images, except for 12."""
    labels = np.asarray(model(to_model_range(pixels))).argmax(1)
    labels[:12] = (labels[:12] + 1 + np.arange(12) % (CLASSES - 1)) % CLASSES
    return labels


@pytest.fixture(scope="module")
def labeled(tmp_path_factory, pixels, labels):
    """A folder with these images as test images, and one training image of each class."""
    folder = tmp_path_factory.mktemp("labeled")
    for name in range(CLASSES):
        (folder / "train" / str(name)).mkdir(parents=True)
        (folder / "test" / str(name)).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(folder / "train" / str(name) / "any.png")
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).save(folder / "test" / str(label) / f"{index:02}.png")
    return folder


# === From Python ===


def test_a_model_is_evaluated_on_arrays_paths_and_folders(model, pixels, labels, labeled):
    arrays = keras_mixer.evaluate(model, (pixels, labels))
    assert (arrays.scores["top1"], arrays.scores["n"]) == (RIGHT / IMAGES, IMAGES)
    assert arrays.confusion.shape == (CLASSES, CLASSES) and np.trace(arrays.confusion) == RIGHT
    right = [image["predicted"] == image["label"] for image in arrays.predictions]
    assert np.flatnonzero(np.logical_not(right)).tolist() == list(range(12))
    assert arrays.predictions[20]["probabilities"].sum() == pytest.approx(1)
    assert str(arrays).startswith("all images: 60 images, top-1 80.00%")
    paths = sorted((labeled / "test").rglob("*.png"), key=lambda path: path.name)
    files = keras_mixer.evaluate(model, (paths, [str(label) for label in labels]), batch_size=7)
    assert files.scores["confusion"] == arrays.scores["confusion"]
    assert files.predictions[3]["name"] == str(paths[3])
    folder = keras_mixer.evaluate(FILE, labeled / "test", image_shape=SHAPE)
    assert folder.scores["confusion"] == arrays.scores["confusion"]
    assert {image["name"].split("/")[0] for image in folder.predictions} == set("01234")


def test_a_run_is_evaluated_on_its_own_data(trained):
    result = keras_mixer.evaluate(trained)
    assert result.scores["split"] == "test"
    assert result.scores["top1"] == trained.scores["test"]["top1"]
    again = keras_mixer.evaluate(str(trained.directory), trained.dataset, "test").scores
    assert again == result.scores


@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    """The weights of a model of 11 classes without names, and a function that makes class folders.

    It answers all images right but 10 of the 11 black ones: one in each of the folders.
    """
    root, generator = tmp_path_factory.mktemp("eleven"), np.random.default_rng(0)
    sizes = Architecture(image_shape=(8, 8), patch_shape=(4, 4), depth=1, dim=16, num_classes=11)
    model = randomize(build_mixer(**vars(sizes)))
    official.write(root / "x.npz", ModelSpec(sizes), model_weights(model))
    pixels = generator.integers(0, 256, (60, 8, 8, 3), np.uint8)
    answers = np.asarray(model(to_model_range(pixels))).argmax(1)

    def folder_of(names):
        pairs = [*zip(answers, pixels, strict=True), *((i, 0 * pixels[0]) for i in range(11))]
        for index, (answer, image) in enumerate(pairs):
            path = root / names[0] / names[answer] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return root / names[0]

    return root / "x.npz", folder_of


def test_numbered_classes_are_matched_as_numbers_and_others_by_a_list(eleven, run, tmp_path):
    file, folder_of = eleven
    right = (60 + 1) / (60 + 11)
    numbered = keras_mixer.evaluate(file, folder_of([str(n) for n in range(11)])).scores
    assert (numbered["top1"], numbered.get("class_order")) == (right, None)
    names = list("kjihgfedcba")
    line = ["evaluate", file, "--dataset=folder", f"--data_dir={folder_of(names)}"]
    _, out, _ = run(*line)
    assert "order of the model's classes: assumed, that of the data's" in out
    assumed = json.loads(run(*line, "--format=json")[1])
    assert assumed["class_order"] == "assumed" and assumed["top1"] < right
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    told = json.loads(run(*line, "--format=json", "--class_names=names.txt")[1])
    assert (told["top1"], told.get("class_order")) == (right, None)
    assert told["classes"][0]["name"] == "k"
    (tmp_path / "names.txt").write_text("k\nj\n")
    status, _, err = run(*line, "--class_names=names.txt")
    assert status == 2 and "class_names: expected 11 names, received ('k', 'j')" in err
    folder = folder_of(names)
    shutil.rmtree(folder / "j")
    with pytest.raises(InputError, match="several of its classes have the same name: k"):
        keras_mixer.evaluate(file, folder, class_names=["k", "k", *names[2:]])


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "the model: not a run, so it needs data to be evaluated on"),
        ((np.zeros((2, *SHAPE, 3), np.uint8), [0]), "2 images, 1 labels"),
        ((np.zeros((2, *SHAPE, 3), np.uint8), [0, 5]), "no class of the model: 5"),
        ((np.zeros((2, *SHAPE, 3), np.uint8), ["0", "ant"]), "no class of the model: ant"),
        ((np.zeros((2, *SHAPE, 3)), [0, 1]), "uint8 array .* received float64 of shape"),
        ((np.zeros((2, *SHAPE), np.uint8), [0, 1]), "3 channels, the data have 1"),
        ((["nowhere.png"], [0]), "images: No such file"),
    ],
)
def test_data_that_do_not_fit_are_refused(model, data, message):
    with pytest.raises(InputError, match=message):
        keras_mixer.evaluate(model, data)


def cropped(photo, size=32, side=16):
    """Pillow's way: the short side to 32 pixels, the central 16 of them: an eval_crop of 0.5."""
    width, height = photo.size
    scale = size / min(width, height)
    photo = photo.resize((round(width * scale), round(height * scale)), Image.BILINEAR)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return np.asarray(photo.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("eval_crop, top1", [(0.5, 1.0), (0.0, None)])
def test_images_are_resized_as_the_checkpoint_has_it(tmp_path, photos, eval_crop, top1):
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
    spec = ModelSpec(architecture, ("a", "b", "c", "d"), Preprocessing(eval_crop))
    model_folder.write_spec(tmp_path / "model", spec)
    model_folder.write_weights(tmp_path / "model", model_weights(model))
    clear = np.diff(np.sort(logits)[:, -2:]).squeeze() > 0.05  # a level's difference changes none
    cuts = [cut for cut, kept in zip(cuts, clear, strict=True) if kept]
    labels = logits.argmax(1)[clear]
    assert len(cuts) >= 20 and len(set(labels)) == 4
    result = keras_mixer.evaluate(tmp_path / "model", (np.stack(cuts), labels)).scores
    assert result["top1"] == 1.0 if top1 else result["top1"] < 1.0


# === An expected accuracy ===

LOW, HIGH = (round(bound, 7) for bound in wilson_interval(RIGHT, IMAGES))


@pytest.mark.parametrize("expected, confidence, agrees", [
    (0.8, 0.95, True), (0.8, 0.001, True), (0.9, 0.95, False), (0.7, 0.95, True),
    (0.7, 0.5, False), (0.9, 0.999, True),
    (HIGH + 0.00004, 0.95, True), (HIGH + 0.00006, 0.95, False),
    (LOW - 0.00004, 0.95, True), (LOW - 0.00006, 0.95, False),
    (0.0, 0.95, False), (1.0, 0.95, False),
    (Published(0.89, "a paper", "", 0.0084), 0.95, True),
])  # fmt: skip
def test_it_must_lie_in_the_interval_up_to_its_rounding(expected, confidence, agrees):
    found = _compare({"top1": RIGHT / IMAGES, "n": IMAGES}, expected, confidence)
    assert found["agrees"] is agrees
    assert found["interval"] == list(wilson_interval(RIGHT, IMAGES, confidence))


def test_a_recorded_score_must_agree_to_the_image():
    expected = Published(48 / 60, "metrics.json", "", 0.0)
    found = [_compare({"top1": c / 60, "n": 60}, expected, 0.95)["agrees"] for c in (47, 48, 49)]
    assert found == [False, True, False]


@pytest.fixture
def evaluate(labeled, run):
    """Runs the command on the labeled images; returns its status and what it printed."""
    data = ("--dataset=folder", f"--data_dir={labeled}", "--image_shape=24,16")
    return lambda path, *flags: run("evaluate", path, *data, *flags)


def test_the_exit_status_tells_whether_they_agree(evaluate):
    status, out, _ = evaluate(FILE, "--expected=0.8")
    assert status == 0
    assert "top-1 80.00% (68.22% to 88.17%, Wilson interval of 0.95) agrees with 80.00% ± 0" in out
    status, out, _ = evaluate(FILE, "--expected=0.9", "--format=json")
    assert (status, json.loads(out)["expected"]["agrees"]) == (1, False)
    assert evaluate(FILE, "--expected=0.9", "--confidence=0.999")[0] == 0


@pytest.mark.parametrize("top1, status", [(0.8, 0), (0.89, 1)])
def test_a_released_file_is_compared_with_what_was_published(evaluate, monkeypatch, top1, status):
    """Without a network: the file lies where a download would have put it."""
    figure = Published(top1, "A. Uthor, Table 7", "by hand")
    stand_in = {"size": 0.05, "num_classes": CLASSES, "published": {"folder": figure}}
    monkeypatch.setitem(OFFICIAL, NAME, OFFICIAL[NAME]._replace(**stand_in))
    cache_path(NAME).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(FILE, cache_path(NAME))
    found, out, _ = evaluate(f"official:{NAME}", "--expected=published")
    assert found == status
    assert "(A. Uthor, Table 7; by hand)" in out


def test_a_run_agrees_with_its_own_score_to_the_image(trained, run, tmp_path):
    assert run("evaluate", trained.directory, "--expected=recorded")[0] == 0
    copy = shutil.copytree(trained.directory, tmp_path / "copy")
    lower = trained.scores["test"]["top1"] - 1 / trained.scores["test"]["n"]
    rewrite(copy / "metrics.json", lambda metrics: metrics["test"].update(top1=lower))
    assert run("evaluate", copy, "--expected=recorded")[0] == 1, "one image less"
    rewrite(copy / "metrics.json", lambda metrics: metrics.pop("test"))
    status, _, err = run("evaluate", copy, "--expected=recorded")
    assert status == 2 and "expected a run with a score of test in metrics.json" in err


REFUSED = {
    "official:imagenet21k/Mixer-B_16 --dataset=imagenet2012 --expected=published":
        "no published accuracy of this file is known (trained on ImageNet-21k",
    "official:imagenet1k/Mixer-L_16 --dataset=cifar10 --expected=published":
        "published on the test split of imagenet2012 only",
    "official:imagenet1k/Mixer-L_16 --dataset=imagenet2012 --eval_split=train "
    "--expected=published": "published on the test split of imagenet2012 only",
    f"{FILE} --dataset=digits --expected=published": "it is none of the released files",
    f"{FILE} --dataset=digits --expected=1.5": "--expected: expected a fraction from 0 to 1",
    f"{FILE} --dataset=digits --expected=nan": "--expected: expected a fraction",
    f"{FILE} --dataset=digits --expected=x": "published or recorded, received x",
    f"{FILE} --dataset=digits --expected=1 --confidence=1": "--confidence",
    f"{FILE} --dataset=digits": "image_shape",
    f"{FILE} --expected=1": "not a run directory",
}  # fmt: skip


@pytest.mark.parametrize("line, message", REFUSED.items())
def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, run, line, message):
    """Before anything is downloaded: any download would fail, and name this address."""
    monkeypatch.setenv("KERAS_MIXER_OFFICIAL", "http://127.0.0.1:1")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    status, _, error = run("evaluate", *line.split())
    assert status == 2
    assert message in error and "127.0.0.1" not in error
    assert error.count("\n") == 1


def test_the_published_accuracy_is_that_of_the_paper():
    assert published_accuracy(f"official:{NAME}", "imagenet2012").top1 == 0.7644


def test_an_unfinished_run_is_said_to_be_one(interrupted, trained, tmp_path, capsys):
    config = Config(**TINY, output_dir=str(tmp_path / "run"), export=False)
    interrupted(config, 30)
    keras_mixer.evaluate(config.output_dir)
    assert f"{config.output_dir} is not finished: 1 of 3 epochs are done" in capsys.readouterr().err
    keras_mixer.evaluate(trained.directory)
    assert "not finished" not in capsys.readouterr().err
