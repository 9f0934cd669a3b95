"""Robustness of a model: accuracy on images with common corruptions (ImageNet-C)."""

import itertools

import numpy as np

from keras_mixer.compute.devices import predictor
from keras_mixer.compute.fast_mixing import fast_inference
from keras_mixer.log import track
from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.corruption_constants import SEVERITIES
from keras_mixer.preprocessing.corruptions import corrupt
from keras_mixer.preprocessing.input_pipeline import evaluation_batches
from keras_mixer.preprocessing.resize import to_model_range, to_pixels
from keras_mixer.training.losses import check_finite

FROST_NOTE = "frost is drawn, not photographed: not comparable with published ImageNet-C numbers"


def corruption_scores(subject, corruptions, severities=SEVERITIES, seed=0):
    """Computes the accuracy on images with common corruptions (Hendrycks and Dietterich 2019).

    Images are corrupted after they are resized to the model's image size and rounded to 8 bits.
    Each is decoded once.

    Args:
        subject: `evaluate.Subject`.
        corruptions: Names of `corruption_constants.CORRUPTIONS`.
        severities: Numbers from 1 to 5.
        seed: int, not negative. The same seed gives the same images.

    Returns:
        dict of JSON values: `mean` top-1 accuracy over all corruptions and severities, `seed`,
        `severities`, `note` (on frost, or None) and `top1`, a dict of each corruption's `mean` and
        list `by_severity`.

    Raises:
        InputError: If an output of the model is not finite.
    """
    top1 = _accuracies(subject, list(itertools.product(corruptions, severities)), seed)
    rows = {name: [top1[name, severity] for severity in severities] for name in corruptions}
    return {
        "mean": float(np.mean(list(rows.values()))),
        "seed": seed,
        "severities": list(severities),
        "note": FROST_NOTE if "frost" in rows else None,
        "top1": {
            name: {"mean": float(np.mean(row)), "by_severity": row} for name, row in rows.items()
        },
    }


def _accuracies(subject, variants, seed):
    """Returns a dict from each (corruption, severity) to the top-1 accuracy on such images."""
    batches = evaluation_batches(subject.split, subject.spec, subject.batch_size)
    predict = predictor(fast_inference(subject.model, subject.batch_size))
    correct, first = dict.fromkeys(variants, 0), 0
    with broken_images_named(subject.split):
        for images, labels in track(
            batches.as_numpy_iterator(), "evaluating corruptions", len(batches)
        ):
            for variant in variants:
                logits = predict(_corrupted(images, *variant, first, seed))
                check_finite(logits)
                correct[variant] += np.sum(logits.argmax(axis=1) == subject.class_of[labels])
            first += len(labels)
    return {variant: float(count / first) for variant, count in correct.items()}


def _corrupted(images, corruption, severity, first, seed):
    """Corrupts a batch of images in [-1, 1]; `first` is the index of its first image."""
    results = [
        corrupt(image, corruption, severity, index, seed)
        for index, image in enumerate(to_pixels(images), first)
    ]
    return to_model_range(np.stack(results)).numpy()


def corruptions_as_text(scores, clean):
    """Returns `corruption_scores` and the accuracy on clean images as a text table."""
    heads = "".join(f"{f'severity {severity}':>12}" for severity in scores["severities"])
    lines = [
        f"top-1 on corrupted images (seed {scores['seed']}; at the model's image size)",
        f"{'corruption':<18}{'mean':>8}{heads}",
    ]
    for name, row in scores["top1"].items():
        cells = "".join(f"{value:>12.2%}" for value in row["by_severity"])
        lines.append(f"{name:<18}{row['mean']:>8.2%}{cells}")
    lines += [f"{'mean over all':<18}{scores['mean']:>8.2%}", f"{'clean':<18}{clean:>8.2%}"]
    return "\n".join([*lines, scores["note"]] if scores["note"] else lines)
