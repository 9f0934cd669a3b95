"""Statistics of reports: intervals of accuracies, paired comparison, pairs of opposite kernels."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm


def wilson_interval(correct, count):
    """Returns Wilson's 95% interval of an accuracy, as fractions (low, high).

    Args:
        correct: int. Number of images classified correctly.
        count: int. Number of images, at least 1.
    """
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


class Comparison(NamedTuple):
    """Two models on the same images.

    Attributes:
        gained: Number of images that only the model classifies correctly.
        lost: Number of images that only the reference classifies correctly.
        difference: Accuracy of the model minus that of the reference.
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
    margin = norm.ppf(0.975) * np.sqrt(discordant - (gained - lost) ** 2 / count) / count
    low, high = np.clip([center - margin, center + margin], -1, 1)
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    difference = (gained - lost) / len(correct)
    return Comparison(gained, lost, difference, float(low), float(high), float(p))


def pair_opposites(kernels):
    """Returns an order of kernels in which each stands beside the one most opposite in phase.

    The two kernels with the most negative correlation are a pair, then those of the others, and so
    on. Pairs are sorted by mean spatial frequency, low ones first; a kernel without a partner is
    the last (paper, figures 5 and 6).

    Args:
        kernels: float array `(n, height, width)`.

    Returns:
        int array `(n,)`; a pair is at 2k and 2k + 1.
    """
    vectors = kernels.reshape(len(kernels), -1)
    with np.errstate(divide="ignore", invalid="ignore"):  # kernels of equal values
        correlations = np.nan_to_num(np.atleast_2d(np.corrcoef(vectors)))
    np.fill_diagonal(correlations, np.inf)
    pairs = []
    for _ in range(len(kernels) // 2):
        pair = np.unravel_index(correlations.argmin(), correlations.shape)
        correlations[pair, :] = correlations[:, pair] = np.inf
        pairs.append(sorted(map(int, pair)))
    power = np.abs(np.fft.fft2(kernels)) ** 2
    rows, columns = map(np.fft.fftfreq, kernels.shape[1:])
    weighted = (power * np.hypot(rows[:, None], columns)).sum(axis=(1, 2))
    frequencies = weighted / np.maximum(power.sum(axis=(1, 2)), np.finfo(float).tiny)
    pairs.sort(key=lambda pair: frequencies[pair].mean())
    paired = np.array(pairs, int).reshape(-1)
    return np.concatenate([paired, np.setdiff1d(np.arange(len(kernels)), paired)])
