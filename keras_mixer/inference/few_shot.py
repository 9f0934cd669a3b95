"""Few-shot evaluation: ridge regression on the pre-logits of a few images per class.

This is the paper's linear few-shot metric: the pre-logits of k images of every class are
standardized and regressed with L2 on targets of -1 and 1. Several samples of k images give an error
estimate.

With the same images and L2, predictions equal those of the official evaluator (google-research/
big_vision, `evaluators/fewshot_lsr.py`): its bias, a column of 100s under the same L2, is the same
for all classes if they have equally many images. L2 is 1024 for all datasets there; here it is
chosen on validation images or on the shots, never on test images.
"""

import statistics
from typing import NamedTuple

import keras
import numpy as np
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_mixer.errors import InputError, join_names
from keras_mixer.inference.evaluate import compute_logits
from keras_mixer.log import logger, track
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE

FOLDS = 5


class Examples(NamedTuple):
    """Pre-logits of images, with labels.

    Attributes:
        features: float64 array `(n, dim)`.
        labels: int array `(n,)`.
        ranks: int array `(n,)` from `rank_images`, or None.
    """

    features: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray | None = None


def score_few_shot(model, dataset, shots, seeds, l2, batch_size=EVALUATION_BATCH_SIZE):
    """Computes the few-shot test accuracy of a model for some numbers of shots and seeds.

    For each number of shots, L2 is the value with the best mean accuracy over the seeds on the
    validation images or, without a validation split, in cross-validation on the shots. Only the
    sampled training images are decoded; of record files, all are read once, for their labels.

    Args:
        model: `keras.Model` from `load_mixer`.
        dataset: `Dataset` with a test split.
        shots: Numbers of images per class. Larger samples contain the smaller ones.
        seeds: Seeds of the samples.
        l2: Weights of the L2 penalty to choose from.
        batch_size: int. Does not change the scores.

    Returns:
        dict of JSON values: `n` test images, number of `classes`, `seeds`, `chosen_on` (how L2 was
        chosen), and `shots`, a list of results by number of shots; see docs/evaluation.md.

    Raises:
        InputError: If no class has enough training images, or L2 cannot be chosen.
    """
    shots, l2 = sorted(set(shots)), sorted(set(l2))
    seeds = list(dict.fromkeys(seeds))
    labels = dataset.train.read_labels()
    check_shots(labels, shots, dataset.class_names)
    ranks = [rank_images(labels, seed) for seed in seeds]
    sampled = np.flatnonzero(np.min(ranks, axis=0) < shots[-1])
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

    train = examples(dataset.train.take(sampled), "features of the shots")
    validation = examples(dataset.validation, "of validation") if by_validation else None
    test = examples(dataset.test, "of test")
    samples = [train._replace(ranks=order[sampled]) for order in ranks]
    rows = [_score(count, samples, validation, test, l2) for count in track(shots, "regressing")]
    return {
        "n": len(test.labels),
        "classes": len(dataset.class_names),
        "seeds": seeds,
        "chosen_on": _chosen_on(l2, validation),
        "shots": rows,
    }


def pre_logits_of(model):
    """Returns a `keras.Model` from images to pre-logits `(batch, dim)` that shares the weights."""
    return keras.Model(model.input, model.get_layer("pre_logits").output)


# === Sampling ===


def rank_images(labels, seed):
    """Ranks the images of every class at random; k shots are those of ranks below k.

    Args:
        labels: int array `(n,)`.
        seed: int.

    Returns:
        int array `(n,)`: the rank of every image within its class, from 0.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, random within a class
    first = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), int)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def check_shots(labels, shots, class_names):
    """Warns about classes with fewer training images than shots; all of theirs are used.

    Args:
        labels: int array `(n,)` of the training images.
        shots: Numbers of images per class.
        class_names: One name per class.

    Raises:
        InputError: If all classes have fewer.
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
            named = join_names([f"{class_names[label]} ({counts[label]})" for label in few])
            logger.warning(
                f"{count} shots: {len(few)} of {len(counts)} classes have fewer training images, "
                f"all of which are used: {named}"
            )


def _first(examples, count):
    kept = examples.ranks < count
    return Examples(*(column[kept] for column in examples))


# === Regression ===


def regression(l2):
    """Returns a scikit-learn model: standardization, then ridge regression on targets -1 and 1.

    `l2` is the weight of the squared norm, added to the sum (not the mean) of squared errors.
    """
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=l2, solver="cholesky"))


def choose_l2(samples, validation, l2):
    """Chooses the L2 with the best mean accuracy over the samples; of equal ones, the middle.

    Args:
        samples: list of `Examples` with ranks.
        validation: `Examples`, or None for cross-validation on each sample.
        l2: list of floats, ascending.

    Returns:
        (l2, accuracies): the chosen value, and the mean accuracy of every value.
    """
    accuracies = [
        np.mean([_accuracy(shots, validation, value) for shots in samples]) for value in l2
    ]
    best = np.flatnonzero(np.equal(accuracies, max(accuracies)))
    return l2[best[len(best) // 2]], accuracies


def _accuracy(shots, validation, l2):
    if validation is None:  # stratified folds
        folds = PredefinedSplit(shots.ranks % FOLDS)
        return cross_val_score(regression(l2), shots.features, shots.labels, cv=folds).mean()
    return _fitted(shots, l2).score(validation.features, validation.labels)


def _fitted(shots, l2):
    return regression(l2).fit(shots.features, shots.labels)


def _score(count, samples, validation, test, l2):
    """Returns the result for one number of shots, as JSON values."""
    samples = [_first(examples, count) for examples in samples]
    chosen, choice = l2[0], []
    if len(l2) > 1:
        chosen, accuracies = choose_l2(samples, validation, l2)
        choice = [{"l2": v, "top1": float(a)} for v, a in zip(l2, accuracies, strict=True)]
    top1 = [float(_fitted(shots, chosen).score(test.features, test.labels)) for shots in samples]
    return {
        "shots": count,
        "images": len(samples[0].labels),
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
    """Returns the scores of `score_few_shot` as a text table."""
    seeds = ", ".join(map(str, scores["seeds"]))
    lines = [
        f"test: {scores['n']:,} images of {scores['classes']} classes; samples of seeds {seeds}; "
        f"L2: {scores['chosen_on']}",
        "",
        f"{'shots':>5}  {'images':>7}  {'top-1':<16}  L2",
    ]
    for row in scores["shots"]:
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
        top1 = f"{100 * row['mean']:.2f}{spread} %"
        lines.append(f"{row['shots']:>5}  {row['images']:>7,}  {top1:<16}  {row['l2']:g}")
    return "\n".join(lines)
