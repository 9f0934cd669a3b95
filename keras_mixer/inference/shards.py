"""Prediction of many images in shards, one output file each, by any number of processes.

A process locks a shard, writes its predictions, and then marks it as finished. After a kill, only
the shard in progress is repeated, by any process.
"""

import hashlib
import math
import os
import time
from pathlib import Path

import filelock

from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import locked, read_sealed, write_atomically, write_sealed
from keras_mixer.inference.predict import predictions_as_text, submission_ids
from keras_mixer.log import progress_bar

MANIFEST, STATE = "predictions.json", ".state"
SUFFIXES = {"table": "txt", "json": "json", "csv": "csv", "kaggle": "csv"}
WAIT = 1.0  # seconds before asking again for shards that other processes predict


class Shards:
    """The predictions of a list of images, in a folder.

    Args:
        folder: Path; created if it does not exist.
        images: list of paths as strings.
        weights: sha256 of the model's weights.
        size: int. Images in a shard; the last one may have fewer.
        format, top_k: As for `predictions_as_text`.

    Raises:
        InputError: If the folder holds other files, or predictions of other images, by another
            model or in another format.
    """

    def __init__(self, folder, images, weights, *, size, format, top_k):
        self.folder = Path(folder)
        self.images = images
        self.manifest = {
            "model": weights,
            "images": _digest("\0".join(map(_with_state, images)).encode(errors="surrogateescape")),
            "shard_size": size,
            "format": format,
            "top_k": top_k,
        }
        self._counts = {}  # of finished shards
        if format == "kaggle":
            submission_ids(images)
        with path_errors(f"--output_dir={folder}"):
            self._open()

    def _open(self):
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        with locked(self.folder / STATE / "lock"):
            others = [p.name for p in self.folder.iterdir() if p.name != STATE]
            if others and MANIFEST not in others:
                raise InputError(
                    f"--output_dir={self.folder} holds other files; give a new or an empty folder"
                )
            if not others:
                write_sealed(path, self.manifest)
        before = read_sealed(path)
        if before is None:
            raise InputError(f"{path}: damaged; give another --output_dir")
        if differing := [n for n in self.manifest if before.get(n) != self.manifest[n]]:
            raise InputError(
                f"--output_dir={self.folder} holds other predictions (differing: "
                f"{', '.join(differing)}); give another one"
            )

    def predict(self, model):
        """Predicts the shards that are left, and waits for those of other processes.

        Args:
            model: `keras.Model` from `load_mixer`.

        Returns:
            (predicted, failed): numbers of images of all shards; failed ones cannot be read.
        """
        with progress_bar() as bar:
            task = bar.add_task("predicting", total=len(self.images), status="")

            def follow(results, total):
                for result in results:
                    yield result
                    bar.advance(task)

            while left := self._left():
                bar.update(task, completed=sum(c["images"] for c in self._counts.values()))
                if not any([self._predict_one(index, model, follow) for index in left]):
                    time.sleep(WAIT)
        images, failed = (sum(c[n] for c in self._counts.values()) for n in ("images", "failed"))
        return images - failed, failed

    def _left(self):
        """Returns the indices of the shards that are not finished."""
        count = math.ceil(len(self.images) / self.manifest["shard_size"])
        return [index for index in range(count) if not self._is_finished(index)]

    def _is_finished(self, index):
        if index not in self._counts and (counts := read_sealed(self._state(index, "json"))):
            path = self._path(index)
            if path.is_file() and _digest(path.read_bytes()) == counts["content"]:
                self._counts[index] = counts
        return index in self._counts

    def _predict_one(self, index, model, follow):
        """Predicts a shard; returns False if another process has it."""
        try:
            with locked(self._state(index, "lock"), timeout=0):
                if not self._is_finished(index):
                    self._write(index, model, follow)
        except filelock.Timeout:
            return False
        return True

    def _write(self, index, model, follow):
        size = self.manifest["shard_size"]
        images = self.images[index * size : (index + 1) * size]
        how = self.manifest["format"], self.manifest["top_k"]
        text, failed = predictions_as_text(model, images, *how, follow)
        content = text.encode(errors="backslashreplace")
        write_atomically(self._path(index), content)
        counts = {"images": len(images), "failed": failed, "content": _digest(content)}
        write_sealed(self._state(index, "json"), counts)
        self._counts[index] = counts

    def _path(self, index):
        return self.folder / f"{index:05d}.{SUFFIXES[self.manifest['format']]}"

    def _state(self, index, suffix):
        return self.folder / STATE / f"{index:05d}.{suffix}"


def _with_state(path):
    """Returns a path with the size and time of its file, so that a replaced file is noticed."""
    try:
        status = os.stat(path)
    except OSError:  # missing; predict reports it
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _digest(content):
    return hashlib.sha256(content).hexdigest()
