"""Whether a checkpoint is as good as it is said to be, and how sure that is.

Everything that can be refused is refused before TensorFlow starts and before anything large is
downloaded.
"""

from typing import NamedTuple

from keras_mixer import console
from keras_mixer.errors import InputError
from keras_mixer.weights.download import release_named
from keras_mixer.weights.registry import SCHEME, Published, release_of


class Claim(NamedTuple):
    """What a checkpoint is said to reach.

    Attributes:
        published: `registry.Published`.
        exact: bool. This program scored it on the same images, so every one must be as it was.
    """

    published: Published
    exact: bool = False


# === What is claimed ===


def claim_of(path, dataset, split_name, expected=None):
    """Returns the `Claim` about a checkpoint on a data set.

    Args:
        path: Whatever `read_checkpoint` takes.
        dataset: string.
        split_name: string. What is published is of the `test` split.
        expected: float. Top-1 accuracy as a fraction, to be used instead.

    Raises:
        InputError: If nothing is known to be published.
    """
    release = release_of(path)
    if release is None and str(path).startswith(SCHEME):
        release_named(str(path).removeprefix(SCHEME))  # lists those that there are
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
    """Returns the `Claim` that a run makes in its metrics.json.

    Raises:
        InputError: If the run was not scored on that split.
    """
    metrics = run.metrics()
    if split_name not in metrics:
        raise InputError(
            f"{run.directory}: its metrics.json has no score of --eval_split={split_name}; "
            f"it has {', '.join(metrics) or 'none'}"
        )
    source, how = f"{run.directory}/metrics.json", f"eval_crop {run.config.eval_crop}"
    return Claim(Published(metrics[split_name]["top1"], source, how, 0.0), exact=True)


def check_classes(path, architecture, class_names, source):
    """Holds a model's classes and channels against those of the data.

    Args:
        path: Of the checkpoint, for the message.
        architecture: dict of `build_mixer` arguments, as far as they are known.
        class_names: Those of the model; None where nobody knows.
        source: `data.splits.Source`.

    Raises:
        InputError: If they differ.
    """
    found = {"num_classes": len(source.class_names), "channels": source.channels}
    for name, number in found.items():
        if architecture.get(name, number) != number:
            noun = name.removeprefix("num_")
            raise InputError(
                f"{path}: has {architecture[name]:,} {noun}, the data have {number:,}; "
                f"--dataset names others"
            )
    pairs = zip(class_names or source.class_names, source.class_names, strict=True)
    if differing := [f"{i} is {a}, not {b}" for i, (a, b) in enumerate(pairs) if a != b]:
        raise InputError(
            f"{path}: its classes are not those of the data: {'; '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' * (len(differing) > 3)}"
        )


# === What is measured ===


def verify_checkpoint(checkpoint, path, split, class_names, claim, confidence, batch_size):
    """Scores a checkpoint on a whole split, and compares.

    Args:
        checkpoint: `weights.load.Checkpoint`.
        path: Where it comes from.
        split: `data.splits.Split`.
        class_names: One name per class, those of the data.
        claim: `Claim`.
        confidence: float in (0, 1). Of the interval.
        batch_size: int. Images computed at a time.

    Returns:
        dict of JSON values: `match`; `top1`, `top5` and the `interval` of top-1, as fractions; `n`
        images; `confidence`; what was `expected` and where from; how images were fitted, whether
        class names were known, and the checkpoint's `provenance`.
    """
    from keras_mixer.inference.evaluate import compute_logits, score
    from keras_mixer.weights.load import model_of

    crop, names = checkpoint.description.eval_crop, checkpoint.description.class_names
    model = model_of(checkpoint, path)
    logits, labels = compute_logits(model, split, "verifying", batch_size, crop)
    scores = score(logits, labels, class_names, checkpoint.description.probabilities)
    correct, n = round(scores["top1"] * scores["n"]), scores["n"]
    low, high = interval_of(correct, n, confidence)
    release = release_of(path)
    return {
        "match": matches(claim, correct, n, confidence),
        **{name: scores[name] for name in ("top1", "top5", "n")},
        "interval": [low, high],
        "confidence": confidence,
        "expected": {**claim.published._asdict(), "exact": claim.exact},
        "eval_crop": crop,
        "class_names_known": names is not None,
        "provenance": release.provenance if release else None,
    }


def interval_of(correct, n, confidence):
    """Returns Wilson's interval of a share: what it might be on other images of the same kind.

    Args:
        correct: int.
        n: int, positive.
        confidence: float in (0, 1).

    Returns:
        (low, high): fractions.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def matches(claim, correct, n, confidence):
    """Tells whether so many right of n images are what is claimed.

    The figure may lie anywhere in the interval, as far as its rounding leaves open where it lies.

    Args:
        claim: `Claim`.
        correct: int.
        n: int, positive.
        confidence: float in (0, 1).
    """
    top1, rounding = claim.published.top1, claim.published.rounding
    if claim.exact:
        return correct == round(top1 * n)
    low, high = interval_of(correct, n, confidence)
    return low <= top1 + rounding and top1 - rounding <= high


def as_text(verdict, title):
    """Returns what `verify_checkpoint` found as text for people.

    Args:
        verdict: dict.
        title: What was verified.
    """
    low, high = verdict["interval"]
    expected, crop = verdict["expected"], verdict["eval_crop"]
    given = "to the image" if expected["exact"] else f"± {100 * expected['rounding']:.3g} points"
    fitted = f"scaled, and {crop:.4g} of each side cut out" if crop else "squashed whole"
    rows = {
        "measured": f"{verdict['top1']:.2%} top-1 ({low:.2%} to {high:.2%}, Wilson's interval of "
        f"{verdict['confidence']:.4g}), {verdict['top5']:.2%} top-5, {verdict['n']:,} images",
        "expected": f"{expected['top1']:.2%} {given} ({expected['source']})",
        "images": f"{fitted} (eval_crop {crop:.4g}), bilinear and antialiased; expected: "
        f"{expected['preprocessing']}",
        "classes": "named alike in the checkpoint and in the data"
        if verdict["class_names_known"]
        else "not named in the checkpoint; taken to be in the order of the data",
    }
    if verdict["provenance"]:
        rows["images"] += "; the official code resizes by area, so a few images may differ"
        rows["weights"] = verdict["provenance"]
    head = f"{'match' if verdict['match'] else 'no match'}: {title}"
    return console.printable("\n".join([head, *(f"  {k:<8}  {v}" for k, v in rows.items())]))
