"""Figures of the page on an experiment: what the best weights of its first run do.

To add a figure, write a function of `Findings` and add it to `FIGURES`, the table at the end.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from keras.ops import convert_to_numpy
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter

from keras_mixer.compute.fast_mixing import use_threads_for
from keras_mixer.inference.calibration import probabilities_of, reliability_bins
from keras_mixer.inference.evaluate import compute_logits, score
from keras_mixer.log import one_line
from keras_mixer.model.layers import MixerBlock
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE, evaluation_batches
from keras_mixer.reports.analysis import pair_opposites
from keras_mixer.reports.pictures import ACCENT, INK, mosaic, png, svg
from keras_mixer.reports.preview import as_picture, contact_sheet
from keras_mixer.runs.open_run import read_run
from keras_mixer.weights.load import load_mixer


class Findings(NamedTuple):
    """The best weights of a run, and their outputs for the images of a split.

    Attributes:
        run: `Run`.
        model: `keras.Model` from `load_mixer`.
        split: Name of the split.
        images: `Images` of the split.
        labels: int array `(n,)`.
        predicted: int array `(n,)`.
        probabilities: float array `(n, num_classes)`.
        scores: dict, see `evaluate.score`.
        names: Names of the classes, a list.
    """

    run: object
    model: object
    split: str
    images: object
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    scores: dict
    names: list


def examine(directory, description="examining"):
    """Evaluates the best weights of the run in a directory, and returns the `Findings`.

    Args:
        directory: Path of a run directory.
        description: Text of the progress bar.

    Raises:
        InputError: If the data or the weights are missing, damaged, or not those of the run.
    """
    run = read_run(directory)
    use_threads_for(EVALUATION_BATCH_SIZE)
    # A run of a sweep is trained for its validation score; the best ones are tested later.
    model, split = load_mixer(run.best), "test" if "test" in run.scores else run.config.eval_split
    images = run.dataset.split(split)
    logits, labels = compute_logits(model, run.spec, images, f"{description}: {split} images")
    scores = score(logits, labels, run.spec)
    probabilities = probabilities_of(logits, run.spec.loss)
    return Findings(
        run, model, split, images, labels, logits.argmax(axis=1), probabilities, scores,
        names=[row["name"] for row in scores["classes"]],
    )  # fmt: skip


# === Confusion matrix ===

MOST_NUMBERS = 20  # classes of a confusion matrix whose cells show their counts
MOST_NAMES = 60  # and whose axes show the names of the classes
_LONGEST_NAME = 18


def _confusion(found, name):
    names, text = list(map(one_line, found.names)), f"Confusion matrix; its data: {name}.csv"
    return [(svg(name, text, plot_confusion, found.scores["confusion"], names), "")]


def plot_confusion(figure, confusion, names):
    """Plots a confusion matrix, a list of counts by predicted class for each true class."""
    counts = np.array(confusion)
    figure.set_size_inches(*[min(2.4 + 0.36 * len(names), 8.5)] * 2)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root makes a few mistakes visible; transparent cells suit light and dark.
    cells = LinearSegmentedColormap.from_list("cells", ["#2f7fd100", "#2f7fd19e"])
    axes.imshow(np.sqrt(shares), cells, vmin=0, vmax=1, interpolation="none")
    axes.grid(visible=False)
    axes.set(xlabel="predicted", ylabel="true")
    short = [n if len(n) <= _LONGEST_NAME else f"{n[: _LONGEST_NAME - 1]}…" for n in names]
    labels = short if len(names) <= MOST_NAMES else []
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(labels)), labels)
    if len(names) <= MOST_NUMBERS:
        for true, predicted in np.argwhere(counts):
            count = counts[true, predicted]
            axes.text(predicted, true, count, ha="center", va="center", fontsize=8)


def _confusion_data(found):
    return [
        {"true": name, "predicted": other, "images": count}
        for name, counts in zip(found.names, found.scores["confusion"], strict=True)
        for other, count in zip(found.names, counts, strict=True)
        if count
    ]


# === Reliability ===


def _reliability(found, name):
    text = f"Accuracy and number of images by confidence; the data: {name}.csv"
    return [(svg(name, text, _plot_reliability, _reliability_data(found)), "")]


def _plot_reliability(figure, bins):
    figure.set_size_inches(4.4, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [((i + 0.5) / len(bins), row) for i, row in enumerate(bins) if row["images"]]
    middles, rows = zip(*filled, strict=True)
    confidence, accuracy, images = zip(*(row.values() for row in rows), strict=True)
    bars = {"width": 0.9 / len(bins), "color": ACCENT, "alpha": 0.45}
    upper.bar(middles, accuracy, **bars)
    upper.plot([0, 1], [0, 1], color=INK, linestyle=(0, (3, 3)), linewidth=1)
    upper.plot(confidence, accuracy, "o", color=ACCENT, markersize=4)
    lower.bar(middles, images, **bars)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    lower.set(xlabel="confidence", ylabel="images")
    for axis in (upper.yaxis, lower.xaxis):
        axis.set_major_formatter(PercentFormatter(1))
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.tick_params(axis="x", pad=7)


def _reliability_data(found):
    columns = ("confidence", "accuracy", "images")
    bins = reliability_bins(found.probabilities, found.labels)
    return [dict(zip(columns, values, strict=True)) for values in bins]


# === Images ===

MOST_MISTAKES = 16
_SMALLEST, _LARGEST, _LARGEST_SHEET = 96, 192, 1600  # pixels of width
IMAGES, VERSIONS = 4, 6  # of the contact sheet


def _mistakes(found, name):
    confidence = found.probabilities.max(axis=1)
    wrong = np.flatnonzero(found.predicted != found.labels)
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST_MISTAKES]
    if not len(chosen):
        return []
    few, pictures = found.images.take(chosen), []
    images, _ = next(iter(evaluation_batches(few, found.run.spec, MOST_MISTAKES)))
    for image, index in zip(np.asarray(images), chosen, strict=True):
        true, predicted = (found.names[of[index]] for of in (found.labels, found.predicted))
        text = f"true: {true}, predicted: {predicted}, probability {confidence[index]:.1%}"
        picture = as_picture(image)
        picture.thumbnail((_LARGEST, _LARGEST))
        pictures.append((png(picture, text, _SMALLEST), text))
    return pictures


def _augmentation(found, name):
    train = found.run.dataset.train
    images = min(IMAGES, len(train))
    with broken_images_named(train):
        sheet = contact_sheet(found.run, images, VERSIONS)
    sheet.thumbnail((_LARGEST_SHEET, _LARGEST_SHEET))
    text = f"{images} training images: each as it is, then {VERSIONS} times augmented"
    return [(png(sheet, text), "")]


# === Weights ===

LAYERS = 3  # mixer layers whose token mixing is shown, as in the paper's figure 5


def _mixer_blocks(model):
    return [layer for layer in model.layers if isinstance(layer, MixerBlock)]


def _stem(found, name):
    if not _mixer_blocks(found.model):
        return []
    tiles = stem_tiles(convert_to_numpy(found.model.get_layer("stem").kernel))
    return [(mosaic(tiles, f"the {len(tiles):,} kernels of the stem"), "")]


def stem_tiles(kernel):
    """Returns the kernels of a stem `(height, width, channels, dim)` as colors from 0 to 1.

    The colors `(dim, height, width, 3)` of each kernel are normalized to its own range.
    """
    kernels = np.moveaxis(kernel, -1, 0).astype(np.float64)
    kernels = kernels if kernels.shape[-1] == 3 else kernels.mean(axis=-1, keepdims=True)
    low, high = (choose(kernels, axis=(1, 2, 3), keepdims=True) for choose in (np.min, np.max))
    scaled = (kernels - low) / np.where(high > low, high - low, 1)
    return np.broadcast_to(scaled, (*scaled.shape[:3], 3))


def _token_mixing(found, name):
    pictures = []
    for number, block in enumerate(_mixer_blocks(found.model)[:LAYERS], 1):
        if block.token_mixing:
            kernel = convert_to_numpy(block.tokens_mlp.dense_0.kernel)  # (patches, units)
            grid = found.model.spec.architecture.grid
            kernels = kernel.astype(np.float64).T.reshape(-1, *grid)
            tiles = weight_tiles(kernels[pair_opposites(kernels)])
            text = f"the weights of {len(tiles):,} hidden units of token mixing, layer {number}"
            pictures.append((mosaic(tiles, text), f"Mixer layer {number}"))
    return pictures


def weight_tiles(kernels):
    """Returns kernels `(n, height, width)` as colors `(n, height, width, 3)` from 0 to 1.

    Negative weights are blue, positive ones red; each kernel is scaled by its largest weight.
    """
    largest = np.abs(kernels).max(axis=(1, 2), keepdims=True)
    return colormaps["RdBu_r"](0.5 + kernels / np.where(largest > 0, 2 * largest, 1))[..., :3]


# === The table of figures ===


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
        name: The figure's data are NAME-1.csv for the first experiment, and so on.
        title: Heading.
        caption: How to read it.
        render: Function of `Findings` and a prefix for ids, unique in the page, that returns a list
            of (<img> or <svg> element as `Markup`, caption); an empty list leaves the figure out.
        data: Function of `Findings` that returns the rows of the CSV file, a list of dicts.
    """

    name: str
    title: str
    caption: str
    render: Callable
    data: Callable = lambda found: []


FIGURES = (
    Figure(
        "confusion",
        "Confusion matrix",
        "Number of images by true and predicted class. The stronger the color of a cell, the "
        "larger its share of the images of the true class.",
        _confusion,
        _confusion_data,
    ),
    Figure(
        "reliability",
        "Reliability diagram",
        "Accuracy by confidence, the probability of the predicted class, in bins of equal width. "
        "On the dashed line, a model is right as often as it says; ECE is the mean distance from "
        "it over the images.",
        _reliability,
        _reliability_data,
    ),
    Figure(
        "mistakes",
        "Most confident mistakes",
        "Wrongly classified images with the highest probability of the predicted class, as the "
        "model sees them.",
        _mistakes,
    ),
    Figure(
        "augmentation",
        "Training images",
        "From left to right: an image as evaluation sees it, then as training augments it.",
        _augmentation,
    ),
    Figure(
        "stem",
        "Stem",
        "Kernels of the patch embedding, each normalized to its own range (paper, figure 7).",
        _stem,
    ),
    Figure(
        "token-mixing",
        "Token mixing",
        "Input weights of each hidden unit, on the grid of patches: blue is negative, red is "
        "positive. Units are paired with the one most opposite in phase, and pairs are sorted by "
        "frequency (paper, figures 5 and 6).",
        _token_mixing,
    ),
)
