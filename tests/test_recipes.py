"""Tests the recipes of a run: accumulation, losses, float16, class weights, early stopping, curves.

They are those of `training/accumulation.py`, `losses.py`, `tensorboard.py` and `fit.py`.
"""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, read_history
from scipy.special import log_expit

import keras_mixer.training.fit as fit_module
from keras_mixer import Config, InputError, fit
from keras_mixer.compute.accumulation import accumulate_gradients
from keras_mixer.inference.evaluate import evaluate_run, score
from keras_mixer.model.architecture import LOSSES, Architecture, ModelSpec
from keras_mixer.model.mixer import build_mixer
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.open_run import plan_run
from keras_mixer.runs.resume import Progress, is_over
from keras_mixer.training.losses import KERAS_LOSSES, PROBABILITIES, SigmoidCrossentropy
from keras_mixer.training.tensorboard import COLUMNS
from keras_mixer.weights.pretrained import read_pretrained

STILL = {"dropout": 0.0, "stochastic_depth": 0.0, "flip": False, "crop_padding": 0}
RANDOM = np.random.default_rng(0)


@pytest.fixture
def train(tmp_path):
    def run(directory="run", **fields):
        fields = {**TINY, **STILL, "output_dir": str(tmp_path / directory), **fields}
        return fit(Config(**fields))

    return run


def final(run):
    return newest_checkpoint(run.checkpoints).arrays


# === Accumulation ===


XLA = pytest.param({"jit": "true"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("fields", [{}, XLA, {"class_weights": "balanced"}], ids=str)
def test_accumulated_parts_equal_the_large_batch(train, fields):
    """Weights, moving average, optimizer, schedule and metrics, with clipping in force."""
    fields = {"clip_norm": 0.05, "label_smoothing": 0.1, "optimizer": "sgd", "lr": 0.1, **fields}
    whole, parts = train("whole", **fields), train("parts", accumulation=4, **fields)
    expected, found = final(whole), final(parts)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)
    for one, other in zip(read_history(whole), read_history(parts), strict=True):
        assert one["lr"] == other["lr"], "the schedule counts whole steps"
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert one["accuracy"] == other["accuracy"]


def test_every_part_of_a_batch_is_computed_with_its_own_images():
    """The gradient is the mean over the parts, each with as many images as a part has."""
    shapes = []
    model = build_mixer((4, 4), (2, 2), channels=1, depth=1, dim=4, num_classes=3)
    in_parts = accumulate_gradients(model, 3)
    assert [v.path for v in in_parts.weights] == [v.path for v in model.weights]
    loss = KERAS_LOSSES["softmax"]()
    in_parts.compile("sgd", lambda y, z: shapes.append(z.shape[0]) or loss(y, z), jit_compile=False)
    in_parts.train_on_batch(RANDOM.normal(size=(12, 4, 4, 1)), np.eye(3)[np.arange(12) % 3])
    assert set(shapes) == {4}


def test_accumulation_must_divide_the_batch(train):
    with pytest.raises(InputError, match="--accumulation=3 must divide --batch_size=64"):
        train(accumulation=3)


# === Losses ===


def test_losses_have_their_formulas():
    logits, labels = RANDOM.normal(size=(5, 3)), np.array([0, 1, 2, 1, 0])
    y = np.eye(3)[labels]
    expected = {
        "softmax": -(y * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean(),
        "sigmoid": -(y * log_expit(logits) + (1 - y) * log_expit(-logits)).sum(1).mean(),
    }
    sizes = {"image_shape": (2, 2), "patch_shape": (2, 2), "depth": 1, "dim": 1}
    for name, value in expected.items():
        spec = ModelSpec(Architecture(**sizes, num_classes=3), loss=name)
        assert float(KERAS_LOSSES[name]()(y, logits)) == pytest.approx(value, rel=1e-5)
        assert score(logits, labels, spec)["loss"] == pytest.approx(value, rel=1e-12)
    assert set(expected) == set(KERAS_LOSSES) == set(PROBABILITIES) == set(LOSSES)


def test_sigmoid_loss_takes_soft_labels_and_round_trips():
    logits, labels = RANDOM.normal(size=(4, 3)), RANDOM.dirichlet(np.ones(3), 4)
    loss = SigmoidCrossentropy.from_config(SigmoidCrossentropy().get_config())
    expected = -(labels * log_expit(logits) + (1 - labels) * log_expit(-logits)).sum(1).mean()
    assert float(loss(labels, logits)) == pytest.approx(expected, rel=1e-5)


def test_sigmoid_runs_start_at_the_share_of_a_class_and_are_scored_as_trained(train):
    run = train(loss="sigmoid", num_steps=1, lr=1e-9, decay=0.0, ema=0.0)
    spec, arrays, _ = read_pretrained(run.directory)
    np.testing.assert_allclose(arrays["head/bias"], -math.log(10), rtol=1e-6)
    assert spec.loss == "sigmoid"
    # Ten classes at p = 1/11 (the sigmoid of -log 10), one of them the label.
    expected = -math.log(1 / 11) - 9 * math.log(10 / 11)
    assert evaluate_run(run, "test")["loss"] == pytest.approx(expected, rel=1e-5)
    assert float(read_history(run)[0]["val_loss"]) == pytest.approx(expected, rel=1e-5)


def test_head_bias_can_be_given(train):
    run = train(head_bias=0.5, num_steps=1, lr=1e-9, decay=0.0)
    name = next(name for name in final(run) if name.endswith("head/bias") and "model" in name)
    np.testing.assert_allclose(final(run)[name], 0.5, rtol=1e-6)


# === float16 ===


def test_float16_learns_what_float32_learns(train):
    one, other = train("one", precision="float32"), train("other", precision="float16")
    for a, b in zip(read_history(one), read_history(other), strict=True):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), abs=0.02)
    assert any("dynamic_scale" in name for name in final(other))
    kinds = {array.dtype.name for name, array in final(other).items() if "kernel" in name}
    assert kinds == {"float32"}


# === Class weights ===


def test_balanced_weights_make_every_class_count_the_same(tmp_path, write_image, first_batch):
    for name, count in (("few", 4), ("many", 20)):
        for index in range(count):
            write_image(tmp_path / "data" / name / f"{index}.png", seed=index)
    fields = {"dataset": "folder", "data_dir": str(tmp_path / "data"), "image_shape": (8, 8),
              "patch_shape": (4, 4), "validation_fraction": 0.0, "test_fraction": 0.0,
              "batch_size": 24}  # fmt: skip
    _, labels, weights = first_batch(plan_run(Config(**fields, class_weights="balanced")))
    np.testing.assert_allclose(weights, labels @ [24 / (2 * 4), 24 / (2 * 20)], rtol=1e-6)
    np.testing.assert_allclose(weights @ labels, [12, 12], rtol=1e-5)
    assert len(first_batch(plan_run(Config(**fields)))) == 2, "no weights unless asked for"


def test_classes_without_training_images_take_no_part_in_class_weights(first_batch):
    run = plan_run(Config(class_weights="balanced", depth=1, dim=4, batch_size=20))
    few = run.dataset.train.take(np.flatnonzero(run.dataset.train.labels < 2)[:20])
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, train=few))
    _, labels, weights = first_batch(run)
    of_classes = 20 / (2 * np.bincount(few.labels))
    np.testing.assert_allclose(weights, labels[:, :2] @ of_classes, rtol=1e-6)


# === Early stopping ===


def history(accuracies):
    return [{"val_accuracy": a, "val_loss": 1.0} for a in accuracies]


@pytest.mark.parametrize(
    "accuracies, patience, over",
    [
        ([0.5, 0.4, 0.4], 2, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.5], 1, True),  # no better is not better
        ([0.5, 0.4], 2, False),
        ([], 1, False),
        ([0.5, 0.4, 0.3], 0, False),
    ],
)
def test_a_run_is_over_after_so_many_epochs_without_a_better_one(accuracies, patience, over):
    run = plan_run(Config(early_stopping=patience))
    assert is_over(run, Progress(step=1, rows=history(accuracies))) is over


def test_an_early_stop_is_an_end(train, capsys):
    run = train(num_steps=40, lr=0.3, early_stopping=2, save_every=100)
    accuracies = [float(row["val_accuracy"]) for row in read_history(run)]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) < 40
    assert len(accuracies) - 1 - best in (2, 3)  # a tie may be better by its loss
    assert "stopped early: 2 epochs without" in capsys.readouterr().err
    before = (run.directory / "history.csv").read_bytes()
    train(num_steps=40, lr=0.3, early_stopping=2, save_every=100)
    assert (run.directory / "history.csv").read_bytes() == before


def test_early_stopping_needs_a_validation_split(train):
    with pytest.raises(InputError, match="--early_stopping=2 needs a validation split"):
        train(early_stopping=2, validation_fraction=0.0)


# === TensorBoard ===


def curves(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for curve in ("train", "validation"):
        events = EventAccumulator(str(directory / "logs" / curve)).Reload()
        for tag in events.Tags()["tensors"]:
            points = events.Tensors(tag)
            found[curve, tag] = [(p.step, tf.make_ndarray(p.tensor_proto).item()) for p in points]
        found[curve, "graph"] = events.Tags()["graph"]
    return found


def test_curves_are_those_of_the_history_and_go_on_with_the_run(train, monkeypatch):
    """Interrupted after a step of the third epoch, with a checkpoint from the first only."""
    fields = {"tensorboard": True, "num_steps": 4, "save_every": 10}

    class Dies(fit_module.Saver):
        def on_train_batch_end(self, batch, logs=None):
            if self.progress.step == 45:
                raise KeyboardInterrupt
            super().on_train_batch_end(batch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "Saver", Dies)
        with pytest.raises(KeyboardInterrupt):
            train(**fields)
    run = train(**fields)
    found = curves(run.directory)
    assert found["train", "graph"]
    assert {(curve, name) for curve, names in COLUMNS.items() for name in names} == {
        key for key in found if key[1] != "graph"
    }
    columns = {
        ("train", "loss"): "loss", ("train", "accuracy"): "accuracy",
        ("train", "learning_rate"): "lr", ("train", "images_per_second"): "images_per_second",
        ("validation", "loss"): "val_loss", ("validation", "accuracy"): "val_accuracy",
    }  # fmt: skip
    for key, column in columns.items():
        expected = [(int(row["step"]), float(row[column])) for row in read_history(run)]
        assert (
            [step for step, _ in found[key]] == [step for step, _ in expected] == [20, 40, 60, 80]
        )
        np.testing.assert_allclose(found[key], expected, rtol=1e-6)


def test_tensorboard_is_asked_for_before_it_is_missed(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'keras_mixer\[tensorboard\]'"):
        train(tensorboard=True)
