"""Verifies that pretrained weights reach their published accuracy, with a confidence interval.

TensorFlow is imported late, so that errors are reported before it starts (3 s).
"""

from typing import NamedTuple

from keras_mixer.errors import InputError
from keras_mixer.log import printable
from keras_mixer.weights.download import find_release
from keras_mixer.weights.registry import SCHEME, Published, release_of


class Claim(NamedTuple):
    """An accuracy that pretrained weights should reach.

    Attributes:
        published: `registry.Published`.
        exact: bool. The number of correct images must be equal, since we measured it ourselves.
    """

    published: Published
    exact: bool = False


# === Claims ===


def claim_of(path, dataset, split_name, expected=None):
    """Returns the `Claim` about pretrained weights on a dataset.

    Args:
        path: As in `read_pretrained`.
        dataset: string.
        split_name: string. Published accuracies are on `test`.
        expected: float. Top-1 accuracy as a fraction, instead of the published one.

    Raises:
        InputError: If no published accuracy is known.
    """
    release = release_of(path)
    if release is None and str(path).startswith(SCHEME):
        find_release(str(path).removeprefix(SCHEME))  # raises InputError
    if expected is not None:
        return Claim(Published(expected, "--expected", "not said"))
    published = release.published if release else {}
    if split_name == "test" and dataset in published:
        return Claim(published[dataset])
    if release and not published:
        known = f"no accuracy of this file itself was found ({release.provenance})"
    elif release:
        known = f"its accuracy is published on the test split of {', '.join(published)} only"
    else:
        known = "it is none of the released files, so no published accuracy is known"
    raise InputError(f"{path}: {known}; give what you expect as --expected")


def claim_of_run(run, split_name):
    """Returns the `Claim` from a run's metrics.json; InputError if it lacks the split."""
    metrics = run.scores
    if split_name not in metrics:
        raise InputError(
            f"{run.directory}: its metrics.json has no score of --eval_split={split_name}; "
            f"it has {', '.join(metrics) or 'none'}"
        )
    source, how = f"{run.directory}/metrics.json", str(run.spec.preprocessing)
    return Claim(Published(metrics[split_name]["top1"], source, how, 0.0), exact=True)


def check_classes(path, dataset, num_classes, channels=None, class_names=None):
    """Compares a model's classes and channels with those of a dataset.

    Args:
        path: The weights, for messages.
        dataset: `Dataset`.
        num_classes: int, of the model.
        channels: int, of the model; None if unknown.
        class_names: Those of the model; None if unknown.

    Raises:
        InputError: If they differ.
    """
    pairs = {
        "classes": (num_classes, len(dataset.class_names)),
        "channels": (channels or dataset.channels, dataset.channels),
    }
    for noun, (own, of_data) in pairs.items():
        if own != of_data:
            raise InputError(
                f"{path}: has {own:,} {noun}, the data have {of_data:,}; --dataset names others"
            )
    pairs = zip(class_names or dataset.class_names, dataset.class_names, strict=True)
    if differing := [f"{i} is {a}, not {b}" for i, (a, b) in enumerate(pairs) if a != b]:
        raise InputError(
            f"{path}: its classes are not those of the data: {'; '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' * (len(differing) > 3)}"
        )


# === Measurement ===


def verify_accuracy(pretrained, path, split, class_names, claim, confidence, batch_size):
    """Evaluates pretrained weights on a split and compares the accuracy with a claim.

    Args:
        pretrained: `Pretrained`.
        path: Its path, as in `read_pretrained`.
        split: `data.splits.Images`.
        class_names: Class names of the data.
        claim: `Claim`.
        confidence: float in (0, 1). Confidence level of the interval.
        batch_size: int.

    Returns:
        dict of JSON values: `match`; `top1`, `top5` and the `interval` of top-1, as fractions; `n`
        images; `confidence`; the `expected` accuracy and its source; the `preprocessing`;
        `class_names_known`; and the `provenance` of released files.
    """
    from keras_mixer.inference.evaluate import compute_logits, score
    from keras_mixer.weights.load import build_pretrained

    spec, model = pretrained.spec, build_pretrained(pretrained, path)
    outputs = compute_logits(model, spec, split, "verifying", batch_size)
    scores = score(*outputs, spec.replace(class_names=class_names))
    correct, n = round(scores["top1"] * scores["n"]), scores["n"]
    low, high = interval_of(correct, n, confidence)
    release = release_of(path)
    return {
        "match": matches(claim, correct, n, confidence),
        **{name: scores[name] for name in ("top1", "top5", "n")},
        "interval": [low, high],
        "confidence": confidence,
        "expected": {**claim.published._asdict(), "exact": claim.exact},
        "preprocessing": str(spec.preprocessing),
        "class_names_known": spec.class_names is not None,
        "provenance": release.provenance if release else None,
    }


def interval_of(correct, n, confidence):
    """Returns the Wilson score interval (low, high) of the fraction `correct / n`."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def matches(claim, correct, n, confidence):
    """Returns whether the measured accuracy `correct / n` agrees with a `Claim`.

    The claimed accuracy, give or take its rounding, must be in the interval of `interval_of`.
    """
    top1, rounding = claim.published.top1, claim.published.rounding
    if claim.exact:
        return correct == round(top1 * n)
    low, high = interval_of(correct, n, confidence)
    return low <= top1 + rounding and top1 - rounding <= high


def as_text(result, title):
    """Formats the result of `verify_accuracy` as text under a title."""
    low, high = result["interval"]
    expected = result["expected"]
    given = "to the image" if expected["exact"] else f"± {100 * expected['rounding']:.3g} points"
    rows = {
        "measured": f"{result['top1']:.2%} top-1 ({low:.2%} to {high:.2%}, Wilson's interval of "
        f"{result['confidence']:.4g}), {result['top5']:.2%} top-5, {result['n']:,} images",
        "expected": f"{expected['top1']:.2%} {given} ({expected['source']})",
        "images": f"{result['preprocessing']}; expected: {expected['preprocessing']}",
        "classes": "named alike in the checkpoint and in the data"
        if result["class_names_known"]
        else "not named in the checkpoint; taken to be in the order of the data",
    }
    if result["provenance"]:
        rows["images"] += "; the official code resizes by area, so a few images may differ"
        rows["weights"] = result["provenance"]
    head = f"{'match' if result['match'] else 'no match'}: {title}"
    return printable("\n".join([head, *(f"  {k:<8}  {v}" for k, v in rows.items())]))
