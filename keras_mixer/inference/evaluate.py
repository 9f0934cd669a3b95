"""Evaluates models on labeled images: accuracy, calibration, precision and recall by class."""

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from keras_mixer.compute.devices import predictor
from keras_mixer.compute.fast_mixing import fast_inference, use_threads_for
from keras_mixer.data.image_listing import Listing
from keras_mixer.data.sources import open_dataset
from keras_mixer.data.splits import ArrayImages, Dataset, FileImages
from keras_mixer.errors import InputError, join_names, path_errors
from keras_mixer.inference.calibration import (
    calibration_scores,
    fit_temperature,
    probabilities_of,
    wilson_interval,
)
from keras_mixer.inference.predict import as_model
from keras_mixer.inference.robustness import corruption_scores, corruptions_as_text
from keras_mixer.log import logger, one_line, track
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.corruption_constants import SEVERITIES
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE, evaluation_batches
from keras_mixer.runs.open_run import read_run
from keras_mixer.runs.run import CONFIG, Run, note_unfinished, write_metrics
from keras_mixer.training.losses import check_finite
from keras_mixer.weights import model_folder
from keras_mixer.weights.registry import Published


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores and predictions of a model on labeled images; `print` shows the scores as tables.

    Attributes:
        scores: dict of JSON values, see `evaluate`.
        images: `data.splits.Images`.
        labels: int array `(n,)` of true classes.
        logits: float array `(n, num_classes)`.
        spec: `ModelSpec`, with the names of the classes.
    """

    scores: dict
    images: object
    labels: np.ndarray
    logits: np.ndarray
    spec: ModelSpec

    @property
    def confusion(self):
        """Confusion matrix, an int array: rows are true classes, columns predicted classes."""
        return np.array(self.scores["confusion"])

    @property
    def predictions(self):
        """list of a dict for each image: `name`, `label`, `predicted` and `probabilities`."""
        names, probabilities = self.spec.names, probabilities_of(self.logits, self.spec.loss)
        return [
            {
                "name": self.images.name_of(index),
                "label": names[label],
                "predicted": names[row.argmax()],
                "probabilities": row,
            }
            for index, (label, row) in enumerate(zip(self.labels, probabilities, strict=True))
        ]

    def __str__(self):
        return as_table(self.scores)


def evaluate(
    model_or_run,
    data=None,
    split=None,
    *,
    batch_size=EVALUATION_BATCH_SIZE,
    image_shape=None,
    temperature=False,
    corruptions=(),
    severities=SEVERITIES,
    seed=0,
    expected=None,
    confidence=0.95,
    class_names=None,
):
    """Evaluates a model on labeled images: accuracy, calibration, robustness.

    Classes are matched by name, so the data may have only some of the model's classes. Weights
    without class names, and without `class_names`, are taken to have the classes of the data: in
    numeric order if all of these are numbers, else in the order of the data, an assumption that the
    scores name.

    Args:
        model_or_run: A `Run`, the path of a run directory or of weights as `load_mixer` takes it,
            or a `keras.Model` from `load_mixer`.
        data: None for the data of the run; or a folder of class folders, a `Dataset`, or a pair
            (images, labels): a uint8 array `(n, height, width)` or `(n, height, width, channels)`,
            or a list of paths; and class indices of the model or class names.
        split: `"train"`, `"validation"` or `"test"`. Defaults to test; without test images to
            validation; for data without splits to all images.
        batch_size: int. Does not change the scores.
        image_shape: (height, width) of the images fed to the model; weights read from a path are
            adapted to it. Defaults to that of the weights.
        temperature: bool. Also compute calibration with temperature scaling, fitted on the
            validation images of the run.
        corruptions: Names of `corruption_constants.CORRUPTIONS`: also compute the accuracy on
            images with these common corruptions.
        severities: Severities of the corruptions, from 1 to 5.
        seed: int. Seed of the corruptions.
        expected: Top-1 accuracy to compare with: a fraction, a `registry.Published`, or
            `"recorded"` for that in metrics.json of the run, which must agree to the image.
        confidence: float in (0, 1). Confidence level of the interval for the comparison.
        class_names: Names of the model's classes, in its order; instead of those of the weights.

    Returns:
        `Evaluation`. Its `scores` are a dict: name of the `split`; `top1` and `top5` accuracy as
        fractions; `balanced_accuracy` and `macro_f1` (means of recall and F1 over the classes with
        images); mean cross-entropy `loss` in nats; `ece`, `nll` and `brier` (see
        `calibration_scores`); number of images `n`; `classes` (name, precision, recall, f1 and n of
        each); `confusion`; `class_order`, `"assumed"`, only if it was. Where asked for, also
        `calibrated` (the `temperature`, and `ece`, `nll` and `brier` with it), `corruptions` (see
        `corruption_scores`), and `expected`: a dict with `agrees`, the Wilson `interval` of `top1`,
        its `confidence`, the expected `top1`, its `source` and `rounding`.

    Raises:
        InputError: If the model, the data or the split cannot be read or do not fit each other.
    """
    use_threads_for(batch_size)
    own = data is None or temperature or expected == "recorded"
    run = _read_run_of(model_or_run) if own else None
    if data is None and run is None:
        raise InputError(f"{_name(model_or_run)}: not a run, so it needs data to be evaluated on")
    model = as_model(model_or_run if run is None else run, image_shape)
    spec = model.spec if class_names is None else model.spec.replace(class_names=tuple(class_names))
    dataset = run.dataset if data is None else _as_dataset(data, spec)
    subject = match_data(model, dataset, split, batch_size, _name(model_or_run), spec)
    validation = _validation_images(run, subject, data is None) if temperature else None
    if expected == "recorded":
        expected = _recorded(run, subject.name)
    logits, labels = _outputs_of(subject)
    scores = {"split": subject.name, **score(logits, labels, subject.spec)}
    if subject.assumed:
        scores["class_order"] = "assumed"
    if temperature:
        scores["calibrated"] = _calibrated(subject, validation, logits, labels)
    if corruptions:
        scores["corruptions"] = corruption_scores(subject, corruptions, severities, seed)
    if expected is not None:
        scores["expected"] = _compare(scores, expected, confidence)
    return Evaluation(scores, subject.split, labels, logits, subject.spec)


def _name(model_or_run):
    if isinstance(model_or_run, Run):
        return str(model_or_run.directory)
    return os.fspath(model_or_run) if isinstance(model_or_run, str | os.PathLike) else "the model"


def _read_run_of(model_or_run):
    """Returns the `Run` given or in a directory; None for other weights and for a model."""
    if isinstance(model_or_run, str | os.PathLike):
        with path_errors(model_or_run):
            is_run = (Path(model_or_run) / CONFIG).exists()
        if is_run:
            note_unfinished(model_or_run)
        return read_run(model_or_run) if is_run else None
    return model_or_run if isinstance(model_or_run, Run) else None


# === Data ===


class Subject(NamedTuple):
    """A model and the images to evaluate it on.

    Attributes:
        name: Name of the split, for people.
        model: `keras.Model` from `load_mixer`.
        spec: `ModelSpec`, with the names of the model's classes.
        split: `data.splits.Images`.
        class_of: int array: the model's class of each class of the data.
        batch_size: int. Does not change the scores.
        assumed: bool. Whether the order of the model's classes was assumed.
    """

    name: str
    model: object
    spec: ModelSpec
    split: object
    class_of: np.ndarray
    batch_size: int
    assumed: bool = False


def match_data(
    model, dataset, split, batch_size=EVALUATION_BATCH_SIZE, name="the model", spec=None
):
    """Returns the `Subject` of a model and a split of a `Dataset`, their classes matched by name.

    Args:
        spec: `ModelSpec` with other class names than those of the model.

    Raises:
        InputError: If the data have other classes or channels, or no such split.
    """
    spec = spec or model.spec
    split, images = _split_to_score(dataset, split)
    images = _with_channels(images, spec.architecture.channels, name)
    names, assumed = spec.class_names, False
    if names is None:
        names, assumed = _names_of_data(spec, dataset.class_names, name)
    class_of = _match_classes(names, dataset.class_names, name)
    spec = spec.replace(class_names=names)
    return Subject(split, model, spec, images, class_of, batch_size, assumed)


def _as_dataset(data, spec):
    """Returns a `Dataset` of any data that `evaluate` takes."""
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str | os.PathLike):
        return open_dataset("folder", os.fspath(data), 0.0, test_fraction=0.0, least_classes=1)
    images, labels = data
    labels = _class_indices(labels, spec.names)
    if len(images) != len(labels):
        raise InputError(f"expected a label per image: {len(images)} images, {len(labels)} labels")
    split = _as_images(images, labels, spec.architecture.channels)
    return Dataset(spec.names, split, None, None, "")


def _class_indices(labels, names):
    indices = {name: index for index, name in enumerate(names)} | {i: i for i in range(len(names))}
    labels = np.asarray(labels).tolist()
    if unknown := [str(label) for label in labels if label not in indices]:
        raise InputError(f"labels that are no class of the model: {join_names(unknown)}")
    return np.array([indices[label] for label in labels], np.int64)


def _as_images(images, labels, channels):
    if isinstance(images, list | tuple) and all(isinstance(i, str | os.PathLike) for i in images):
        paths = [os.path.abspath(image) for image in images]
        with path_errors("images"):
            sizes = np.array([os.path.getsize(path) for path in paths])
        names = np.array([os.fsencode(path) for path in paths], np.bytes_)
        return FileImages(Listing(b"", names, sizes, np.zeros(len(paths), int)), labels, channels)
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise InputError(
            f"images: expected paths, or a uint8 array (n, height, width, channels), received "
            f"{pixels.dtype} of shape {pixels.shape}"
        )
    return ArrayImages(pixels if pixels.ndim == 4 else pixels[..., None], labels)


def _split_to_score(dataset, name):
    if name is None and dataset.test is None and dataset.validation is None:
        return "all images", dataset.train
    name = dataset.split_to_score(name)
    return name, dataset.split(name)


def _with_channels(split, channels, name):
    """Returns the split with its images decoded to so many channels."""
    if split.channels != channels and isinstance(split, FileImages):
        return dataclasses.replace(split, channels=channels)
    if split.channels != channels:
        raise InputError(
            f"{name}: trained on images of {channels} channels, the data have {split.channels}; "
            f"--dataset names others"
        )
    return split


def _names_of_data(spec, class_names, name):
    """Returns (names, assumed): names of the data for the classes of a model without names."""
    if len(class_names) != spec.architecture.num_classes:
        raise InputError(
            f"{name}: has {spec.architecture.num_classes:,} classes without names, the data have "
            f"{len(class_names):,}; expected as many, in the same order, or the names of its "
            f"classes: --class_names=FILE; a run or its .safetensors has them"
        )
    numbers = all(re.fullmatch("[0-9]{1,18}", other) for other in class_names)
    order = "numeric order" if numbers else "order"
    logger.warning(
        f"{name} has no class names: its classes are taken in the {order} of the data's; "
        f"--class_names=FILE gives another"
    )
    return tuple(sorted(class_names, key=int) if numbers else class_names), not numbers


def _match_classes(known, class_names, name):
    """Returns an int array `(num_classes,)`: the model's class of each class of the data."""
    counts, index = Counter(known), {other: i for i, other in enumerate(known)}
    if unknown := [other for other in class_names if other not in index]:
        raise InputError(
            f"{name}: does not know {len(unknown)} of the data's {len(class_names)} classes: "
            f"{join_names(unknown)}; it knows {join_names(known)}"
        )
    if twice := [other for other in class_names if counts[other] > 1]:
        raise InputError(f"{name}: several of its classes have the same name: {join_names(twice)}")
    return np.array([index[other] for other in class_names])


# === Scores ===


def _outputs_of(subject):
    """Returns the logits of a `Subject`, as `compute_logits`, and labels in the model's classes."""
    description = f"evaluating {subject.name}"
    logits, labels = compute_logits(
        subject.model, subject.spec, subject.split, description, subject.batch_size
    )
    return logits, subject.class_of[labels]


def compute_logits(model, spec, split, description="evaluating", batch_size=EVALUATION_BATCH_SIZE):
    """Computes the outputs of a model on a split, once per image.

    Args:
        model: `keras.Model` from `build_mixer`, with or without a head.
        spec: `ModelSpec`, for preprocessing.
        split: `data.splits.Images`.
        description: Text of the progress bar.
        batch_size: int.

    Returns:
        (logits, labels), in the order of the split: float array `(n, num_classes)`, or
        `(n, dim)` without a head, and int array `(n,)`.
    """
    batches = evaluation_batches(split, spec, batch_size)
    predict = predictor(fast_inference(model, batch_size))
    logits, labels = [], []
    with broken_images_named(split):
        for images, batch_labels in track(batches, description):
            logits.append(predict(images.numpy()))
            labels.append(batch_labels.numpy())
    return np.concatenate(logits), np.concatenate(labels)


def score(logits, labels, spec):
    """Computes the scores of `evaluate` from `compute_logits`'s results and a `ModelSpec`.

    Of classes with equal logits, the first one counts as more likely, as in `predict`.

    Raises:
        InputError: If there are no images, or a logit is not finite.
    """
    if not len(labels):
        raise InputError("there are no images to score")
    check_finite(logits)
    classes = np.arange(len(spec.names))
    calibration = calibration_scores(logits, labels, spec.loss)
    ranked = np.argsort(-logits, axis=1, kind="stable")
    predicted = ranked[:, 0]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return {
        "top1": float(np.mean(predicted == labels)),
        "top5": float(np.mean((ranked[:, :5] == labels[:, None]).any(axis=1))),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_f1": float(f1[support > 0].mean()),
        "loss": calibration["nll"],
        **calibration,
        "n": len(labels),
        "classes": [
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(spec.names, precision, recall, f1, support, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def score_run(run):
    """Evaluates a `Run` on its validation split and on its `eval_split`.

    Scores are saved in metrics.json and returned, as a dict by split; existing ones are kept.
    """
    scores = run.scores
    names = ["validation"] if run.dataset.validation is not None else []
    for name in dict.fromkeys([*names, run.config.eval_split]):
        if name not in scores:
            result = evaluate(run, split=name).scores
            scores[name] = {key: result[key] for key in ("top1", "top5", "loss", "n")}
    write_metrics(run, scores, selected_epoch=model_folder.read_weights(run.best)[1]["epoch"])
    return scores


# === Temperature scaling ===


def _validation_images(run, subject, of_run):
    if run is None or run.dataset.validation is None:
        raise InputError(
            f"--temperature: expected a run with a validation split, on which it is fitted; this "
            f"{'run has none' if run else 'is not a run'}"
        )
    if of_run and subject.name == "validation":
        logger.warning("the temperature is fitted on the images that are scored, which flatters it")
    return run.dataset.validation


def _calibrated(subject, validation, logits, labels):
    """Returns the calibration scores with the temperature that is best for validation images."""
    loss, classes = subject.spec.loss, np.arange(logits.shape[1])
    fitting = subject._replace(name="validation", split=validation, class_of=classes)
    temperature = fit_temperature(*_outputs_of(fitting), loss)
    return {"temperature": temperature, **calibration_scores(logits / temperature, labels, loss)}


# === Comparison with an expected accuracy ===


def _recorded(run, split):
    """Returns the accuracy in metrics.json of a run, as a `Published`."""
    if run is None or split not in run.scores:
        raise InputError(
            f"--expected=recorded: expected a run with a score of {split} in metrics.json; "
            f"{f'{run.directory} has none' if run else 'this is no run'}"
        )
    source = f"{run.directory}/metrics.json"
    return Published(run.scores[split]["top1"], source, str(run.spec.preprocessing), rounding=0.0)


def _compare(scores, expected, confidence):
    """Compares `top1` with an expected accuracy, a fraction or a `Published`; returns a dict.

    They agree if the expected accuracy, give or take its rounding, lies in the Wilson interval.
    Without rounding, the number of correct images must be equal.
    """
    if not isinstance(expected, Published):
        expected = Published(expected, "--expected", "")
    correct, n = round(scores["top1"] * scores["n"]), scores["n"]
    low, high = wilson_interval(correct, n, confidence)
    top1, rounding = expected.top1, expected.rounding
    within = low <= top1 + rounding and top1 - rounding <= high
    agrees = within if rounding else correct == round(top1 * n)
    own = {"agrees": agrees, "interval": [low, high], "confidence": confidence}
    return own | expected._asdict()


# === Tables ===


MOST_CLASSES_IN_CONFUSION = 20


def as_table(scores):
    """Returns the scores of `evaluate` as text tables."""
    names = [one_line(row["name"]) for row in scores["classes"]]
    width = max(map(len, [*names, "class"]))
    lines = [
        f"{scores['split']}: {scores['n']:,} images, top-1 {scores['top1']:.2%}, "
        f"top-5 {scores['top5']:.2%}, loss {scores['loss']:.4f}",
        *(
            ["order of the model's classes: assumed, that of the data's"]
            * ("class_order" in scores)
        ),
        *_expected_lines(scores),
        f"over classes: balanced accuracy {scores['balanced_accuracy']:.2%}, "
        f"macro-F1 {scores['macro_f1']:.2%}",
        *_calibration_lines(scores),
        "",
        f"{'class':<{width}}  precision   recall       f1       n",
    ]
    for name, row in zip(names, scores["classes"], strict=True):
        shares = [f"{row[key]:.2%}" if row["n"] else "–" for key in ("precision", "recall", "f1")]
        lines.append("{:<{}}  {:>9}  {:>7}  {:>7}  {:6,}".format(name, width, *shares, row["n"]))
    lines += ["", *_confusion_lines(scores["confusion"], names, width)]
    if "corruptions" in scores:
        lines += ["", corruptions_as_text(scores["corruptions"], scores["top1"])]
    return "\n".join(lines)


def _expected_lines(scores):
    if "expected" not in scores:
        return []
    found = scores["expected"]
    low, high = found["interval"]
    rounding = f" ± {100 * found['rounding']:.3g} points" if found["rounding"] else ""
    images = f"; {found['preprocessing']}" if found["preprocessing"] else ""
    return [
        f"top-1 {scores['top1']:.2%} ({low:.2%} to {high:.2%}, Wilson interval of "
        f"{found['confidence']:.4g}) {'agrees' if found['agrees'] else 'does not agree'} with "
        f"{found['top1']:.2%}{rounding} ({one_line(found['source'])}{images})"
    ]


def _calibration_lines(scores):
    rows = {"calibration": scores}
    if calibrated := scores.get("calibrated"):
        rows[f"with temperature {calibrated['temperature']:.3f}"] = calibrated
    return [
        f"{name}: ECE {row['ece']:.2%}, NLL {row['nll']:.4f}, Brier score {row['brier']:.4f}"
        for name, row in rows.items()
    ]


def _confusion_lines(confusion, names, width):
    if len(names) > MOST_CLASSES_IN_CONFUSION:
        return [f"confusion of {len(names)} classes: see --format=json"]
    cell = 1 + max(len(str(n)) for row in [*confusion, range(len(names))] for n in row)
    header = " " * width + " " + "".join(f"{i:>{cell}}" for i in range(len(names)))
    rows = [
        f"{name:<{width}} " + "".join(f"{n:>{cell}}" for n in row)
        for name, row in zip(names, confusion, strict=True)
    ]
    return ["confusion (rows: true, columns: predicted)", header, *rows]
