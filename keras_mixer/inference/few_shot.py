"""Few-shot evaluation: ridge regression on the pre-logits of a few images per class.

This is the paper's linear few-shot metric. Pre-logits are computed once; k images of every class
are drawn, their features whitened by their own mean and deviation, and regressed with L2 on targets
of -1 and 1; an image is of the class with the largest output. Several draws give an error.

With the same draw and the same L2 it predicts what the official evaluator does
(google-research/big_vision, `evaluators/fewshot_lsr.py`): its bias, a column of 100s that shares
the L2, tells no class from another where all have as many images. There L2 is fixed to 1024 for
all data; here it is chosen without the test images, on validation images or on the shots.
"""

import statistics
from typing import NamedTuple

import keras
import numpy as np
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_mixer import console
from keras_mixer.errors import InputError, some_of
from keras_mixer.inference.evaluate import compute_logits
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE

FOLDS = 5


class Examples(NamedTuple):
    """Images as a model sees them.

    Attributes:
        features: float64 array `(n, dim)`.
        labels: int array `(n,)`.
        ranks: int array `(n,)`: the rank of each in the order in which its class is drawn; None
            where nothing is drawn.
    """

    features: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray | None = None


def score_few_shot(model, dataset, shots, seeds, l2, batch_size=EVALUATION_BATCH_SIZE):
    """Scores a model's pre-logits on the test images of a data set, after few training images.

    Of the training images only those that are drawn are decoded and computed; of records all are
    read once, for their labels. The test images are scored once for every
    number of shots and every seed, when L2 has been chosen: the value with the best mean accuracy
    over the seeds on the validation images or, where the data set has none, in cross-validation on
    the shots.

    Args:
        model: `keras.Model` from `load_mixer`.
        dataset: `Dataset` with a test split.
        shots: Numbers of images of every class. The draws are nested: 5 hold the 1.
        seeds: Seeds of the draws.
        l2: Weights of the L2 penalty to choose from; a single one is taken as it is.
        batch_size: int. Images computed at a time; it does not change the scores.

    Returns:
        dict of JSON values: `n` test images, `classes`, `seeds`, what L2 was `chosen_on`, and
        `shots`, a list with an entry for each number of them; see BUILD.md.

    Raises:
        InputError: If no class has enough training images, or L2 cannot be chosen.
    """
    shots, l2 = sorted(set(shots)), sorted(set(l2))
    seeds = list(dict.fromkeys(seeds))
    labels = dataset.train.read_labels()
    check_shots(labels, shots, dataset.class_names)
    ranks = [draw(labels, seed) for seed in seeds]
    drawn = np.flatnonzero(np.min(ranks, axis=0) < shots[-1])
    by_validation = dataset.validation is not None and len(l2) > 1
    if shots[0] == 1 and len(l2) > 1 and not by_validation:
        raise InputError(
            "--shots=1: without validation images, L2 is chosen by cross-validation, which a "
            "single image of a class does not allow; give --validation_fraction, or one --l2"
        )
    body = pre_logits_of(model)

    def examples(split, description):
        features, labels = compute_logits(body, model.spec, split, description, batch_size)
        return Examples(features.astype(np.float64), labels)

    train = examples(dataset.train.take(drawn), "features of the shots")
    validation = examples(dataset.validation, "of validation") if by_validation else None
    test = examples(dataset.test, "of test")
    draws = [train._replace(ranks=order[drawn]) for order in ranks]
    rows = [
        _row(count, draws, validation, test, l2) for count in console.track(shots, "regressing")
    ]
    return {
        "n": len(test.labels),
        "classes": len(dataset.class_names),
        "seeds": seeds,
        "chosen_on": _chosen_on(l2, validation),
        "shots": rows,
    }


def pre_logits_of(model):
    """Returns the model up to its pre-logits, with the same weights.

    Args:
        model: `keras.Model` from `build_mixer`, with a head or without.

    Returns:
        A `keras.Model` from images to pre-logits `(batch, dim)`.
    """
    return keras.Model(model.input, model.get_layer("pre_logits").output)


# === Drawing ===


def draw(labels, seed):
    """Draws an order of the images of every class; k shots are those of rank below k.

    So each draw of more shots holds those of fewer.

    Args:
        labels: int array `(n,)`.
        seed: int.

    Returns:
        int array `(n,)`: the rank of every image among those of its class, from 0.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each in random order
    first = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), int)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def check_shots(labels, shots, class_names):
    """Says which classes have fewer images than shots: theirs are all used.

    Args:
        labels: int array `(n,)` of the training images.
        shots: Numbers of images of every class.
        class_names: One name per class.

    Raises:
        InputError: If no class has that many.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    if max(shots) > counts.max():
        raise InputError(
            f"--shots={max(shots)}: no class has more than {counts.max()} training images; "
            f"give at most that many"
        )
    for count in shots:
        few = np.flatnonzero(counts < count)
        if len(few):
            named = some_of([f"{class_names[label]} ({counts[label]})" for label in few])
            console.say(
                f"{count} shots: {len(few)} of {len(counts)} classes have fewer training images, "
                f"all of which are used: {named}"
            )


def _first(examples, count):
    """The examples of a draw's first ranks."""
    kept = examples.ranks < count
    return Examples(*(column[kept] for column in examples))


# === Regressing ===


def regression(l2):
    """Returns the scikit-learn model: features whitened, then ridge regression on -1 and 1.

    Args:
        l2: float. Weight of the squared norm beside the sum of squared errors.
    """
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=l2, solver="cholesky"))


def choose_l2(draws, validation, l2):
    """Chooses the L2 of the best mean accuracy over the draws; of equals, the middle one.

    Args:
        draws: list of `Examples` with their ranks.
        validation: `Examples` to measure the accuracy on; None to cross-validate on the draws.
        l2: list of floats, ascending.

    Returns:
        (l2, accuracies): the value chosen, and the mean accuracy of every value.
    """
    accuracies = [np.mean([_accuracy(shots, validation, value) for shots in draws]) for value in l2]
    best = np.flatnonzero(np.equal(accuracies, max(accuracies)))
    return l2[best[len(best) // 2]], accuracies


def _accuracy(shots, validation, l2):
    if validation is None:  # in folds that hold as many images of every class
        folds = PredefinedSplit(shots.ranks % FOLDS)
        return cross_val_score(regression(l2), shots.features, shots.labels, cv=folds).mean()
    return _fitted(shots, l2).score(validation.features, validation.labels)


def _fitted(shots, l2):
    return regression(l2).fit(shots.features, shots.labels)


def _row(count, draws, validation, test, l2):
    """The scores of one number of shots, as JSON values."""
    draws = [_first(examples, count) for examples in draws]
    chosen, choice = l2[0], []
    if len(l2) > 1:
        chosen, accuracies = choose_l2(draws, validation, l2)
        choice = [{"l2": v, "top1": float(a)} for v, a in zip(l2, accuracies, strict=True)]
    top1 = [float(_fitted(shots, chosen).score(test.features, test.labels)) for shots in draws]
    return {
        "shots": count,
        "images": len(draws[0].labels),
        "l2": chosen,
        "top1": top1,
        "mean": statistics.mean(top1),
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "choice": choice,
    }


def _chosen_on(l2, validation):
    if len(l2) == 1:
        return "given"
    if validation is None:
        return "cross-validation on the shots"
    return f"{len(validation.labels):,} validation images"


# === As text ===


def as_table(scores):
    """Returns the scores of `score_few_shot` as text for people."""
    seeds = ", ".join(map(str, scores["seeds"]))
    lines = [
        f"test: {scores['n']:,} images of {scores['classes']} classes; draws of seeds {seeds}; "
        f"L2: {scores['chosen_on']}",
        "",
        f"{'shots':>5}  {'images':>7}  {'top-1':<16}  L2",
    ]
    for row in scores["shots"]:
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
        top1 = f"{100 * row['mean']:.2f}{spread} %"
        lines.append(f"{row['shots']:>5}  {row['images']:>7,}  {top1:<16}  {row['l2']:g}")
    return "\n".join(lines)
