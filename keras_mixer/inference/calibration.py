"""Calibration error, negative log-likelihood, Brier score, temperature scaling, Wilson interval.

Probabilities are those that `predict` returns: the softmax of the logits or, for a model trained
with the sigmoid loss, the sigmoid of each, which need not sum to 1. The confidence is the largest
probability in both cases; the negative log-likelihood is that of the loss of the training.

Reference:
    Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax
from scipy.stats import binomtest

from keras_mixer.training.losses import PROBABILITIES

BINS = 15  # as in Guo et al.
TEMPERATURES = (0.01, 100.0)  # the bounds of `fit_temperature`


def calibration_scores(logits, labels, loss):
    """Computes the expected calibration error, negative log-likelihood and Brier score.

    Args:
        logits: float array `(n, num_classes)`, n at least 1.
        labels: int array `(n,)` of class indices.
        loss: string, one of `architecture.LOSSES`.

    Returns:
        dict of floats, all of which are better if lower:
            `ece`: Expected calibration error, from 0 to 1: the mean distance between the
                confidence, the probability of the top class, and the accuracy, over `BINS` bins of
                equal width.
            `nll`: Mean negative log-likelihood of the labels, in nats, see `mean_nll`.
            `brier`: Mean Brier score, the squared distance between the probabilities and the
                one-hot label, summed over the classes: from 0 to 2 for softmax, to num_classes for
                sigmoid.
    """
    probabilities = probabilities_of(logits, loss)
    return {
        "ece": _expected_calibration_error(reliability_bins(probabilities, labels)),
        "nll": mean_nll(logits, labels, loss),
        "brier": _brier_score(probabilities, labels),
    }


def probabilities_of(logits, loss):
    """Returns the probabilities `(n, num_classes)` of logits, in float64, as in `predict`."""
    return np.asarray(PROBABILITIES[loss](np.asarray(logits, np.float64)))


def reliability_bins(probabilities, labels, bins=BINS):
    """Computes the points of a reliability diagram: accuracy against confidence.

    Bin i, from 0, has the images whose top probability is above i / bins and at most
    (i + 1) / bins. Of classes with equal probabilities, the first one is the top class.

    Args:
        probabilities: float array `(n, num_classes)`, from 0 to 1.
        labels: int array `(n,)` of class indices.
        bins: int. Number of bins, all of the same width.

    Returns:
        list of (confidence, accuracy, count) with an element for each bin, lowest first: mean top
        probability, share of images whose top class is right, number of images. An empty bin is
        (its middle, 0.0, 0).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.searchsorted(np.arange(1, bins) / bins, confidence)
    members = [bin_of == index for index in range(bins)]
    return [
        (float(confidence[m].mean()), float(correct[m].mean()), int(m.sum()))
        if m.any()
        else ((index + 0.5) / bins, 0.0, 0)
        for index, m in enumerate(members)
    ]


def _expected_calibration_error(bins):
    """Returns the mean distance of confidence and accuracy over images."""
    distances = [count * abs(confidence - accuracy) for confidence, accuracy, count in bins]
    return sum(distances) / sum(count for _, _, count in bins)


def _brier_score(probabilities, labels):
    # (p - 1)² of the label's class is p² + 1 - 2p: no one-hot array is needed.
    errors = np.square(probabilities).sum(axis=1) + 1 - 2 * _of_labels(probabilities, labels)
    return float(errors.mean())


# === Negative log-likelihood ===


def mean_nll(logits, labels, loss):
    """Computes the mean negative log-likelihood of labels, in nats: the loss without smoothing.

    For the sigmoid loss it is the binary cross-entropy, summed over the classes.

    Args:
        logits: float array `(n, num_classes)`.
        labels: int array `(n,)` of class indices.
        loss: string, one of `architecture.LOSSES`.
    """
    return float(_MEAN_NLL[loss](np.asarray(logits, np.float64), labels))


def _of_labels(values, labels):
    return values[np.arange(len(labels)), labels]


_MEAN_NLL = {
    "softmax": lambda x, y: -_of_labels(log_softmax(x, axis=1), y).mean(),
    "sigmoid": lambda x, y: -(log_expit(-x).sum(axis=1) + _of_labels(x, y)).mean(),
}


# === Temperature scaling ===


def fit_temperature(logits, labels, loss):
    """Finds the temperature T with which logits / T have the least negative log-likelihood.

    Dividing by it keeps the ranking of the classes, hence the accuracy. A temperature above 1 means
    that the model is overconfident. Fit it on images that the model is neither trained nor
    evaluated on. The search is bounded by `TEMPERATURES`.

    Args:
        logits: float array `(n, num_classes)`.
        labels: int array `(n,)` of class indices.
        loss: string, one of `architecture.LOSSES`.

    Returns:
        float, positive.
    """
    logits = np.asarray(logits, np.float64)
    # The NLL is convex in 1 / T, so it has a single minimum over log T, too.
    result = minimize_scalar(
        lambda log_t: mean_nll(logits / np.exp(log_t), labels, loss),
        bounds=np.log(TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(result.x))


# === Confidence interval ===


def wilson_interval(correct, count, confidence=0.95):
    """Returns the Wilson score interval of an accuracy, as fractions (low, high).

    Args:
        correct: int. Number of images classified correctly.
        count: int. Number of images, at least 1.
        confidence: float in (0, 1). Confidence level.
    """
    interval = binomtest(correct, count).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
