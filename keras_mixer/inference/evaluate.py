"""Evaluates a model on a split: accuracy, loss, precision, recall and confusion matrix."""

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
    """Evaluates a run's best weights on one of its splits.

    Args:
        run: `training.run.Run`.
        split_name: string: `train`, `validation` or `test`.
        batch_size: int. Does not change the scores.

    Returns:
        dict of JSON values: the name of the `split`, `top1` and `top5` accuracy as fractions, mean
        cross-entropy `loss` in nats, number of images `n`, `classes` (name, precision, recall, f1
        and n of each) and `confusion` (rows: true classes, columns: predicted classes).

    Raises:
        InputError: If the split or the weights do not exist.
    """
    split, model = run.dataset.split(split_name), load_mixer(run.best)
    outputs = compute_logits(model, run.spec, split, f"evaluating {split_name}", batch_size)
    return {"split": split_name, **score(*outputs, run.spec)}


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
    logits, labels = [], []
    with broken_images_named(split):
        for images, batch_labels in console.track(batches, description):
            logits.append(model.predict_on_batch(images.numpy()))
            labels.append(batch_labels.numpy())
    return np.concatenate(logits), np.concatenate(labels)


def score(logits, labels, spec):
    """Computes the scores of `evaluate_run` from `compute_logits`'s results and a `ModelSpec`."""
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


def _of_labels(values, labels):
    return values[np.arange(len(labels)), labels]


# Mean losses in nats, from logits in float64 and labels.
_MEAN_LOSSES = {
    "softmax": lambda x, y: -_of_labels(log_softmax(x, axis=1), y).mean(),
    "sigmoid": lambda x, y: -(log_expit(-x).sum(axis=1) + _of_labels(x, y)).mean(),
}


def _top5(logits, labels, classes):
    if len(classes) <= 5:  # always correct; scikit-learn would warn
        return 1.0
    return float(top_k_accuracy_score(labels, logits, k=5, labels=classes))


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
    run.write_metrics(scores, selected_epoch=model_folder.read_weights(run.best)[1]["epoch"])
    return scores


MOST_CLASSES_IN_CONFUSION = 20


def as_table(scores):
    """Returns the scores of `evaluate_run` as a text table."""
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
