"""Tests `keras_mixer/inference/few_shot.py` and its command, fewshot."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import GOLDEN

import keras_mixer.inference.few_shot as module
from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.__main__ import main
from keras_mixer.commands.few_shot import FewShotOptions
from keras_mixer.data.splits import ArrayImages
from keras_mixer.inference.few_shot import (
    Examples,
    as_table,
    check_shots,
    choose_l2,
    pre_logits_of,
    rank_images,
    regression,
    score_few_shot,
)

L2 = (1.0, 64.0, 4096.0)


def blobs(classes=4, images=12, dim=30, noise=1.0, seed=0):
    """Features of classes that lie apart, sampled in one order."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    labels = np.repeat(np.arange(classes), images)
    features = centers[labels] + noise * generator.normal(size=(len(labels), dim))
    return Examples(features * 10 + 3, labels, rank_images(labels, seed))


# === Features ===


def test_features_are_the_pre_logits_of_the_official_code():
    expected = np.load(GOLDEN / "official_mixer_expected.npz")
    model = load_mixer(GOLDEN / "official_mixer.npz", image_shape=expected["images"].shape[1:3])
    features = pre_logits_of(model).predict_on_batch(expected["images"])
    np.testing.assert_allclose(features, expected["pre_logits"], rtol=0, atol=1e-5)


def test_a_model_without_a_head_gives_them_as_it_is():
    sizes = {"image_shape": (8, 8), "patch_shape": (4, 4), "depth": 1, "dim": 6}
    model = build_mixer(**sizes, num_classes=0)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        pre_logits_of(model).predict_on_batch(images), model.predict_on_batch(images)
    )


# === Drawing ===


def test_samples_are_nested_balanced_and_seeded():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [40, 30, 5]))
    ranks = rank_images(labels, 7)
    for label, count in ((0, 40), (1, 30), (3, 5)):
        assert sorted(ranks[labels == label]) == list(range(count))
    for count in (1, 5, 10):
        taken = np.bincount(labels[ranks < count], minlength=4)
        assert list(taken) == [count, count, 0, min(count, 5)]
    np.testing.assert_array_equal(ranks, rank_images(labels, 7))
    assert not np.array_equal(ranks, rank_images(labels, 8))


def test_every_image_is_as_likely_to_be_sampled():
    labels = np.repeat([0, 1], 10)
    sampled = sum(rank_images(labels, seed) < 2 for seed in range(1000))
    assert sampled.sum() == 4000
    assert sampled.min() > 140 and sampled.max() < 260  # 200 expected; 12.6 is a standard deviation


def test_classes_with_too_few_images_are_named(capsys):
    labels = np.repeat([0, 1, 2], [10, 2, 10])
    check_shots(labels, [1, 2, 5], ("ant", "bee", "cat", "dog"))
    said = capsys.readouterr().err
    assert "1 shots: 1 of 4 classes have fewer training images, all of which are used" in said
    assert "5 shots: 2 of 4 classes" in said
    assert "bee (2)" in said and "dog (0)" in said and "ant" not in said
    with pytest.raises(InputError, match="--shots=11: no class has more than 10 training images"):
        check_shots(labels, [1, 11], ("ant", "bee", "cat", "dog"))


# === Regression ===


def official(shots, images, l2, classes):
    """The normal equations as the official evaluator has them: a column of 100s for the bias."""
    mean, std = shots.features.mean(axis=0), shots.features.std(axis=0) + 1e-5
    x, other = (np.pad((f - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
                for f in (shots.features, images))  # fmt: skip
    targets = 2.0 * np.eye(classes)[shots.labels] - 1.0
    return other @ np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ targets)


@pytest.mark.parametrize(("classes", "images"), [(4, 3), (4, 30), (2, 5), (7, 1)])
@pytest.mark.parametrize("l2", [1.0, 1024.0])
def test_regression_is_that_of_the_normal_equations(classes, images, l2):
    """In both forms: more images than features, and fewer."""
    shots, others = blobs(classes, images), blobs(classes, 40, noise=4.0, seed=1).features
    expected = official(shots, others, l2, classes)
    model = regression(l2).fit(shots.features, shots.labels)
    found = model.decision_function(others)
    if classes == 2:
        expected = expected[:, 1:] * [1.0]
        found = found[:, None]
    # The penalty on the bias is the same for every class, so it shifts all outputs alike.
    shift = found - expected
    np.testing.assert_allclose(shift, np.full_like(shift, shift.mean()), rtol=0, atol=1e-4)
    assert abs(shift.mean()) < 1e-3 * l2
    if classes > 2:
        np.testing.assert_array_equal(model.predict(others), expected.argmax(axis=1))


def test_l2_is_what_does_best_on_validation():
    """Few images, much noise: little L2 follows the noise. Computed by the normal equations."""
    samples = [blobs(noise=5.0, images=8, seed=seed) for seed in range(3)]
    validation, values = blobs(noise=3.0, images=200, seed=9), [1e-3, 100.0, 1e5]
    chosen, accuracies = choose_l2(samples, validation, values)
    outputs = [[official(shots, validation.features, l2, 4) for shots in samples] for l2 in values]
    expected = [np.mean(np.argmax(of_l2, axis=2) == validation.labels) for of_l2 in outputs]
    np.testing.assert_allclose(accuracies, expected, atol=2e-3)
    assert max(accuracies) - min(accuracies) > 0.02
    assert chosen == values[int(np.argmax(expected))]


def test_of_equally_good_values_the_middle_l2_is_chosen():
    samples = [blobs(noise=0.01)]
    chosen, accuracies = choose_l2(samples, blobs(noise=0.01, seed=1), [1.0, 2.0, 4.0, 8.0, 16.0])
    assert accuracies == [1.0] * 5
    assert chosen == 4.0


def test_without_validation_the_shots_are_cross_validated():
    """Leaving out, in turn, one image of every class where there are as many shots as folds."""
    shots = blobs(noise=2.0, images=5)
    _, (accuracy,) = choose_l2([shots], None, [10.0])
    right = 0
    for rank in range(5):
        out = shots.ranks == rank
        kept = Examples(*(column[~out] for column in shots))
        right += (official(kept, shots.features[out], 10.0, 4).argmax(1) == shots.labels[out]).sum()
    assert accuracy == right / 20
    assert 0.3 < accuracy < 1.0


def test_cross_validation_accepts_a_class_of_a_single_image():
    shots = blobs(classes=3, images=6)
    kept = (shots.labels < 2) | (shots.ranks == 0)
    choose_l2([Examples(*(column[kept] for column in shots))], None, [1.0, 10.0])


# === Scores ===


@pytest.fixture(scope="module")
def scored(trained):
    return score_few_shot(load_mixer(trained.best), trained.dataset, (5, 1, 5), (0, 3), L2)


def test_scores_are_those_of_the_normal_equations_on_the_models_own_features(trained, scored):
    model, dataset = pre_logits_of(load_mixer(trained.best)), trained.dataset
    train, test = (
        model.predict_on_batch((s.pixels.astype(np.float32) - 127.5) / 127.5).astype(np.float64)
        for s in (dataset.train, dataset.test)
    )
    for row in scored["shots"]:
        for seed, top1 in zip((0, 3), row["top1"], strict=True):
            kept = rank_images(dataset.train.labels, seed) < row["shots"]
            shots = Examples(train[kept], dataset.train.labels[kept])
            outputs = official(shots, test, row["l2"], 10)
            assert abs(top1 - np.mean(outputs.argmax(1) == dataset.test.labels)) < 0.006


def test_scores_say_what_they_are_of(scored):
    assert [row["shots"] for row in scored["shots"]] == [1, 5]
    assert [row["images"] for row in scored["shots"]] == [10, 50]
    assert scored["n"] == 360 and scored["seeds"] == [0, 3]
    assert scored["chosen_on"] == "144 validation images"
    for row in scored["shots"]:
        assert row["mean"] == pytest.approx(np.mean(row["top1"]))
        assert row["std"] == pytest.approx(np.std(row["top1"], ddof=1))
        assert row["l2"] in L2
        assert [c["l2"] for c in row["choice"]] == list(L2)
        best = max(c["top1"] for c in row["choice"])
        assert {c["l2"]: c["top1"] for c in row["choice"]}[row["l2"]] == best
    assert scored["shots"][1]["mean"] > 0.6, "trained on ten digits, of which chance is 0.1"


def test_the_test_images_take_no_part_in_the_choice(trained, scored):
    test = trained.dataset.test
    mutated = ArrayImages(test.pixels[::-1], (test.labels + 1) % 10)
    dataset = dataclasses.replace(trained.dataset, test=mutated)
    other = score_few_shot(load_mixer(trained.best), dataset, (1, 5), (0, 3), L2)
    for before, after in zip(scored["shots"], other["shots"], strict=True):
        assert after["choice"] == before["choice"]
        assert after["l2"] == before["l2"]
        assert max(after["top1"]) < 0.3 < min(before["top1"]), "the labels are all wrong now"


def test_only_what_is_sampled_is_computed_and_only_once(trained, monkeypatch):
    computed = []

    def recorded(model, spec, split, *arguments):
        computed.append(split)
        return original(model, spec, split, *arguments)

    original = module.compute_logits
    monkeypatch.setattr(module, "compute_logits", recorded)
    dataset = trained.dataset
    model = load_mixer(trained.best)
    score_few_shot(model, dataset, (1, 3), (0, 1), [64.0])
    train, test = computed
    union = np.min([rank_images(dataset.train.labels, seed) for seed in (0, 1)], axis=0) < 3
    np.testing.assert_array_equal(train.pixels, dataset.train.pixels[union])
    assert 30 < len(train) <= 60
    assert test is dataset.test, "a single L2 needs no validation images"
    computed.clear()
    score_few_shot(model, dataset, (1, 3), (0, 1), L2)
    assert [len(split) for split in computed] == [len(train), 144, 360]


def test_more_classes_than_features(trained):
    """Labels are not cut to the width of the pre-logits."""
    generator = np.random.default_rng(0)
    labels = np.tile(np.arange(40), 3)
    images = generator.integers(0, 256, (120, 8, 8, 1), np.uint8)
    split = ArrayImages(images, labels)
    names = tuple(map(str, range(40)))
    dataset = dataclasses.replace(
        trained.dataset, class_names=names, train=split, test=split, validation=None
    )
    model = load_mixer(trained.best)
    scores = score_few_shot(model, dataset, (3,), (0,), [1.0])
    features = pre_logits_of(model).predict_on_batch((images.astype(np.float32) - 127.5) / 127.5)
    known = Examples(features.astype(np.float64), labels)
    right = official(known, known.features, 1.0, 40).argmax(axis=1) == labels
    assert scores["shots"][0]["images"] == 120
    assert scores["chosen_on"] == "given"
    assert scores["shots"][0]["std"] is None
    assert scores["shots"][0]["top1"] == [pytest.approx(right.mean(), abs=0.02)]


def test_table_shows_mean_and_deviation(scored):
    table = as_table(scored)
    row = scored["shots"][1]
    assert f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f} %" in table
    assert "360 images of 10 classes; samples of seeds 0, 3; L2: 144 validation images" in table
    alone = {**scored, "shots": [{**row, "std": None}]}
    assert "±" not in as_table(alone)


def test_the_command_on_digits(command, capsys, trained, tmp_path):
    arguments = (trained.directory, "--shots=1,5", "--seeds=0,1", "--l2=16,256")
    done = command(*arguments, "--format=json", "--output=scores.json", verb="fewshot")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    scores = json.loads(done.stdout)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert scores["dataset"] == "digits" and scores["seeds"] == [0, 1]
    five = scores["shots"][1]
    assert min(five["top1"]) > 0.5
    assert main(["fewshot", *map(str, arguments)]) == 0
    assert f"{100 * five['mean']:.2f} ±" in capsys.readouterr().out, "the same samples, again"


def run(capsys, *arguments):
    status = main(["fewshot", *map(str, arguments)])
    return status, *capsys.readouterr()


FOLDER = (
    "--dataset=folder", "--shots=2,4", "--validation_fraction=0",
    "--test_fraction=0.5", "--format=json",
)  # fmt: skip


def test_a_checkpoint_of_others_on_a_folder_of_other_sizes(capsys, folder):
    """Its eval_crop is its own unless given, its patches those asked for."""
    base = (GOLDEN / "timm_mixer.safetensors", f"--data_dir={folder}", *FOLDER)
    status, out, err = run(capsys, *base)
    assert status == 0, err
    assert "images of 24×24 (eval_crop 0.875, bicubic, pixels 0 to 255 scaled to [-1, 1])" in err
    scores = json.loads(out)
    assert scores["chosen_on"] == "cross-validation on the shots"
    assert [row["images"] for row in scores["shots"]] == [6, 12]
    assert json.loads(run(capsys, *base, "--eval_crop=0.875")[1]) == scores
    for flag in ("--eval_crop=0.5", "--patch_shape=8"):
        _, out, err = run(capsys, *base, flag)
        assert json.loads(out) != scores
        assert ", bicubic, " in err


@pytest.mark.parametrize(
    ("flags", "done"),
    [
        ((), "a grid of 4×4 patches becomes 8×8: token mixing interpolated"),
        (("--resize_tokens=tile",), "token mixing tiled 2×2"),
        (("--patch_shape=4",), "patches of 2×2 become 4×4"),
    ],
)
def test_a_run_is_adapted_to_larger_images(capsys, trained, flags, done):
    options = ("--image_shape=16", "--shots=5", "--l2=256", "--seeds=0", "--format=json")
    status, out, err = run(capsys, trained.directory, *options, *flags)
    assert status == 0
    assert done in err
    (row,) = json.loads(out)["shots"]
    assert row["mean"] > (0.15 if "tile" in done else 0.3)


def test_a_run_on_other_splits_is_pointed_out(capsys, trained):
    base = (trained.directory, "--shots=1", "--l2=64", "--seeds=0")
    status, _, err = run(capsys, *base, "--split_seed=1")
    assert status == 0
    assert "was trained with --split_seed=0: it may have seen images that are" in err
    assert run(capsys, *base, "--validation_fraction=0.3")[2] == "", "the same test images"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected exactly one CHECKPOINT, received 0"),
        (["nowhere"], "nowhere: no such checkpoint"),
        (["{run}", "--shots=0"], "--shots: expected one or more integer values, separated by"),
        (["{run}", "--l2=0"], "--l2: expected one or more number values"),
        (["{run}", "--shots=1,500"], "--shots=500: no class has more than"),
        (
            ["{run}", "--test_fraction=0", "--validation_fraction=0"],
            "--dataset=digits: there are no test images to score",
        ),
        (["{run}", "--validation_fraction=0"], "--shots=1: without validation images"),
        (["{run}", "--eval_crop=0.01"], "--eval_crop=0.01: expected 0, or a number from 0.1 to 1"),
        (["{run}", "--patch_shape=3"], "--patch_shape=3,3 does not divide --image_shape=8,8"),
        (["{run}", "--output=no/where.json"], "--output=no/where.json: its folder does not exist"),
        (["{run}", "--dataset=folder", "--data_dir={folder}"], "images of 1 channels, --dataset"),
    ],
)
def test_mistakes_are_one_line(capsys, trained, folder, arguments, message):
    places = {"run": trained.directory, "folder": folder}
    status, out, err = run(capsys, *[a.format(**places) for a in arguments])
    assert status == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("error: "), err
    assert message in err


def test_defaults_are_the_official_ones():
    options = FewShotOptions()
    assert options.shots == (1, 5, 10, 25)
    assert options.seeds == (0, 1, 2)
    assert 1024 in options.l2
