"""What fuzz.py damages: honest files of every kind that are read, and how they are read."""

import contextlib
import dataclasses
import io
import os
import shutil
from collections.abc import Callable

import numpy as np

from keras_mixer.errors import InputError, RunError

SIDE = 24  # pixels


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of file.

    Attributes:
        make: Function of an empty folder that writes honest files and returns the paths of those
            to damage.
        read: Function of (folder, path) that reads the damaged file. What it returns must be as of
            the honest files; None: any content will do.
    """

    make: Callable
    read: Callable


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _images(suffix):
    def make(folder):
        from PIL import Image

        for name, mode in (("color", "RGB"), ("gray", "L")):
            smooth = Image.fromarray(_noise(6, 6, 3)).resize((SIDE, SIDE)).convert(mode)
            smooth.save(folder / f"{name}.{suffix}")
        return sorted(folder.iterdir())

    return make


def _read_image(folder, path):
    """As training and prediction do: checks the file, then decodes it."""
    import tensorflow as tf

    from keras_mixer.data.image_checks import check_image_file
    from keras_mixer.preprocessing.decode import decode_image, decoding_problem

    if problem := check_image_file(path):
        raise InputError(f"{path}: {problem}")
    try:
        decode_image(tf.io.read_file(os.fspath(path)), 3)
    except (tf.errors.OpError, ValueError) as error:
        raise InputError(f"{path}: {decoding_problem(error)}") from error


def _weights(name):
    def make(folder):
        from keras_mixer import build_mixer
        from keras_mixer.weights.convert import convert_weights

        model, path = build_mixer((8, 8), (4, 4), depth=2, dim=6, num_classes=3), folder / name
        if name.endswith(".keras"):
            model.save(path)
        elif name.endswith(".weights.h5"):
            model.save_weights(path)
        else:
            model.save(folder / "source.keras")
            with contextlib.redirect_stderr(io.StringIO()):
                convert_weights(folder / "source.keras", path)
        return sorted(path.iterdir()) if path.is_dir() else [path]

    return make


def _read_weights(folder, path):
    from keras_mixer.weights.pretrained import read_pretrained

    arrays = read_pretrained(path if path.parent == folder else path.parent).arrays
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise AssertionError("weights that are not finite")


def _make_pth(folder):
    import torch
    from safetensors.torch import load_file

    [source] = _weights("mixer.safetensors")(folder)
    torch.save(load_file(source), folder / "mixer.pth")
    return [folder / "mixer.pth"]


def _make_records(folder):
    import tensorflow as tf

    features = {"image": tf.io.encode_png(_noise(SIDE, SIDE, 3)).numpy(), "label": 2}
    with tf.io.TFRecordWriter(os.fspath(folder / "records")) as writer:
        for _ in range(5):
            image, label = _feature(features["image"]), _feature(features["label"])
            example = tf.train.Features(feature={"image": image, "label": label})
            writer.write(tf.train.Example(features=example).SerializeToString())
    return [folder / "records"]


def _feature(value):
    import tensorflow as tf

    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def _read_records(folder, path):
    from keras_mixer.data.tfrecords import RecordImages, TFRecordStore

    store = TFRecordStore("fuzz", [(os.fspath(path), 0, 5, 5)])
    images = RecordImages(store, np.arange(5), "image", "label", 3, 3)
    return [(images.content(index), images.label(index)) for index in range(5)]


def _make_csv(folder):
    from PIL import Image

    for index in range(12):
        Image.fromarray(_noise(SIDE, SIDE, 3)).save(folder / f"{index}.png")
    rows = [f"{index}.png,{'ant' if index % 2 else 'bee'}\n" for index in range(12)]
    (folder / "labels.csv").write_text("image,label\n" + "".join(rows))
    return [folder / "labels.csv"]


def _read_csv(folder, path):
    from keras_mixer.data.sources import open_dataset

    open_dataset("csv", folder, 0.0)


def _make_idx(folder):
    header = {"images": (0x803, 6, 8, 8), "labels": (0x801, 6)}
    for split in ("train", "t10k"):
        for kind, numbers in header.items():
            values = _noise(6, 8, 8) if kind == "images" else np.arange(6, dtype=np.uint8)
            content = b"".join(n.to_bytes(4, "big") for n in numbers) + values.tobytes()
            (folder / f"{split}-{kind}-idx{values.ndim}-ubyte").write_bytes(content)
    return sorted(folder.iterdir())


def _read_idx(folder, path):
    from keras_mixer.data.sources import open_dataset

    open_dataset("mnist", folder, 0.0)


def _make_run(folder):
    from keras_mixer import Config, run_job

    sizes = {"depth": 1, "dim": 8, "num_steps": 2, "warmup_step": 0, "batch_size": 128}
    with contextlib.redirect_stderr(io.StringIO()):
        run_job(Config(**sizes, jit="false", export=False, output_dir=str(folder / "run")))
    names = ("config.json", "history.csv", "metrics.json", "best/model.json")
    return [folder / "run" / name for name in (*names, "best/model.safetensors")]


def _read_run(folder, path):
    from keras_mixer.runs.open_run import read_run
    from keras_mixer.runs.run import check_best, read_history, read_metrics
    from keras_mixer.weights.pretrained import read_pretrained

    run = read_run(folder / "run")
    check_best(run)
    arrays = {k: v.tobytes() for k, v in read_pretrained(folder / "run").arrays.items()}
    return arrays, run.config, run.spec, read_metrics(run.directory), read_history(run.directory)


def _make_checkpoint(folder):
    _make_run(folder)
    *older, newest = sorted((folder / "run" / "checkpoints").iterdir())
    for step in older:
        shutil.rmtree(step)
    return sorted(newest.iterdir())


def _read_checkpoint(folder, path):
    from keras_mixer.runs.checkpoints import newest_checkpoint

    with contextlib.redirect_stderr(io.StringIO()):  # says what is damaged
        state = newest_checkpoint(folder / "run" / "checkpoints")
    if state is None:
        raise RunError("no intact checkpoint")
    return {name: array.tobytes() for name, array in state.arrays.items()}, state.progress


SUBJECTS = {
    "JPEG": Subject(_images("jpg"), _read_image),
    "PNG": Subject(_images("png"), _read_image),
    "GIF": Subject(_images("gif"), _read_image),
    "BMP": Subject(_images("bmp"), _read_image),
    "WebP": Subject(_images("webp"), _read_image),
    "official .npz": Subject(_weights("mixer.npz"), _read_weights),
    "timm's .safetensors": Subject(_weights("mixer.safetensors"), _read_weights),
    "timm's .pth": Subject(_make_pth, _read_weights),
    ".keras": Subject(_weights("mixer.keras"), _read_weights),
    ".weights.h5": Subject(_weights("mixer.weights.h5"), _read_weights),
    "model folder": Subject(_weights("mixer"), _read_weights),
    "TFRecord": Subject(_make_records, _read_records),
    "CSV of labels": Subject(_make_csv, _read_csv),
    "IDX": Subject(_make_idx, _read_idx),
    "run": Subject(_make_run, _read_run),
    "checkpoint": Subject(_make_checkpoint, _read_checkpoint),
}
