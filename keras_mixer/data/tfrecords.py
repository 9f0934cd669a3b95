"""Reads images from TFRecord and array_record files by index.

Random access to a TFRecord file needs the offsets of its records; they are read once from the
headers and cached. Every record is checked against its checksum when it is read, as by TensorFlow,
and every label against the number of classes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import struct
from pathlib import Path
from typing import ClassVar

import google_crc32c
import numpy as np

from keras_mixer.data.cache import load_cached, save_cached
from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import track

_HEADER, _FOOTER = 12, 4  # length and its checksum before the content, a checksum after it


class DamagedRecord(InputError):
    """A file of records, or one record, is damaged; `reason` has why."""

    def __init__(self, what, reason):
        self.reason = reason
        super().__init__(
            f"{what}: damaged ({reason}); remove its folder and prepare the dataset again"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RecordImages:
    """Serialized `tf.train.Example`s, each with an image and a label.

    Attributes:
        store: `TFRecordStore` or `RandomAccessStore` to read them from.
        numbers: int64 array `(n,)` of the records' numbers in the store.
        image_key, label_key: Names of the two features.
        channels: Color channels of the images.
        num_classes: Labels are below this.
        labels: None; they have to be read.
    """

    store: "TFRecordStore | RandomAccessStore"
    numbers: np.ndarray
    image_key: str
    label_key: str
    channels: int
    num_classes: int
    labels: None = None
    fix: ClassVar[str] = "remove the folder with the records and prepare it again"
    folder: ClassVar[str] = ""

    def __len__(self):
        return len(self.numbers)

    def take(self, indices):
        """Returns the images at these indices, in this order."""
        return dataclasses.replace(self, numbers=self.numbers[indices])

    def read(self, indices):
        """Returns the serialized examples at these indices, as an object array of bytes.

        Raises:
            InputError: If a file is missing, has become shorter, or a record is damaged.
        """
        examples = np.empty(len(indices), object)
        examples[:] = [self.store.read(number) for number in self.numbers[indices]]
        return examples

    def read_labels(self):
        """Returns the labels, int64 `(n,)`. Slow: it reads every record, images included."""
        indices = track(range(len(self)), "reading labels")
        return np.fromiter(map(self.label, indices), np.int64, len(self))

    def label(self, index):
        """Returns the label of one record; raises InputError if there is no such class."""
        labels = self._feature(index, self.label_key).int64_list.value
        if len(labels) != 1 or not 0 <= labels[0] < self.num_classes:
            found = ", ".join(map(str, labels[:5])) or "missing"
            raise DamagedRecord(
                self.name_of(index),
                f"{self.label_key} {found}, expected 0 to {self.num_classes - 1}",
            )
        return labels[0]

    def has_labels(self):
        """Returns whether the first record has one: those without are labeled -1."""
        with contextlib.suppress(DamagedRecord):  # reported when it is read
            return not len(self) or self._feature(0, self.label_key).int64_list.value != [-1]
        return True

    def sizes(self):
        """Returns the sizes of the records in bytes, an int array `(n,)`."""
        return self.store.sizes(self.numbers)

    def content(self, index):
        """Returns the encoded image of one record as bytes; raises InputError if it holds none."""
        values = self._feature(index, self.image_key).bytes_list.value
        if len(values) != 1:
            raise DamagedRecord(self.name_of(index), f"it holds {len(values)} images, expected one")
        return values[0]

    def name_of(self, index):
        """Returns the number and file of a record, for messages."""
        return self.store.name_of(self.numbers[index])

    def digest(self):
        """Returns a sha256 that identifies the records but does not depend on the folder."""
        digest = hashlib.sha256(repr((self.store.names(), self.image_key, self.label_key)).encode())
        digest.update(np.ascontiguousarray(self.store.positions(self.numbers), "<i8").tobytes())
        return digest.digest()

    def _feature(self, index, key):
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2  # without TensorFlow

        try:
            example = tf_example_pb2.Example.FromString(self.store.read(self.numbers[index]))
            return example.features.feature[key]
        except (DecodeError, UnicodeDecodeError) as error:
            raise DamagedRecord(self.name_of(index), "no tf.train.Example") from error


# === TFRecord files ===


class TFRecordStore:
    """The records of a list of shards.

    Args:
        name: Full name of the dataset, such as `cifar10/3.0.2`.
        shards: list of (path, first, count, total): `count` records, starting with number
            `first`, of the `total` records in a file.

    Raises:
        InputError: If a file is missing or damaged.
    """

    def __init__(self, name, shards):
        self._name = name
        self._paths = [path for path, *_ in shards]
        starts, stops = [], []
        for path, first, count, total in track(shards, "finding records"):
            bounds = _bounds(Path(path), total)[first : first + count + 1]
            starts.append(bounds[:-1])
            stops.append(bounds[1:])
        self._starts, self._stops = np.concatenate(starts), np.concatenate(stops)
        counts = [count for _, _, count, _ in shards]
        self._shards = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._firsts = dict(enumerate(first for _, first, _, _ in shards))

    def __len__(self):
        return len(self._starts)

    def read(self, number):
        """Returns the content of a record as bytes, which match their checksum."""
        start, stop = self._starts[number], self._stops[number]
        length = int(stop - start) - _HEADER
        path = self._paths[self._shards[number]]
        with path_errors(path), open(path, "rb", buffering=0) as file:
            file.seek(int(start) + _HEADER)
            content = file.read(length)
        if len(content) != length:
            raise DamagedRecord(path, "it became shorter during the run")
        content, checksum = content[:-_FOOTER], content[-_FOOTER:]
        if _checksum(content) != checksum:
            raise DamagedRecord(self.name_of(number), "its contents do not match its checksum")
        return content

    def name_of(self, number):
        """Returns the number and file of a record, for messages."""
        shard = self._shards[number]
        before = np.searchsorted(self._shards, shard)
        return f"record {self._firsts[shard] + number - before} of {self._paths[shard]}"

    def names(self):
        """Returns what identifies the store, except for its folder."""
        return self._name, [(os.path.basename(p), os.path.getsize(p)) for p in self._paths]

    def sizes(self, numbers):
        """Returns an int64 array `(n,)` of the sizes of records in bytes."""
        return self._stops[numbers] - self._starts[numbers]

    def positions(self, numbers):
        """Returns an int64 array `(n, 2)` of each record's shard and offset."""
        return np.stack([self._shards[numbers], self._starts[numbers]], axis=1)


def _bounds(path, total):
    """Returns the offset of each record in a file, then the file size: int64 `(total + 1,)`."""
    with path_errors(path):
        status = path.stat()
    key = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}".encode(
        errors="surrogateescape"
    )
    cache = f"records/{hashlib.sha256(key).hexdigest()[:32]}.npz"

    def valid(cached):
        bounds = cached["bounds"]
        ends = len(bounds) == total + 1 and (bounds[0], bounds[-1]) == (0, status.st_size)
        return ends and (np.diff(bounds) >= _HEADER + _FOOTER).all()

    if cached := load_cached(cache, {"bounds": "i"}, valid):
        return cached["bounds"]
    bounds = _walk(path, status.st_size)
    if len(bounds) != total + 1:
        raise DamagedRecord(path, f"it holds {len(bounds) - 1} records, expected {total}")
    save_cached(cache, {"bounds": bounds}, "where records begin")
    return bounds


def _walk(path, size):
    """Reads the bounds of the records from their headers, skipping the contents."""
    bounds = [0]
    with path_errors(path), open(path, "rb", buffering=0) as file:
        while bounds[-1] < size:
            file.seek(bounds[-1])
            length, checksum = file.read(8), file.read(4)
            if len(length) < 8 or _checksum(length) != checksum:
                raise DamagedRecord(path, f"the length of record {len(bounds) - 1} is wrong")
            bounds.append(bounds[-1] + _HEADER + struct.unpack("<Q", length)[0] + _FOOTER)
    if bounds[-1] != size:
        raise DamagedRecord(path, f"record {len(bounds) - 2} does not end where it should")
    return np.array(bounds, np.int64)


def _checksum(content):
    """Returns the 4 bytes that follow some content: its CRC-32C, rotated and offset.

    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


# === Other stores with random access ===


class RandomAccessStore:
    """The records of a tfds data source: array_record, or `tfds.testing.mock_data`.

    Args:
        name: Full name of the dataset and its split.
        source: Sequence of bytes.
        shards: As for `TFRecordStore`; empty if there are no files.
    """

    def __init__(self, name, source, shards):
        self._name, self._source, self._shards = name, source, shards

    def __len__(self):
        return len(self._source)

    def read(self, number):
        """Returns the content of a record as bytes."""
        try:
            return self._source[int(number)]
        except Exception as error:  # the reader's own, a RuntimeError of many lines
            raise DamagedRecord(self.name_of(number), str(error).splitlines()[0][:120]) from error

    def name_of(self, number):
        """Returns the number and file of a record, for messages."""
        return f"record {number} of {self._name}"

    def names(self):
        """Returns what identifies the store, except for its folder."""
        files = [(os.path.basename(path), *rest) for path, *rest in self._shards]
        sizes = [os.path.getsize(path) for path, *_ in self._shards]
        return self._name, files, sizes, len(self)

    def sizes(self, numbers):
        """Returns an int64 array `(n,)` with the mean size of a record in bytes, for each."""
        return np.full(len(numbers), sum(self.names()[2]) // max(len(self), 1))

    def positions(self, numbers):
        """Returns the numbers themselves."""
        return numbers


def overlap(shards, others):
    """Counts the records that two lists of (path, first, count, total) have in common."""
    parts = collections.defaultdict(list)
    for path, begin, size, _ in others:
        parts[path].append((begin, begin + size))
    return sum(
        max(0, min(first + count, end) - max(first, begin))
        for path, first, count, _ in shards
        for begin, end in parts[path]
    )
