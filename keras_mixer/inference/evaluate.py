"""How good a model is: every image of a split counted once, in float32."""

import numpy as np
from scipy.special import log_expit, log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from keras_mixer import console
from keras_mixer.data.pipeline import broken_images_named, evaluation_batches
from keras_mixer.weights import native
from keras_mixer.weights.load import load_mixer

BATCH_SIZE = 128


def evaluate_run(run, split_name, batch_size=BATCH_SIZE):
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
    split = run.source.split(split_name)
    logits, labels = compute_logits(
        load_mixer(run.best),
        split,
        f"scoring {split_name}",
        batch_size,
        run.config.eval_crop,
    )
    names = run.source.class_names
    return {"split": split_name, **score(logits, labels, names, run.config.loss)}


def compute_logits(
    model,
    split,
    description="scoring",
    batch_size=BATCH_SIZE,
    eval_crop=0.0,
    num_classes=None,
):
    """Runs a model over a split.

    Args:
        model: `keras.Model` from `build_mixer`, with its head or without.
        split: `data.splits.Split`.
        description: What the progress bar says.
        batch_size: int.
        eval_crop: float in [0, 1]. See `data.images.resize_images`.
        num_classes: int. Number of classes in the data, where it is not that of the outputs.

    Returns:
        (logits, labels): float array `(n, num_classes)`, of a model without a head `(n, dim)`, and
        int array `(n,)`, in the order of the split.
    """
    _, height, width, channels = model.input_shape
    batches = evaluation_batches(
        split,
        image_shape=(height, width),
        channels=channels,
        num_classes=num_classes or model.output_shape[-1],
        batch_size=batch_size,
        eval_crop=eval_crop,
    )
    logits, labels = [], []
    with broken_images_named(split):
        for images, one_hot in console.track(batches, description):
            logits.append(model.predict_on_batch(images.numpy()))
            labels.append(np.argmax(one_hot, axis=1))
    return np.concatenate(logits), np.concatenate(labels)


def score(logits, labels, class_names, loss="softmax"):
    """Computes the scores that `evaluate_run` returns.

    Args:
        logits: float array `(n, num_classes)`.
        labels: int array `(n,)`.
        class_names: One name per class.
        loss: string, a key of `LOSSES`: the one that the model was trained with.
    """
    classes = np.arange(len(class_names))
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return {
        "top1": float(np.mean(predicted == labels)),
        "top5": _top5(logits, labels, classes),
        "loss": float(LOSSES[loss](logits.astype(np.float64), labels)),
        "n": len(labels),
        "classes": [
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(class_names, precision, recall, f1, support, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def _true(values, labels):
    return values[np.arange(len(labels)), labels]


# Mean loss in nats of logits and labels, as in training but in double precision.
LOSSES = {
    "softmax": lambda x, y: -_true(log_softmax(x, axis=1), y).mean(),
    "sigmoid": lambda x, y: -(log_expit(-x).sum(axis=1) + _true(x, y)).mean(),
}


def _top5(logits, labels, classes):
    if len(classes) <= 5:  # then the top 5 are all of them, and scikit-learn warns
        return 1.0
    return float(top_k_accuracy_score(labels, logits, k=5, labels=classes))


def score_run(run):
    """Scores a trained run on its validation split and, once, on the split asked for at its end.

    The summary goes to the run's metrics.json. Scores that are there already stay.

    Args:
        run: `training.run.Run`.

    Returns:
        The contents of metrics.json.
    """
    metrics = run.metrics()
    names = ["validation"] if run.source.validation is not None else []
    for name in dict.fromkeys([*names, run.config.eval_split]):
        if name not in metrics:
            scores = evaluate_run(run, name)
            metrics[name] = {key: scores[key] for key in ("top1", "top5", "loss", "n")}
    metrics["selected_epoch"] = native.read_weights(run.best)[1]["epoch"]
    run.write_metrics(metrics)
    return metrics


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
