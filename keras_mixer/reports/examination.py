"""Examination of a run: what its best weights are, and what they say of the images scored."""

from typing import NamedTuple

import numpy as np
from keras.ops import convert_to_numpy

from keras_mixer.compute.fast_mixing import use_threads_for
from keras_mixer.inference.calibration import probabilities_of, reliability_bins
from keras_mixer.inference.evaluate import compute_logits, score
from keras_mixer.model.layers import MixerBlock
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE, evaluation_batches
from keras_mixer.reports.analysis import confident_mistakes, pair_opposites
from keras_mixer.reports.figures import mosaic, picture, stem_tiles, weight_tiles
from keras_mixer.reports.preview import contact_sheet, tile
from keras_mixer.runs.open_run import read_run
from keras_mixer.weights.load import load_mixer

MOST_MISTAKES = 16
IMAGES, DRAWS = 4, 6  # of the contact sheet: rows and augmented columns
BLOCKS = 3  # mixer layers whose token mixing is drawn, as in the paper's figure 5
_SMALLEST, _LARGEST, _LARGEST_SHEET = 96, 192, 1600  # pixels of width of pictures


class Findings(NamedTuple):
    """What a run's best weights say of the images of its `eval_split`.

    Attributes:
        identity: Identity of the data.
        split: Name of the split.
        scores: dict, see `evaluate.score`.
        correct: bool array `(n,)`.
        bins: list, see `calibration.reliability_bins`.
        mistakes: list of pictures (see `figures.picture`) with `true`, `predicted` and
            `probability`: the most confident mistakes.
        sheet: Picture of training images, as they are and augmented.
        stem: Picture of the stem's kernels; None for a model that is no Mixer.
        mixing: list of pictures of the token mixing of the first mixer layers.
    """

    identity: str
    split: str
    scores: dict
    correct: np.ndarray
    bins: list
    mistakes: list
    sheet: dict
    stem: dict | None
    mixing: list


def examine(directory, description="examining"):
    """Examines the run in a directory, and returns the `Findings`.

    Args:
        directory: Path of a run directory.
        description: Text of the progress bar.

    Raises:
        InputError: If the data or the weights are missing, damaged, or not those of the run.
    """
    run = read_run(directory)
    use_threads_for(EVALUATION_BATCH_SIZE)
    # A sweep's settings are trained for their validation scores; the best is tested later.
    model, name = load_mixer(run.best), "test" if "test" in run.scores else run.config.eval_split
    split = run.dataset.split(name)
    logits, labels = compute_logits(model, run.spec, split, f"{description}: {name} images")
    scores = score(logits, labels, run.spec)
    probabilities = probabilities_of(logits, run.spec.loss)
    predicted = logits.argmax(axis=1)
    stem, mixing = draw_mixer(model)
    return Findings(
        run.dataset.identity,
        name,
        scores,
        predicted == labels,
        reliability_bins(probabilities, labels),
        _mistakes(run.spec, split, probabilities, predicted, labels),
        _sheet(run),
        stem,
        mixing,
    )


def _mistakes(spec, split, probabilities, predicted, labels):
    """Returns pictures of the most confident mistakes, as the model is given the images."""
    confidence = probabilities[np.arange(len(labels)), predicted]
    chosen = confident_mistakes(confidence, predicted == labels, MOST_MISTAKES)
    if not len(chosen):
        return []
    images, _ = next(iter(evaluation_batches(split.take(chosen), spec, MOST_MISTAKES)))
    return [
        _mistake(image, spec.names[labels[index]], spec.names[predicted[index]], confidence[index])
        for image, index in zip(np.asarray(images), chosen, strict=True)
    ]


def _mistake(image, true, predicted, probability):
    thumbnail = tile(image)
    thumbnail.thumbnail((_LARGEST, _LARGEST))
    facts = {"true": true, "predicted": predicted, "probability": float(probability)}
    description = f"true: {true}, predicted: {predicted}, probability {probability:.1%}"
    return picture(thumbnail, description, _SMALLEST) | facts


def _sheet(run):
    """Returns a picture of training images, without and with the augmentation of the run."""
    train = run.dataset.train
    rows = min(IMAGES, len(train))
    with broken_images_named(train):
        sheet = contact_sheet(run, rows, DRAWS)
    sheet.thumbnail((_LARGEST_SHEET, _LARGEST_SHEET))
    return picture(
        sheet, f"{rows} training images, one per row: as they are, then {DRAWS} times augmented"
    )


def draw_mixer(model):
    """Returns a picture of a Mixer's stem, and a list of those of its first token mixings.

    Args:
        model: `keras.Model` from `load_mixer`. One without mixer layers gives None and [].
    """
    blocks = [layer for layer in model.layers if isinstance(layer, MixerBlock)]
    if not blocks:
        return None, []
    tiles = stem_tiles(convert_to_numpy(model.get_layer("stem").kernel))
    mixing = [
        _mixing(block.tokens_mlp.dense_0, model.spec.architecture.grid, number)
        for number, block in enumerate(blocks[:BLOCKS], 1)
        if block.token_mixing
    ]
    return mosaic(tiles, f"the {len(tiles):,} kernels of the stem"), mixing


def _mixing(dense, grid, number):
    """Returns a picture of the input weights of a token MLP's hidden units, pairs side by side."""
    kernels = convert_to_numpy(dense.kernel).astype(np.float64)  # (patches, units)
    kernels = kernels.T.reshape(-1, *grid)
    paired = kernels[pair_opposites(kernels)]
    description = f"the weights of {len(kernels):,} hidden units of token mixing, layer {number}"
    return mosaic(weight_tiles(paired), description)
