"""Robustness of a model: its accuracy on corrupted images."""

import functools

import numpy as np

from keras_mixer.compute.devices import predictor
from keras_mixer.compute.fast_mixing import fast_inference
from keras_mixer.inference.evaluate import as_table as scores_as_table
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

    Args:
        subject: `evaluate.Subject`.
        corruptions: Names of `corruption_constants.CORRUPTIONS`.
        severities: Numbers from 1 to 5.
        seed: int, not negative. The same seed gives the same images.

    Returns:
        dict of JSON values: `mean` top-1 accuracy over all corruptions and severities, `seed`,
        `severities`, `note` (what to know about frost, or None) and `top1`, a dict of each
        corruption's `mean` and list `by_severity`.
    """
    variants = {
        (corruption, severity): functools.partial(
            _corrupted, corruption=corruption, severity=severity, seed=seed
        )
        for corruption in corruptions
        for severity in severities
    }
    top1 = accuracy_of_variants(subject, variants, "evaluating corruptions")
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


def _corrupted(images, first, corruption, severity, seed):
    """Corrupts a batch of images in [-1, 1]; `first` is the position of its first one."""
    results = [
        corrupt(image, corruption, severity, first + offset, seed)
        for offset, image in enumerate(to_pixels(images))
    ]
    return to_model_range(np.stack(results)).numpy()


def accuracy_of_variants(subject, variants, description):
    """Computes the top-1 accuracy on variants of images, each of which is decoded once.

    Args:
        subject: `evaluate.Subject`.
        variants: dict of functions from (float32 images `(batch, height, width, channels)` in
            [-1, 1], position of the first one in the split) to images of the same shape.
        description: Text of the progress bar.

    Returns:
        dict of floats with the keys of the variants.

    Raises:
        InputError: If an output of the model is not finite.
    """
    batches = evaluation_batches(subject.split, subject.spec, subject.batch_size)
    predict = predictor(fast_inference(subject.model, subject.batch_size))
    correct = dict.fromkeys(variants, 0)
    with broken_images_named(subject.split):
        steps = track(_each(variants, batches), description, len(batches) * len(variants))
        for name, images, labels in steps:
            logits = predict(images)
            check_finite(logits)
            correct[name] += np.sum(logits.argmax(axis=1) == subject.class_of[labels])
    return {name: float(count / len(subject.split)) for name, count in correct.items()}


def _each(variants, batches):
    """Yields (name of a variant, its images, their labels) for every batch and variant."""
    first = 0
    for images, labels in batches.as_numpy_iterator():
        for name, variant in variants.items():
            yield name, variant(images, first), labels
        first += len(labels)


# === As text ===


def as_table(scores):
    """Returns the scores of `evaluate_subject`, with those of this file if any, as text tables."""
    parts = [scores_as_table(scores)]
    if corruptions := scores.get("corruptions"):
        parts.append(_corruptions_as_table(corruptions, scores["top1"]))
    return "\n\n".join(parts)


def _corruptions_as_table(scores, clean):
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
