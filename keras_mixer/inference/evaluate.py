"""How good a model is: every image of a split counted once, in float32."""

import numpy as np
from scipy.special import log_softmax
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
    logits = compute_logits(load_mixer(run.best), split, f"scoring {split_name}", batch_size)
    return {"split": split_name, **score(logits, split.read_labels(), run.source.class_names)}


def compute_logits(model, split, description="scoring", batch_size=BATCH_SIZE):
    """Runs a model over a split.

    Args:
        model: `keras.Model` from `build_mixer`.
        split: `data.splits.Split`.
        description: What the progress bar says.
        batch_size: int.

    Returns:
        float array `(n, num_classes)`, in the order of the split.
    """
    _, height, width, channels = model.input_shape
    batches = evaluation_batches(
        split,
        image_shape=(height, width),
        channels=channels,
        num_classes=model.output_shape[-1],
        batch_size=batch_size,
    )
    with broken_images_named(split):
        logits = [model.predict_on_batch(x) for x, _ in console.track(batches, description)]
    return np.concatenate(logits)


def score(logits, labels, class_names):
    """Computes the scores that `evaluate_run` returns.

    Args:
        logits: float array `(n, num_classes)`.
        labels: int array `(n,)`.
        class_names: One name per class.
    """
    classes = np.arange(len(class_names))
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    true_log_probabilities = log_softmax(logits.astype(np.float64), axis=1)[
        np.arange(len(labels)), labels
    ]
    return {
        "top1": float(np.mean(predicted == labels)),
        "top5": _top5(logits, labels, classes),
        "loss": float(-true_log_probabilities.mean()),
        "n": len(labels),
        "classes": [
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(class_names, precision, recall, f1, support, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
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
