"""What a model sees in images: files, folders and globs in, the likeliest classes out."""

import csv
import glob
import io
import itertools
import json
import os

import numpy as np
import tensorflow as tf

from keras_mixer.console import printable
from keras_mixer.data.decode import decode_image
from keras_mixer.data.images import (
    check_image_file,
    decoding_problem,
    resize_images,
    to_model_range,
)
from keras_mixer.data.sources import image_files

BATCH_SIZE = 64


def expand(arguments):
    """Returns the image files that the arguments stand for.

    Args:
        arguments: Paths of files, of folders (searched to any depth), and glob patterns.

    Returns:
        list of paths as strings. An argument that matches nothing stays, to be reported as such.
    """
    return list(itertools.chain.from_iterable(map(_expanded, arguments)))


def _expanded(argument):
    if os.path.isdir(argument):
        return sorted(map(os.fsdecode, image_files(argument))) or [argument]
    if os.path.exists(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))
    there = [match for match in matches if os.path.exists(match)]  # glob lists dangling links, too
    return expand(there) or [argument]


def predict_files(model, class_names, paths, top_k=5):
    """Classifies image files; one that cannot be read does not stop the rest.

    Args:
        model: `keras.Model` from `build_mixer`.
        class_names: One name per class.
        paths: list of paths.
        top_k: int. Classes reported per image, at most.

    Yields:
        For each path, in order, a dict of JSON values: `file` with either `error`, or
        `predictions`, a list of `class` and `probability` from the likeliest on.
    """
    _, *image_shape, channels = model.input_shape
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        images = [_read(path, image_shape, channels) for path in batch]
        readable = [image for image in images if not isinstance(image, str)]
        logits = iter(model.predict_on_batch(np.stack(readable)) if readable else ())
        for path, image in zip(batch, images, strict=True):
            if isinstance(image, str):
                yield {"file": path, "error": image}
            else:
                yield {"file": path, "predictions": _top(next(logits), class_names, top_k)}


def _read(path, image_shape, channels):
    """Returns the image as the model wants it, or what is wrong with it as a string."""
    if not os.path.exists(path):
        return "no such file"
    if os.path.isdir(path):
        return "the folder holds no image"
    if problem := check_image_file(path):
        return problem
    try:
        image = decode_image(tf.io.read_file(os.fsencode(path)), channels)
    except (tf.errors.OpError, ValueError) as error:
        return decoding_problem(error)
    return to_model_range(resize_images(image, image_shape)).numpy()


def _top(logits, class_names, top_k):
    probabilities = tf.nn.softmax(logits).numpy()
    likeliest = np.argsort(-probabilities, kind="stable")[:top_k]
    return [{"class": class_names[i], "probability": float(probabilities[i])} for i in likeliest]


# === As text ===


def as_table(rows):
    """Returns predictions as text for people, a line per image."""
    return "".join(f"{printable(row['file'])}: {printable(_found(row))}\n" for row in rows)


def _found(row):
    if "error" in row:
        return f"error: {row['error']}"
    return "  ".join(f"{p['class']} {p['probability']:.1%}" for p in row["predictions"])


def as_json(rows):
    """Returns predictions as a JSON list with an object per image."""
    return json.dumps(rows, indent=2) + "\n"


def as_csv(rows):
    """Returns predictions as CSV, a line per image and rank."""
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
    """Keeps spreadsheets from reading a name as a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in tuple("=+-@") else text


FORMATS = {"table": as_table, "json": as_json, "csv": as_csv}
