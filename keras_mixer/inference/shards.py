"""Predicts many images in shards, each a file of its own, by any number of processes.

A process takes a shard that nobody has, and writes its predictions, then how many they are. So
after a kill, only the shard that was being predicted is repeated, by whoever comes first.
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

RECORD, STATE = "predictions.json", ".state"
SUFFIXES = {"table": "txt", "json": "json", "csv": "csv", "kaggle": "csv"}
WAIT = 1.0  # seconds between looks at shards that other processes predict


class Shards:
    """The predictions of a list of images, in a folder.

    Args:
        folder: Path; made if it does not exist.
        images: list of paths as strings.
        weights: sha256 of the model's weights.
        size: int. Images in a shard; the last one may have fewer.
        format, top_k: As for `predictions_as_text`.

    Raises:
        InputError: If the folder holds other files, or predictions of other images, by another
            model or in another form.
    """

    def __init__(self, folder, images, weights, *, size, format, top_k):
        self.folder = Path(folder)
        self.images = images
        self.record = {
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
        record = self.folder / RECORD
        with locked(self.folder / STATE / "lock"):
            others = [p.name for p in self.folder.iterdir() if p.name != STATE]
            if others and RECORD not in others:
                raise InputError(
                    f"--output_dir={self.folder} holds other files; give a new or an empty folder"
                )
            if not others:
                write_sealed(record, self.record)
        before = read_sealed(record)
        if before is None:
            raise InputError(f"{record}: damaged; give another --output_dir")
        if differing := [n for n in self.record if before.get(n) != self.record[n]]:
            raise InputError(
                f"--output_dir={self.folder} holds other predictions (differing: "
                f"{', '.join(differing)}); give another one"
            )

    def predict(self, model):
        """Predicts what nobody has predicted yet, and waits for what others are predicting.

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
        count = math.ceil(len(self.images) / self.record["shard_size"])
        return [index for index in range(count) if not self._is_finished(index)]

    def _is_finished(self, index):
        if index not in self._counts and (counts := read_sealed(self._state(index, "json"))):
            path = self._path(index)
            if path.is_file() and _digest(path.read_bytes()) == counts["content"]:
                self._counts[index] = counts
        return index in self._counts

    def _predict_one(self, index, model, follow):
        """Predicts a shard, and tells whether it did: another process may have it."""
        try:
            with locked(self._state(index, "lock"), timeout=0):
                if not self._is_finished(index):
                    self._write(index, model, follow)
        except filelock.Timeout:
            return False
        return True

    def _write(self, index, model, follow):
        size = self.record["shard_size"]
        images = self.images[index * size : (index + 1) * size]
        how = self.record["format"], self.record["top_k"]
        text, failed = predictions_as_text(model, images, *how, follow)
        content = text.encode(errors="backslashreplace")
        write_atomically(self._path(index), content)
        counts = {"images": len(images), "failed": failed, "content": _digest(content)}
        write_sealed(self._state(index, "json"), counts)
        self._counts[index] = counts

    def _path(self, index):
        return self.folder / f"{index:05d}.{SUFFIXES[self.record['format']]}"

    def _state(self, index, suffix):
        return self.folder / STATE / f"{index:05d}.{suffix}"


def _with_state(path):
    """Returns a path with the size and time of its file: another file of that name is another."""
    try:
        status = os.stat(path)
    except OSError:  # missing; predict reports it
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _digest(content):
    return hashlib.sha256(content).hexdigest()
