"""Analysis of outputs and weights: intervals, mistakes, paired comparison, opposite phases."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

_Z = norm.ppf(0.975)  # of intervals of 95%


def confident_mistakes(confidence, correct, most):
    """Returns the indices of at most `most` images that are wrong, most confident first.

    Args:
        confidence: array `(n,)`: the probability of the predicted class.
        correct: bool array `(n,)`.
        most: int.
    """
    wrong = np.flatnonzero(~correct)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:most]


# === Comparison ===


class Comparison(NamedTuple):
    """Two models on the same images.

    Attributes:
        gained: Number of images that only the model classifies correctly.
        lost: Number of images that only the reference classifies correctly.
        difference: Accuracy of the model less that of the reference.
        low, high: 95% interval of the difference.
        p: p-value of McNemar's exact test that the accuracies are equal.
    """

    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def compare(correct, reference):
    """Compares a model with a reference, by whether each classifies each image correctly.

    The interval is Wald's for paired proportions after half an image is added to each of the four
    counts: it keeps its 95% for few images and for accuracies near 1.

    Args:
        correct, reference: bool arrays `(n,)`.

    Returns:
        A `Comparison`.

    Reference:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions",
        Statistics in Medicine 24 (2005).
    """
    gained, lost = int((correct & ~reference).sum()), int((~correct & reference).sum())
    count, discordant = len(correct) + 2, gained + lost + 1
    center = (gained - lost) / count
    margin = _Z * np.sqrt(discordant - (gained - lost) ** 2 / count) / count
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    difference = (gained - lost) / len(correct)
    low, high = np.clip([center - margin, center + margin], -1, 1)
    return Comparison(gained, lost, difference, float(low), float(high), float(p))


# === Opposite phases ===


def pair_opposites(kernels):
    """Returns an order of units in which each stands beside the one most opposite in phase.

    The two units with the most negative correlation are a pair, then those of the others, and so
    on; pairs are sorted by spatial frequency, low ones first. A unit that is left over is the last.

    Args:
        kernels: float array `(units, rows, columns)`.

    Returns:
        int array `(units,)`; a pair is at 2k and 2k + 1.

    Reference:
        Paper figures 5 and 6.
    """
    correlations = _correlations(kernels.reshape(len(kernels), -1))
    pairs, free = [], set(range(len(kernels)))
    for pair in _from_most_negative(correlations):
        if free.issuperset(pair):
            free.difference_update(pair)
            pairs.append(pair)
        if len(free) < 2:
            break
    frequencies = _frequencies(kernels)
    pairs.sort(key=lambda pair: frequencies[list(pair)].mean())
    return np.array([*itertools.chain.from_iterable(pairs), *free], int)


def _correlations(vectors):
    """Returns the correlations `(n, n)` of vectors `(n, m)`; 0 for one whose values are equal."""
    centered = vectors - vectors.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centered, axis=1, keepdims=True)
    units = centered / np.where(lengths > 0, lengths, 1)
    return units @ units.T


def _from_most_negative(correlations):
    first, second = np.triu_indices(len(correlations), 1)
    order = np.argsort(correlations[first, second], kind="stable")
    return zip(first[order].tolist(), second[order].tolist(), strict=True)


def _frequencies(kernels):
    """Returns the mean spatial frequency `(n,)` of kernels `(n, rows, columns)`, by power."""
    power = np.abs(np.fft.fft2(kernels)) ** 2
    rows, columns = map(np.fft.fftfreq, kernels.shape[1:])
    weighted = (power * np.hypot(rows[:, None], columns)).sum(axis=(1, 2))
    return weighted / np.maximum(power.sum(axis=(1, 2)), np.finfo(float).tiny)
