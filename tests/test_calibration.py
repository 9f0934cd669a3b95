"""Tests `keras_mixer/inference/calibration.py` and `evaluate --temperature`."""

import json
import math
import re

import numpy as np
import pytest
from scipy.special import expit, softmax

from keras_mixer import Config, fit, load_mixer
from keras_mixer.inference.calibration import (
    TEMPERATURES,
    calibration_scores,
    fit_temperature,
    mean_nll,
    probabilities_of,
    reliability_bins,
)
from keras_mixer.inference.evaluate import compute_logits
from keras_mixer.weights.convert import convert_weights

LOSSES = {"softmax": lambda x: softmax(x, axis=1), "sigmoid": expit}
COUNT, CLASSES = 400, 5


def drawn(loss="softmax", count=COUNT, scale=2.0, seed=0):
    """Logits, and labels drawn with the probabilities that these say: a calibrated model."""
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(count, CLASSES))
    weights = LOSSES[loss](logits)
    cumulated = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
    return logits, (generator.random((count, 1)) > cumulated[:, :-1]).sum(axis=1)


# === Scores ===


def independent_scores(logits, labels, loss, bins=15):
    """The same from the definitions, image by image."""
    probabilities = LOSSES[loss](logits)
    gaps, nll, brier = np.zeros(bins), 0.0, 0.0
    for row, label in zip(probabilities, labels, strict=True):
        place = next(i for i in range(bins) if row.max() <= (i + 1) / bins or i == bins - 1)
        gaps[place] += float(row.argmax() == label) - row.max()
        wrong = [p for c, p in enumerate(row) if c != label]
        nll -= math.log(row[label]) + (loss == "sigmoid") * sum(math.log(1 - p) for p in wrong)
        brier += (1 - row[label]) ** 2 + sum(p**2 for p in wrong)
    return {"ece": abs(gaps).sum() / len(labels), "nll": nll / len(labels),
            "brier": brier / len(labels)}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_are_those_of_the_definitions(loss):
    logits, labels = drawn(loss)
    expected = independent_scores(logits, labels, loss)
    assert calibration_scores(logits, labels, loss) == pytest.approx(expected, rel=1e-9)
    in_float32 = calibration_scores(logits.astype(np.float32), labels, loss)
    assert in_float32 == pytest.approx(expected, rel=1e-4)


def logits_of(*probabilities):
    return np.log(np.array(probabilities))


def test_scores_by_hand():
    """Four images of confidence 0.75, of which three are right: no gap."""
    logits, labels = logits_of(*[(0.75, 0.25)] * 4), np.array([0, 0, 0, 1])
    scores = calibration_scores(logits, labels, "softmax")
    assert scores["ece"] == pytest.approx(0)
    assert scores["nll"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert scores["brier"] == pytest.approx((3 * 2 * 0.25**2 + 2 * 0.75**2) / 4)


def test_an_overconfident_model_is_off_by_the_gap():
    logits, labels = logits_of(*[(0.99, 0.01)] * 10), np.array([0, 1] * 5)
    assert calibration_scores(logits, labels, "softmax")["ece"] == pytest.approx(0.49)


def test_gaps_of_different_bins_do_not_cancel():
    """0.9 sure and always wrong, 0.55 sure and always right: the mean gap is not 0.225."""
    logits = logits_of(*[(0.9, 0.1)] * 5, *[(0.55, 0.45)] * 5)
    labels = np.array([1] * 5 + [0] * 5)
    scores = calibration_scores(logits, labels, "softmax")
    assert scores["ece"] == pytest.approx((0.9 + 0.45) / 2)


def test_a_calibrated_model_is_calibrated_and_an_overconfident_one_is_not():
    logits, labels = drawn(count=20_000)
    assert calibration_scores(logits, labels, "softmax")["ece"] < 0.02
    assert calibration_scores(3 * logits, labels, "softmax")["ece"] > 0.1


def test_perfect_and_worst_scores():
    right = calibration_scores(np.array([[50.0, -50.0]]), np.array([0]), "softmax")
    assert right == pytest.approx({"ece": 0, "nll": 0, "brier": 0}, abs=1e-12)
    wrong = calibration_scores(np.array([[50.0, -50.0]]), np.array([1]), "softmax")
    assert wrong == pytest.approx({"ece": 1, "nll": 100, "brier": 2})


@pytest.mark.parametrize("loss", LOSSES)
def test_large_logits_do_not_overflow(loss):
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert np.isfinite(list(calibration_scores(logits, np.array([0, 0]), loss).values())).all()


def test_sigmoid_probabilities_need_not_sum_to_one():
    probabilities = probabilities_of(np.zeros((1, 3)), "sigmoid")
    np.testing.assert_array_equal(probabilities, [[0.5] * 3])
    scores = calibration_scores(np.zeros((1, 3)), np.array([0]), "sigmoid")
    assert scores == pytest.approx({"ece": 0.5, "nll": 3 * math.log(2), "brier": 0.75})


# === Reliability diagram ===


def test_bins_hold_what_is_above_their_lower_edge_up_to_their_upper_one():
    top = np.array([0.5, 0.500001, 0.75, 1.0])
    bins = reliability_bins(np.c_[top, 1 - top], np.array([0, 1, 0, 0]), bins=4)
    assert [count for _, _, count in bins] == [0, 1, 2, 1]
    assert bins[0] == (0.125, 0.0, 0), "an empty bin"
    assert bins[1] == (0.5, 1.0, 1)
    assert bins[2] == (pytest.approx(0.6250005), 0.5, 2)


def test_there_are_fifteen_bins_with_all_images():
    logits, labels = drawn()
    bins = reliability_bins(softmax(logits, axis=1), labels)
    assert len(bins) == 15 and sum(count for *_, count in bins) == COUNT
    for index, (confidence, accuracy, _) in enumerate(bins):
        assert index / 15 <= confidence <= (index + 1) / 15
        assert 0 <= accuracy <= 1
    json.dumps(bins)


# === Temperature ===


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(loss, scale):
    """Labels that softmax draws are calibrated; for sigmoid the best temperature is known so."""
    logits, labels = drawn(loss, count=30_000)
    base = 1.0 if loss == "softmax" else fit_temperature(logits, labels, loss)
    assert fit_temperature(scale * logits, labels, loss) == pytest.approx(scale * base, rel=0.02)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_other_temperature_is_better(loss):
    logits, labels = drawn(loss, seed=3)
    logits = 3 * logits
    best = fit_temperature(logits, labels, loss)
    least = mean_nll(logits / best, labels, loss)
    for factor in (0.3, 0.9, 0.99, 1.01, 1.1, 3.0):
        assert mean_nll(logits / (best * factor), labels, loss) > least


def test_without_a_best_temperature_the_search_ends_at_a_bound():
    logits = np.array([[2.0, 1.0], [0.0, 3.0]])
    lowest, highest = TEMPERATURES
    assert lowest <= fit_temperature(logits, np.array([0, 1]), "softmax") < 5 * lowest
    assert 0.99 * highest < fit_temperature(logits, np.array([1, 0]), "softmax") <= highest


# === The command ===


@pytest.mark.parametrize("form", ["--format=json", "--output=scores.json"])
def test_evaluate_reports_calibration(run, trained, tmp_path, form):
    status, out, err = run("evaluate", trained.directory, form)
    assert status == 0, err
    scores = json.loads(out if "format" in form else (tmp_path / "scores.json").read_text())
    logits, labels = compute_logits(load_mixer(trained.best), trained.spec, trained.dataset.test)
    expected = calibration_scores(logits, labels, "softmax")
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert scores["loss"] == scores["nll"]
    assert "calibrated" not in scores
    if form != "--format=json":
        assert f"calibration: ECE {scores['ece']:.2%}, NLL {scores['nll']:.4f}, Brier" in out


def test_temperature_is_fitted_on_the_validation_split(run, trained):
    status, out, err = run("evaluate", trained.directory, "--temperature", "--format=json")
    assert (status, err) == (0, "")
    scores = json.loads(out)
    model, (_, validation, test) = load_mixer(trained.best), splits_of(trained)
    outputs = compute_logits(model, trained.spec, validation)
    temperature = fit_temperature(*outputs, "softmax")
    assert scores["calibrated"]["temperature"] == pytest.approx(temperature, rel=1e-4)
    logits, labels = compute_logits(model, trained.spec, test)
    expected = calibration_scores(logits / temperature, labels, "softmax")
    found = {name: scores["calibrated"][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3)
    assert scores["calibrated"]["nll"] != pytest.approx(scores["nll"], rel=1e-3)


def splits_of(run):
    return run.dataset.train, run.dataset.validation, run.dataset.test


def test_temperature_in_the_table_and_on_the_validation_split(run, trained):
    words = ("--temperature", "--eval_split=validation")
    metrics = (trained.directory / "metrics.json").read_bytes()
    status, out, err = run("evaluate", trained.directory, *words)
    assert status == 0
    assert "the temperature is fitted on the images that are scored" in err
    assert (trained.directory / "metrics.json").read_bytes() == metrics, "as it was"
    (line,) = [line for line in out.splitlines() if line.startswith("with temperature")]
    assert re.fullmatch(r"with temperature \d+\.\d{3}: ECE .+%, NLL \d\.\d+, Brier score .+", line)


def test_temperature_goes_with_other_data(run, trained):
    words = ("--dataset=digits", "--test_fraction=0.2", "--format=json", "--temperature")
    status, out, _ = run("evaluate", trained.directory, *words)
    assert status == 0
    on_own_data = run("evaluate", trained.directory, "--temperature", "--format=json")[1]
    assert json.loads(out) == json.loads(on_own_data)


@pytest.fixture(scope="module")
def without_validation(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "all"
    fields = {"depth": 1, "dim": 8, "num_steps": 1, "warmup_step": 0, "batch_size": 256}
    fields |= {"validation_fraction": 0.0, "jit": "false", "export": False}
    return fit(Config(**fields, output_dir=str(directory)))


def test_temperature_needs_a_run_with_a_validation_split(
    run, trained, without_validation, tmp_path
):
    convert_weights(trained.directory, tmp_path / "mixer.safetensors")
    for words, reason in [
        ((without_validation.directory,), "has none"),
        ((without_validation.directory, "--dataset=digits"), "has none"),
        (("mixer.safetensors", "--dataset=digits"), "is not a run"),
    ]:
        status, out, err = run("evaluate", *words, "--temperature")
        assert (status, out) == (2, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert "--temperature: expected a run with a validation split" in line
        assert line.endswith(reason)
