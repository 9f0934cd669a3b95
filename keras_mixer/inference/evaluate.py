"""Evaluation: accuracy, loss, precision, recall, confusion; every image counted once."""

import numpy as np
from scipy.special import log_expit, log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from keras_mixer import console
from keras_mixer.preprocessing.input_pipeline import (
    EVALUATION_BATCH_SIZE,
    broken_images_named,
    evaluation_batches,
)
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import load_mixer


def evaluate_run(run, split_name, batch_size=EVALUATION_BATCH_SIZE):
    """Scores a run's best weights on one of its splits.

    Args:
        run: `training.run.Run`.
        split_name: string: `train`, `validation` or `test`.
        batch_size: int. Images computed at a time; it does not change the scores.

    Returns:
        dict of JSON values: the name of the `split`, `top1` and `top5` accuracy as fractions, mean
        cross-entropy `loss` in nats, `n` images, `classes` (precision, recall, f1 and n of each)
        and `confusion` (a row per true class, a column per predicted class).

    Raises:
        InputError: If there is no such split, or no weights yet.
    """
    split, model = run.dataset.split(split_name), load_mixer(run.best)
    outputs = compute_logits(model, run.spec, split, f"evaluating {split_name}", batch_size)
    return {"split": split_name, **score(*outputs, run.spec)}


def compute_logits(model, spec, split, description="evaluating", batch_size=EVALUATION_BATCH_SIZE):
    """Runs a model over a split.

    Args:
        model: `keras.Model` from `build_mixer`, with its head or without.
        spec: `ModelSpec`. How images are prepared.
        split: `data.splits.Images`.
        description: What the progress bar says.
        batch_size: int.

    Returns:
        (logits, labels): float array `(n, num_classes)`, of a model without a head `(n, dim)`, and
        int array `(n,)`, in the order of the split.
    """
    batches = evaluation_batches(split, spec, batch_size)
    logits, labels = [], []
    with broken_images_named(split):
        for images, batch_labels in console.track(batches, description):
            logits.append(model.predict_on_batch(images.numpy()))
            labels.append(batch_labels.numpy())
    return np.concatenate(logits), np.concatenate(labels)


def score(logits, labels, spec):
    """Computes the scores that `evaluate_run` returns.

    Args:
        logits: float array `(n, num_classes)`.
        labels: int array `(n,)`.
        spec: `ModelSpec`, with the class names and the loss.
    """
    classes = np.arange(len(spec.names))
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return {
        "top1": float(np.mean(predicted == labels)),
        "top5": _top5(logits, labels, classes),
        "loss": float(_MEAN_LOSSES[spec.loss](logits.astype(np.float64), labels)),
        "n": len(labels),
        "classes": [
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(spec.names, precision, recall, f1, support, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def _true(values, labels):
    return values[np.arange(len(labels)), labels]


# Mean loss in nats of logits and labels, as in training but in double precision.
_MEAN_LOSSES = {
    "softmax": lambda x, y: -_true(log_softmax(x, axis=1), y).mean(),
    "sigmoid": lambda x, y: -(log_expit(-x).sum(axis=1) + _true(x, y)).mean(),
}


def _top5(logits, labels, classes):
    if len(classes) <= 5:  # then the top 5 are all of them, and scikit-learn warns
        return 1.0
    return float(top_k_accuracy_score(labels, logits, k=5, labels=classes))


def score_run(run):
    """Evaluates a trained run on its validation split and, once, on its `eval_split`.

    The summary goes to the run's metrics.json. Splits that were scored before are not again.

    Args:
        run: `training.run.Run`.

    Returns:
        dict from split to scores.
    """
    scores = run.scores
    names = ["validation"] if run.dataset.validation is not None else []
    for name in dict.fromkeys([*names, run.config.eval_split]):
        if name not in scores:
            found = evaluate_run(run, name)
            scores[name] = {key: found[key] for key in ("top1", "top5", "loss", "n")}
    run.write_metrics(scores, selected_epoch=model_folder.read_weights(run.best)[1]["epoch"])
    return scores


MOST_CLASSES_IN_CONFUSION = 20


def as_table(scores):
    """Returns the scores of `evaluate_run` as text for people."""
    names = [console.printable(row["name"]) for row in scores["classes"]]
    width = max(map(len, [*names, "class"]))
    lines = [
        f"{scores['split']}: {scores['n']:,} images, top-1 {scores['top1']:.2%}, "
        f"top-5 {scores['top5']:.2%}, loss {scores['loss']:.4f}",
        "",
        f"{'class':<{width}}  precision   recall       f1       n",
    ]
    for name, row in zip(names, scores["classes"], strict=True):
        lines.append(
            f"{name:<{width}}  {row['precision']:9.2%}  {row['recall']:7.2%}  "
            f"{row['f1']:7.2%}  {row['n']:6,}"
        )
    return "\n".join([*lines, "", *_confusion_lines(scores["confusion"], names, width)])


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
