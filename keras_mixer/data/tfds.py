"""Reads image-classification datasets of tensorflow-datasets; downloads and prepares new ones.

tensorflow_datasets imports TensorFlow only to prepare data, so errors are reported within a second.
"""

import contextlib
import difflib
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from keras_mixer.data.datasets import DATASETS, SPLITS, dataset_row
from keras_mixer.data.readers import Reader
from keras_mixer.data.tfrecords import RandomAccessStore, RecordImages, TFRecordStore, overlap
from keras_mixer.errors import InputError
from keras_mixer.log import logger

SECONDS_TO_ANSWER = 20


def _read_tfds(request):
    """Opens a dataset of tensorflow-datasets, in its own splits or in those requested.

    Labels are not read: that would mean reading all of the data before the first step.

    Raises:
        InputError: If the name or a split is unknown, the data cannot be prepared or are not for
            image classification, or the splits overlap.
    """
    builder = _open_builder(request.dataset, request.directory)
    image_key, label_key = _feature_keys(builder)
    channels = _channels(builder, image_key)
    expressions = _choose_expressions(builder, request)
    class_names = tuple(builder.info.features[label_key].names)
    splits = {}
    for name, expression in expressions.items():
        store = _store(builder, expression, image_key, label_key)
        splits[name] = RecordImages(
            store, np.arange(len(store)), image_key, label_key, channels, len(class_names)
        )
        if not splits[name].has_labels():
            raise InputError(
                f"--{flag_of(name)}={expression}: its images have no labels; give another split"
            )
    return class_names, splits


# === Finding and preparing ===


def _open_builder(name, directory):
    """Returns a builder whose data are prepared."""
    builder = _builder(name, directory)
    if _is_prepared(builder) or _is_mocked(builder):
        return builder
    if ":" not in name:  # a version that was prepared with another release of tfds
        other = _builder(f"{name}:*.*.*", directory)
        if _is_prepared(other):
            found = other.info.full_name
            logger.info(f"--dataset={name}: {found} is already prepared and will be used")
            return other
    _prepare(builder, name)
    return builder


def _is_prepared(builder):
    """As the builder's own `is_prepared`, but without its warning."""
    return (builder.data_path / "dataset_info.json").exists()


def _builder(name, directory):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, try_gcs=False, data_dir=directory)
    except tfds.core.DatasetNotFoundError as error:
        known = sorted({*DATASETS, *tfds.list_builders(with_community_datasets=False)})
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        if os.path.isdir(name):
            hint = f"; for the images in {name} give --dataset=folder --data_dir={name}"
        others = ", ".join(key for key, info in DATASETS.items() if info.origin != "tfds")
        raise InputError(
            f"--dataset={name}: expected one of {others} or the name of a set of "
            f"tensorflow-datasets{hint}"
        ) from error
    except Exception as error:  # many types: config, version and syntax of the name
        raise InputError(f"--dataset={name}: {_one_line(error)}") from error


def _is_mocked(builder):
    """Returns whether there are examples without files, as under `tfds.testing.mock_data`."""
    try:
        return len(builder.as_data_source("train")) > 0
    except Exception:  # the usual case; the type depends on the format
        return False


def _prepare(builder, name):
    try:
        _refuse_unreachable(builder)
        logger.info(f"--dataset={name} is not in {builder.data_dir}: downloading and preparing it")
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to results
            builder.download_and_prepare()
    except Exception as error:  # the network, the disk, manual downloads, missing packages
        raise InputError(
            f"--dataset={name}: not in {builder.data_dir}, and cannot be prepared there: "
            f"{_one_line(error)}. --data_dir gives another folder, with prepared data"
            f"{' or the four IDX files' * (dataset_row(name).origin == 'idx')}"
        ) from error


def _refuse_unreachable(builder):
    """Asks one of the servers first, because tfds itself retries for minutes."""
    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    folder = Path(builder.data_dir_root) / "downloads" / builder.name
    downloaded = folder.is_dir() and any(".tmp." not in path.name for path in folder.iterdir())
    if not urls or downloaded or builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return
    with contextlib.suppress(urllib.error.HTTPError):  # even an error is an answer
        request = urllib.request.Request(urls[0], method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()


def _one_line(error):
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


def _feature_keys(builder):
    """Returns the names of the image and label features."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    names = [[n for n, f in features.items() if type(f) is kind] for kind in kinds]
    supervised = builder.info.supervised_keys
    if supervised and len(supervised) == 2 and all(map(list.__contains__, names, supervised)):
        return supervised
    if list(map(len, names)) == [1, 1]:
        return names[0][0], names[1][0]
    found = ", ".join(f"{name} ({type(features[name]).__name__})" for name in sorted(features))
    raise InputError(
        f"--dataset={builder.name}: not a set for image classification; expected one image and "
        f"one class label, received the features {found}"
    )


def _channels(builder, image_key):
    feature = builder.info.features[image_key]
    channels = feature.shape[-1] or 3
    if channels not in (1, 3) or len(feature.shape) != 3 or feature.np_dtype != np.uint8:
        raise InputError(
            f"--dataset={builder.name}: expected images of 1 or 3 channels of 8 bits, received "
            f"{image_key} of shape {feature.shape}, {np.dtype(feature.np_dtype)}"
        )
    return channels


# === Splits ===


def flag_of(name):
    """Returns the name of the flag for a split's expression."""
    return f"{'train' if name == 'all' else name}_split"


def _choose_expressions(builder, request):
    """Returns the expression of each split to open; the only split of a dataset is called `all`."""
    defaults = _default_expressions(builder, request.info)
    given = {n: text for n in SPLITS if (text := request.options[flag_of(n)])}
    chosen = {**defaults, **given}
    if "all" in defaults and "train" in chosen:
        del chosen["all"]
    elif "all" in defaults and given:
        chosen["train"] = chosen.pop("all")
    if not chosen.keys() & {"train", "all"}:
        raise InputError(
            f"--dataset={builder.name} has no split called train, only {_format_splits(builder)}; "
            f"choose the training split with --train_split"
        )
    shards = {name: _shards(builder, name, text) for name, text in chosen.items()}
    is_default = "train" in given and "validation" not in given and "validation" in chosen
    if is_default and overlap(shards["train"], shards["validation"]):
        del chosen["validation"]  # so that it is set aside from train
    _refuse_overlap(chosen, shards)
    return chosen


def _default_expressions(builder, info):
    """Returns the expressions of the table, else the splits with the usual names."""
    names = list(builder.info.splits)
    if info.splits:
        return {name: text for name, text in zip(SPLITS, info.splits, strict=True) if text}
    if not names:  # mocked, so any name will do
        return {"train": "train", "test": "test"}
    return {"all": names[0]} if len(names) == 1 else {n: n for n in SPLITS if n in names}


def _format_splits(builder):
    return ", ".join(f"{name} ({info.num_examples})" for name, info in builder.info.splits.items())


def _shards(builder, name, expression):
    """Returns the parts of files that make up a split, as for `TFRecordStore`."""
    if not builder.info.splits:
        return []
    try:
        files = builder.info.splits[expression].file_instructions
    except Exception as error:  # many types, from the parser and from the arithmetic
        raise InputError(
            f"--{flag_of(name)}={expression}: not a split of --dataset={builder.name}, which has "
            f"{_format_splits(builder)}; written as train, train[:90%] or train+test "
            f"({_one_line(error)[:120]})"
        ) from error
    shards = [(f.filename, f.skip, f.take, f.examples_in_shard) for f in files if f.take]
    if not shards:
        raise InputError(f"--{flag_of(name)}={expression}: there are no images in this split")
    return shards


def _refuse_overlap(expressions, shards):
    names = list(expressions)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if count := overlap(shards[name], shards[other]):
                raise InputError(
                    f"--{flag_of(name)}={expressions[name]} and --{flag_of(other)}="
                    f"{expressions[other]} have {count} images in common; choose splits that "
                    f"do not overlap"
                )
        twice = overlap(shards[name], shards[name]) - sum(part[2] for part in shards[name])
        if twice:
            raise InputError(f"--{flag_of(name)}={expressions[name]} contains images twice")


def _store(builder, expression, image_key, label_key):
    import tensorflow_datasets as tfds

    shards = _shards(builder, "train", expression)
    full_name = builder.info.full_name
    if shards and builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        return TFRecordStore(full_name, shards)
    wanted = {image_key: True, label_key: True}
    try:
        source = builder.as_data_source(
            expression,
            decoders=tfds.decode.PartialDecoding(wanted),
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
        with contextlib.suppress(RuntimeError):  # damaged: reported when it is read
            if not isinstance(source[0], bytes):
                raise TypeError(f"its records are {type(source[0]).__name__}")
    except Exception as error:
        raise InputError(
            f"--dataset={builder.name}: {builder.data_dir} is prepared in a format that cannot be "
            f"read in any order; prepare it as tfrecord or array_record ({_one_line(error)})"
        ) from error
    return RandomAccessStore(f"{full_name} {expression}", source, shards)


TFDS = Reader(_read_tfds, "optional", options=tuple(map(flag_of, SPLITS)))
