"""Evaluates a model on a split: accuracy, loss, calibration, and precision and recall by class."""

import dataclasses
from typing import NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from keras_mixer.compute.devices import predictor
from keras_mixer.compute.fast_mixing import fast_inference, use_threads_for
from keras_mixer.data.splits import FileImages
from keras_mixer.errors import InputError, join_names
from keras_mixer.inference.calibration import calibration_scores, fit_temperature
from keras_mixer.log import logger, one_line, track
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE, evaluation_batches
from keras_mixer.runs.run import check_best, write_metrics
from keras_mixer.training.losses import check_finite
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import build_pretrained, load_mixer


class Subject(NamedTuple):
    """A model and the images to evaluate it on.

    Attributes:
        name: Name of the split, for people.
        model: `keras.Model` from `load_mixer`.
        spec: `ModelSpec`, with the names of the model's classes.
        split: `data.splits.Images`.
        class_of: int array: the model's class of each class of the data.
        batch_size: int. Does not change the scores.
    """

    name: str
    model: object
    spec: ModelSpec
    split: object
    class_of: np.ndarray
    batch_size: int


def subject_of_run(run, split_name, batch_size=EVALUATION_BATCH_SIZE):
    """Loads a run's best weights, to be evaluated on one of its splits.

    Args:
        run: `training.run.Run`.
        split_name: string: `train`, `validation` or `test`.
        batch_size: int.

    Returns:
        `Subject`.

    Raises:
        InputError: If the split or the weights do not exist.
    """
    split = run.dataset.split(split_name)
    check_best(run)
    use_threads_for(batch_size)
    classes = np.arange(len(run.dataset.class_names))
    return Subject(split_name, load_mixer(run.best), run.spec, split, classes, batch_size)


def subject_of_weights(
    pretrained, path, dataset, split_name=None, batch_size=EVALUATION_BATCH_SIZE
):
    """Builds a model of pretrained weights, to be evaluated on labeled images of any dataset.

    Classes are matched by name, so the data may have some of the model's classes only; if the
    weights have no class names, they are taken to be in the order of the data's.

    Args:
        pretrained: `Pretrained`.
        path: Its path, as in `read_pretrained`.
        dataset: `Dataset`.
        split_name: string, or None for `test`; without it `validation`; without both, all images.
        batch_size: int.

    Returns:
        `Subject`.

    Raises:
        InputError: If the data have other classes or channels, or no such split.
    """
    name, split = _split_to_score(dataset, split_name)
    spec = pretrained.spec
    split = _with_channels(split, spec.architecture.channels, path)
    class_of = _model_classes(spec, dataset.class_names, path)
    if spec.class_names is None:
        spec = spec.replace(class_names=dataset.class_names)
    use_threads_for(batch_size)
    model = build_pretrained(pretrained, path)
    return Subject(name, model, spec, split, class_of, batch_size)


def _split_to_score(dataset, name):
    if name is None and dataset.test is None and dataset.validation is None:
        return "all images", dataset.train
    name = dataset.split_to_score(name)
    return name, dataset.split(name)


def _with_channels(split, channels, path):
    """Returns the split with its images decoded to so many channels."""
    if split.channels != channels and isinstance(split, FileImages):
        return dataclasses.replace(split, channels=channels)
    if split.channels != channels:
        raise InputError(
            f"{path}: it was trained on images of {channels} channels, the data have "
            f"{split.channels}; --dataset names others"
        )
    return split


def _model_classes(spec, class_names, path):
    """Returns an int array `(num_classes,)`: the model's class of each class of the data."""
    own = spec.class_names
    if own is None and len(class_names) == spec.architecture.num_classes:
        logger.warning(
            f"{path} has no class names: its classes are taken in the order of the data's"
        )
        return np.arange(len(class_names))
    if own is None:
        raise InputError(
            f"{path}: has {spec.architecture.num_classes:,} classes without names, the data have "
            f"{len(class_names):,}; expected as many, in the same order; a run or its .safetensors "
            f"knows them by name"
        )
    if unknown := [name for name in class_names if name not in own]:
        raise InputError(
            f"{path}: does not know {len(unknown)} of the data's {len(class_names)} classes: "
            f"{join_names(unknown)}; it knows {join_names(own)}"
        )
    return np.array([own.index(name) for name in class_names])


def evaluate_run(run, split_name, batch_size=EVALUATION_BATCH_SIZE):
    """Evaluates a run's best weights on one of its splits, see `evaluate_subject`."""
    return evaluate_subject(subject_of_run(run, split_name, batch_size))


def evaluate_subject(subject, validation=None):
    """Evaluates a model.

    Args:
        subject: `Subject`.
        validation: `Images` of the run that trained the model, with its labels, to fit a
            temperature on; or None.

    Returns:
        dict of JSON values: the name of the `split`, `top1` and `top5` accuracy as fractions,
        `balanced_accuracy` and `macro_f1` (means of recall and F1 over the classes with images),
        mean cross-entropy `loss` in nats, `ece`, `nll` and `brier` (see `calibration_scores`),
        number of images `n`, `classes` (name, precision, recall, f1 and n of each) and `confusion`
        (rows: true classes, columns: predicted classes). With validation images, `calibrated` is a
        dict of the `temperature` and of the `ece`, `nll` and `brier` with it.
    """
    logits, labels = outputs_of(subject)
    scores = {"split": subject.name, **score(logits, labels, subject.spec)}
    if validation is not None:
        scores["calibrated"] = _calibrated(subject, validation, logits, labels)
    return scores


def _calibrated(subject, validation, logits, labels):
    """Returns the calibration scores with the temperature that is best for validation images."""
    loss, classes = subject.spec.loss, np.arange(logits.shape[1])
    fitting = subject._replace(name="validation", split=validation, class_of=classes)
    temperature = fit_temperature(*outputs_of(fitting), loss)
    return {"temperature": temperature, **calibration_scores(logits / temperature, labels, loss)}


def outputs_of(subject):
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
    """Computes the scores of `evaluate_subject` from `compute_logits`'s results and a `ModelSpec`.

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
    """Evaluates a `training.run.Run` on its validation split and on its `eval_split`.

    Scores are saved in metrics.json and returned, as a dict by split; existing ones are kept.
    """
    scores = run.scores
    names = ["validation"] if run.dataset.validation is not None else []
    for name in dict.fromkeys([*names, run.config.eval_split]):
        if name not in scores:
            result = evaluate_run(run, name)
            scores[name] = {key: result[key] for key in ("top1", "top5", "loss", "n")}
    write_metrics(run, scores, selected_epoch=model_folder.read_weights(run.best)[1]["epoch"])
    return scores


MOST_CLASSES_IN_CONFUSION = 20


def as_table(scores):
    """Returns the scores of `evaluate_subject` as a text table."""
    names = [one_line(row["name"]) for row in scores["classes"]]
    width = max(map(len, [*names, "class"]))
    lines = [
        f"{scores['split']}: {scores['n']:,} images, top-1 {scores['top1']:.2%}, "
        f"top-5 {scores['top5']:.2%}, loss {scores['loss']:.4f}",
        f"over classes: balanced accuracy {scores['balanced_accuracy']:.2%}, "
        f"macro-F1 {scores['macro_f1']:.2%}",
        *_calibration_lines(scores),
        "",
        f"{'class':<{width}}  precision   recall       f1       n",
    ]
    for name, row in zip(names, scores["classes"], strict=True):
        shares = [f"{row[key]:.2%}" if row["n"] else "–" for key in ("precision", "recall", "f1")]
        lines.append("{:<{}}  {:>9}  {:>7}  {:>7}  {:6,}".format(name, width, *shares, row["n"]))
    return "\n".join([*lines, "", *_confusion_lines(scores["confusion"], names, width)])


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
