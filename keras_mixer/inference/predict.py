"""Predicts the classes of image files: tables, JSON, CSV and Kaggle submissions."""

import collections
import csv
import glob
import io
import itertools
import json
import math
import os

import numpy as np
import tensorflow as tf

from keras_mixer.console import printable, say, track
from keras_mixer.data.image_checks import check_image_file
from keras_mixer.data.image_listing import list_images
from keras_mixer.errors import InputError, some_of
from keras_mixer.preprocessing.decode import decode_image, decoding_problem
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE
from keras_mixer.preprocessing.resize import preprocess
from keras_mixer.training.losses import PROBABILITIES

_MOST_VALUES = 1 << 28  # in a batch: 1 GiB, which a model of very large images could exceed


def expand(arguments):
    """Returns the image files that paths and patterns match.

    Args:
        arguments: Paths of files and folders (searched recursively), and glob patterns.

    Returns:
        list of paths as strings. Arguments that match nothing are kept, to be reported as errors.
    """
    return list(itertools.chain.from_iterable(map(_expand_one, arguments)))


def _expand_one(argument):
    if os.path.isdir(argument):
        listing, _ = list_images(argument)
        return list(map(os.fsdecode, listing.paths())) or [argument]
    if os.path.exists(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))
    existing = [match for match in matches if os.path.exists(match)]  # no broken symbolic links
    return expand(existing) or [argument]


def predict_files(model, paths, top_k=5):
    """Predicts the most likely classes of image files.

    Args:
        model: `keras.Model` from `load_mixer`.
        paths: list of paths.
        top_k: int. Maximum number of classes per image.

    Yields:
        For each path, in order, a dict of JSON values: `file`, and either `error` or
        `predictions`, a list of dicts of `class` and `probability`, most likely first.
    """
    names = model.spec.names
    for path, result in classify(model, paths):
        if isinstance(result, str):
            yield {"file": path, "error": result}
        else:
            yield {"file": path, "predictions": _top(result, names, top_k)}


def classify(model, paths):
    """Computes the class probabilities of image files.

    Args:
        model: `keras.Model` from `load_mixer`.
        paths: list of paths.

    Yields:
        For each path, in order, (path, float64 array `(num_classes,)`), or (path, error message)
        if the image cannot be read.
    """
    probabilities = PROBABILITIES[model.spec.loss]
    values = math.prod(model.input_shape[1:])
    size = max(1, min(EVALUATION_BATCH_SIZE, _MOST_VALUES // values))
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        images = [_read(path, model.spec) for path in batch]
        readable = [image for image in images if not isinstance(image, str)]
        logits = model.predict_on_batch(np.stack(readable)) if readable else np.empty((0, 2))
        rows = iter(np.asarray(probabilities(logits.astype(np.float64))))
        for path, image in zip(batch, images, strict=True):
            yield path, image if isinstance(image, str) else next(rows)


def _read(path, spec):
    """Returns the preprocessed image, or an error message."""
    if not os.path.exists(path):
        return "no such file"
    if os.path.isdir(path):
        return "the folder has no images"
    if problem := check_image_file(path):
        return problem
    try:
        image = decode_image(tf.io.read_file(os.fsencode(path)), spec.architecture.channels)
    except (tf.errors.OpError, ValueError) as error:
        return decoding_problem(error)
    return preprocess(image, spec).numpy()


def _top(probabilities, class_names, top_k):
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [{"class": class_names[i], "probability": float(probabilities[i])} for i in order]


# === As text ===


def predictions_as_text(model, paths, format, top_k=5):
    """Predicts the classes of image files and formats the result.

    Args:
        model, paths, top_k: As `predict_files`.
        format: string, a key of `FORMATS`, or `"kaggle"` for a submission with all classes.

    Returns:
        (text, complete): complete is False if any image could not be read.
    """
    if format == "kaggle":
        return _submission(model, paths)
    rows = list(track(predict_files(model, paths, top_k), "predicting", len(paths)))
    return FORMATS[format](rows), not any("error" in row for row in rows)


def as_table(rows):
    """Formats predictions as text, a line per image."""
    return "".join(f"{printable(row['file'])}: {printable(_result_text(row))}\n" for row in rows)


def _result_text(row):
    if "error" in row:
        return f"error: {row['error']}"
    return "  ".join(f"{p['class']} {p['probability']:.1%}" for p in row["predictions"])


def as_json(rows):
    """Formats predictions as a JSON list with an object per image."""
    return json.dumps(rows, indent=2) + "\n"


def as_csv(rows):
    """Formats predictions as CSV, a line per image and rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "probability", "error"])
    for row in rows:
        if "error" in row:
            writer.writerow([_cell(row["file"]), "", "", "", _cell(row["error"])])
        for rank, p in enumerate(row.get("predictions", ()), start=1):
            writer.writerow([_cell(row["file"]), rank, _cell(p["class"]), p["probability"], ""])
    return text.getvalue()


def _cell(text):
    """Escapes names that spreadsheets would take for formulas."""
    text = printable(text)
    return f"'{text}" if text[:1] in tuple("=+-@") else text


FORMATS = {"table": as_table, "json": as_json, "csv": as_csv}


# === Kaggle submissions ===


def _submission(model, paths):
    """Returns (text, complete), see `predictions_as_text`."""
    ids = submission_ids(paths)
    results = list(track(classify(model, paths), "predicting", len(paths)))
    problems = [(path, reason) for path, reason in results if isinstance(reason, str)]
    for path, reason in problems:
        say(f"{path}: {reason}; it is not in the submission")
    rows = [(id, p) for id, (_, p) in zip(ids, results, strict=True) if not isinstance(p, str)]
    return as_submission(rows, model.spec.names), not problems


def submission_ids(paths):
    """Returns the id of each image: its file name without suffix. InputError for duplicates."""
    ids = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    times = collections.Counter(ids)
    if shared := [path for path, id in zip(paths, ids, strict=True) if times[id] > 1]:
        raise InputError(
            f"--format=kaggle: {len(shared)} images share their names without folder and suffix, "
            f"which are the ids of a submission: {some_of(shared)}"
        )
    return ids


def as_submission(rows, class_names):
    """Formats probabilities as a Kaggle submission: CSV, a line per image.

    Names are not escaped, since Kaggle compares them. Probabilities are normalized to a sum of 1,
    for models with sigmoid outputs.

    Args:
        rows: list of (id, probabilities).
        class_names: One name per class.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *class_names])
    for id, probabilities in rows:
        id = os.fsencode(id).decode(errors="backslashreplace")
        writer.writerow([id, *(f"{p:.9g}" for p in probabilities / probabilities.sum())])
    return text.getvalue()
