"""Predicts the classes of images: for Python, and as tables, JSON, CSV and Kaggle submissions."""

import collections
import csv
import glob
import io
import itertools
import json
import math
import os

import numpy as np

from keras_mixer.compute.devices import predictor
from keras_mixer.compute.fast_mixing import fast_inference
from keras_mixer.data.image_listing import list_images
from keras_mixer.errors import InputError, join_names
from keras_mixer.files import rows_as_csv
from keras_mixer.inference.read_image import as_list, read_image, refuse_unreadable
from keras_mixer.log import logger, one_line, printable, track
from keras_mixer.preprocessing.input_pipeline import EVALUATION_BATCH_SIZE
from keras_mixer.runs.run import Run, check_best, note_unfinished
from keras_mixer.training.losses import PROBABILITIES, check_finite
from keras_mixer.weights.load import load_mixer

_MOST_VALUES = 1 << 28  # in a batch: 1 GiB, which a batch of very large images could exceed


# === From Python ===


def predict(model_or_run, images, top_k=5):
    """Predicts the most likely classes of images, as the command `predict` does.

    Args:
        model_or_run: `keras.Model` from `load_mixer`; or a `Run` or path, loaded at each call.
        images: One image or a list of images, as `preprocess` takes them.
        top_k: int. Maximum number of classes per image.

    Returns:
        list with an entry per image, also for a single one: a list of dicts of `class` and
        `probability`, most likely first.

    Raises:
        InputError: If the model cannot be loaded, or an image cannot be read; names it.
    """
    if top_k < 1:
        raise InputError(f"top_k: expected an integer at least 1, received {top_k}")
    model, images = as_model(model_or_run), as_list(images)
    results = [result for _, result in classify(model, images)]
    refuse_unreadable(images, results)
    return [_top(probabilities, model.spec.names, top_k) for probabilities in results]


def preprocess(images, model):
    """Preprocesses images for a model's own methods, such as `model.predict`.

    Those take values in [-1, 1], and do not check them.

    Args:
        images: One image or a list of images, each of which is
            - a path (string, bytes or `Path`), or an `io.BytesIO` with the bytes of a file;
            - a PIL image, which is set upright by its EXIF orientation;
            - a uint8 array or tensor `(height, width)` or `(height, width, channels)`: gray, RGB or
              RGBA. An array `(batch, height, width, channels)` is a list of images.
        model: `keras.Model` from `load_mixer`, a `Run`, or a path as `load_mixer` takes it.

    Returns:
        float32 array `(batch, height, width, channels)` in [-1, 1]; one image is a batch of 1.

    Raises:
        InputError: If the model cannot be loaded, or an image cannot be read; names it.
    """
    spec, images = as_model(model).spec, as_list(images)
    arrays = [read_image(image, spec) for image in images]
    refuse_unreadable(images, arrays)
    shape = (*spec.architecture.image_shape, spec.architecture.channels)
    return np.array(arrays, np.float32).reshape(-1, *shape)  # also of no images


def as_model(model_or_run, image_shape=None):
    """Returns a model with its `ModelSpec`, loaded unless it is one.

    Args:
        model_or_run: `keras.Model` from `load_mixer`, a `Run`, or a path as `load_mixer` takes it.
        image_shape: As for `load_mixer`; without effect on a model.

    Raises:
        InputError: If it cannot be loaded, or a model has no spec.
    """
    if isinstance(model_or_run, str | os.PathLike):
        note_unfinished(model_or_run)
        return load_mixer(model_or_run, image_shape)
    if isinstance(model_or_run, Run):
        check_best(model_or_run)
        return load_mixer(model_or_run.best, image_shape)
    if not hasattr(model_or_run, "spec"):
        raise InputError(
            f"model: expected a path, or a model with the attribute spec (its preprocessing and "
            f"classes), received {type(model_or_run).__name__} without; load it with load_mixer"
        )
    return model_or_run


# === Files ===


def expand(arguments):
    """Returns the image files that paths and patterns match.

    Args:
        arguments: Paths of files and folders (searched recursively), and glob patterns. An
            `io.BytesIO` with the bytes of a file is kept.

    Returns:
        list of paths as strings. Arguments that match nothing are kept, to be reported as errors.
    """
    return list(itertools.chain.from_iterable(map(_expand_one, arguments)))


def _expand_one(argument):
    if isinstance(argument, io.BytesIO):
        return [argument]
    if os.path.isdir(argument):
        listing, _ = list_images(argument)
        return list(map(os.fsdecode, listing.paths())) or [argument]
    if os.path.exists(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))
    existing = [match for match in matches if os.path.exists(match)]  # no broken symbolic links
    return expand(existing) or [argument]


def predict_files(model, images, top_k=5):
    """Predicts the most likely classes of image files.

    Args:
        model: `keras.Model` from `load_mixer`.
        images: list of paths, see `expand`.
        top_k: int. Maximum number of classes per image.

    Yields:
        For each image, in order, a dict of JSON values: `file`, and either `error` or
        `predictions`, a list of dicts of `class` and `probability`, most likely first.
    """
    names = model.spec.names
    for image, result in classify(model, images):
        if isinstance(result, str):
            yield {"file": _name_of(image), "error": result}
        else:
            yield {"file": _name_of(image), "predictions": _top(result, names, top_k)}


def _name_of(image):
    return "-" if isinstance(image, io.BytesIO) else image  # from standard input


def classify(model, images):
    """Computes the class probabilities of images.

    Args:
        model: `keras.Model` from `load_mixer`.
        images: list of images of any kind in `READERS`, such as paths.

    Yields:
        For each image, in order, (image, float64 array `(num_classes,)`), or (image, error message)
        if it cannot be read.
    """
    probabilities = PROBABILITIES[model.spec.loss]
    values = math.prod(model.input_shape[1:])
    size = max(1, min(EVALUATION_BATCH_SIZE, _MOST_VALUES // values))
    predict = predictor(fast_inference(model, min(size, len(images))))
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        arrays = [read_image(image, model.spec) for image in batch]
        readable = [array for array in arrays if not isinstance(array, str)]
        logits = predict(np.stack(readable)) if readable else np.empty((0, 2))
        check_finite(logits)
        rows = iter(np.asarray(probabilities(logits.astype(np.float64))))
        for image, array in zip(batch, arrays, strict=True):
            yield image, array if isinstance(array, str) else next(rows)


def _top(probabilities, class_names, top_k):
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [{"class": class_names[i], "probability": float(probabilities[i])} for i in order]


# === As text ===


def predictions_as_text(model, paths, format, top_k=5, follow=None):
    """Predicts the classes of image files and formats the result.

    Args:
        model, paths, top_k: As the arguments of `predict_files`.
        format: string, a key of `FORMATS`, or `"kaggle"` for a submission with all classes.
        follow: Function of an iterable and its length that yields its items. Defaults to one that
            shows a progress bar.

    Returns:
        (text, failed): failed is the number of images that could not be read.
    """
    follow = follow or (lambda results, total: track(results, "predicting", total))
    if format == "kaggle":
        return _submission(model, paths, follow)
    rows = list(follow(predict_files(model, paths, top_k), len(paths)))
    return FORMATS[format](rows), sum("error" in row for row in rows)


def as_table(rows):
    """Formats predictions as text, a line per image."""
    return "".join(f"{one_line(row['file'])}: {one_line(_result_text(row))}\n" for row in rows)


def _result_text(row):
    if "error" in row:
        return f"error: {row['error']}"
    return "  ".join(f"{p['class']} {p['probability']:.1%}" for p in row["predictions"])


def as_json(rows):
    """Formats predictions as a JSON list with an object per image."""
    return json.dumps(rows, indent=2) + "\n"


def as_csv(rows):
    """Formats predictions as CSV, a line per image and rank."""
    empty = {"rank": "", "class": "", "probability": ""}
    lines = [
        {"file": row["file"], "rank": rank, **prediction, "error": row.get("error", "")}
        for row in rows
        for rank, prediction in enumerate(row.get("predictions", [empty]), start=1)
    ]
    plain = [
        {name: printable(cell) if isinstance(cell, str) else cell for name, cell in line.items()}
        for line in lines
    ]
    return rows_as_csv(plain, ["file", *empty, "error"])


FORMATS = {"table": as_table, "json": as_json, "csv": as_csv}


# === Kaggle submissions ===


def _submission(model, paths, follow):
    """Returns (text, failed), see `predictions_as_text`."""
    ids = submission_ids(list(map(_name_of, paths)))
    results = list(follow(classify(model, paths), len(paths)))
    problems = [(path, reason) for path, reason in results if isinstance(reason, str)]
    for path, reason in problems:
        logger.warning(f"{_name_of(path)}: {reason}; it is not in the submission")
    rows = [(id, p) for id, (_, p) in zip(ids, results, strict=True) if not isinstance(p, str)]
    return as_submission(rows, model.spec.names), len(problems)


def submission_ids(paths):
    """Returns the id of each image: its file name without suffix. InputError for duplicates."""
    ids = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    times = collections.Counter(ids)
    if shared := [path for path, id in zip(paths, ids, strict=True) if times[id] > 1]:
        raise InputError(
            f"--format=kaggle: {len(shared)} images share their names without folder and suffix, "
            f"which are the ids of a submission: {join_names(shared)}"
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
