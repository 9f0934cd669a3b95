"""Images in record files, read by index.

A TFRecord file can only be read from front to back, unless one knows where its records begin. An
index of that, made once from their headers, is kept in the user's cache folder.
"""

import collections
import dataclasses
import hashlib
import io
import os
import struct
from pathlib import Path

import numpy as np

from keras_mixer import console
from keras_mixer.errors import InputError, path_errors, some_of
from keras_mixer.files import cache_folder, write_atomically

_HEADER, _FOOTER = 12, 4  # length and its checksum before the content, a checksum after it


@dataclasses.dataclass(frozen=True, eq=False)
class RecordImages:
    """Serialized `tf.train.Example`s that hold an image and a label each.

    Attributes:
        store: What reads them: `TFRecordStore` or `RandomAccessStore`.
        numbers: int64 array `(n,)`: which of the store's records these are, in this order.
        image_key, label_key: Names of the two features.
        channels: Color channels of the images.
        labels: None; they have to be read.
    """

    store: "TFRecordStore | RandomAccessStore"
    numbers: np.ndarray
    image_key: str
    label_key: str
    channels: int
    labels: None = None

    def __len__(self):
        return len(self.numbers)

    def take(self, indices):
        """Returns the images at these indices, in this order."""
        return dataclasses.replace(self, numbers=self.numbers[indices])

    def read(self, indices):
        """Returns serialized examples as an object array of bytes, one for each index.

        Raises:
            InputError: If a file is gone or shorter than it was.
        """
        examples = np.empty(len(indices), object)
        examples[:] = [self.store.read(number) for number in self.numbers[indices]]
        return examples

    def read_labels(self):
        """Returns the labels as an int64 array `(n,)`; reads every record whole, so it takes time.

        Raises:
            InputError: If a record cannot be read.
        """
        indices = console.track(range(len(self)), "reading labels")
        return np.fromiter(map(self.label, indices), np.int64, len(self))

    def label(self, index):
        """Returns the label of one record."""
        values = self._feature(index, self.label_key).int64_list.value
        if not values:
            raise _damaged(self.place(index), f"no {self.label_key}")
        return values[0]

    def image(self, index):
        """Returns the encoded image of one record as bytes.

        Raises:
            InputError: If the record cannot be read.
        """
        values = self._feature(index, self.image_key).bytes_list.value
        return values[0] if values else b""

    def place(self, index):
        """Returns where a record is, for a message."""
        return self.store.place(self.numbers[index])

    def digest(self):
        """Returns a sha256 of which records these are; where their files lie does not matter."""
        digest = hashlib.sha256(repr((self.store.names(), self.image_key, self.label_key)).encode())
        digest.update(np.ascontiguousarray(self.store.places(self.numbers), "<i8").tobytes())
        return digest.digest()

    def _feature(self, index, key):
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2  # as TensorFlow's, but without it

        try:
            example = tf_example_pb2.Example.FromString(self.store.read(self.numbers[index]))
        except DecodeError as error:
            raise _damaged(self.place(index), "no tf.train.Example") from error
        return example.features.feature[key]


def refuse_records(problems):
    """Raises an InputError that names records and what is wrong with each, if there are any.

    Args:
        problems: list of (where the record is, reason), both strings.
    """
    if problems:
        named = some_of([f"{place} ({why})" for place, why in problems])
        raise InputError(
            f"{len(problems)} damaged image{'s' * (len(problems) > 1)}: {named}; "
            f"remove the folder with the records, and prepare it again"
        )


def _damaged(what, why):
    return InputError(f"{what}: damaged ({why}); remove the folder it is in, and prepare it again")


# === TFRecord files ===


class TFRecordStore:
    """The records of some shards, by number.

    Args:
        name: What the records are called, in full: `cifar10/3.0.2`.
        shards: list of (path, first, count, total): of the `total` records in that file, `count`
            from the one numbered `first` on.

    Raises:
        InputError: If a file is missing or damaged.
    """

    def __init__(self, name, shards):
        self._name = name
        self._paths = [path for path, *_ in shards]
        starts, stops = [], []
        for path, first, count, total in console.track(shards, "finding records"):
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
        """Returns the content of a record as bytes."""
        start, stop = self._starts[number], self._stops[number]
        length = int(stop - start) - _HEADER - _FOOTER
        path = self._paths[self._shards[number]]
        with path_errors(path), open(path, "rb", buffering=0) as file:
            file.seek(int(start) + _HEADER)
            content = file.read(length)
        if len(content) != length:
            raise _damaged(path, "it became shorter during the run")
        return content

    def place(self, number):
        """Returns where a record lies, for a message."""
        shard = self._shards[number]
        before = np.searchsorted(self._shards, shard)
        return f"record {self._firsts[shard] + number - before} of {self._paths[shard]}"

    def names(self):
        """Returns what identifies the store, apart from the folder it is in."""
        return self._name, [(os.path.basename(p), os.path.getsize(p)) for p in self._paths]

    def places(self, numbers):
        """Returns an int64 array `(n, 2)`: the shard of each record and where in it it begins."""
        return np.stack([self._shards[numbers], self._starts[numbers]], axis=1)


def _bounds(path, total):
    """Where each record of a file begins, and at last where the file ends: `(total + 1,)`."""
    with path_errors(path):
        found = path.stat()
    key = f"{path.absolute()} {found.st_size} {found.st_mtime_ns}".encode(errors="surrogateescape")
    kept = cache_folder() / "records" / f"{hashlib.sha256(key).hexdigest()[:32]}.npy"
    bounds = _recalled(kept)
    if bounds is None or len(bounds) != total + 1 or bounds[-1] != found.st_size:
        bounds = _walk(path, found.st_size)
        if len(bounds) != total + 1:
            raise _damaged(path, f"it holds {len(bounds) - 1} records, expected {total}")
        _remember(kept, bounds)
    return bounds


def _walk(path, size):
    """Goes from header to header; the contents are skipped."""
    bounds = [0]
    with path_errors(path), open(path, "rb", buffering=0) as file:
        while bounds[-1] < size:
            file.seek(bounds[-1])
            header = file.read(8).ljust(8, b"\xff")
            bounds.append(bounds[-1] + _HEADER + struct.unpack("<Q", header)[0] + _FOOTER)
    if bounds[-1] != size:
        raise _damaged(path, f"record {len(bounds) - 2} does not end where it should")
    return np.array(bounds, np.int64)


def _recalled(kept):
    try:
        bounds = np.load(io.BytesIO(kept.read_bytes()), allow_pickle=False)
    except OSError:
        return None
    except Exception:  # NumPy raises many kinds on damaged files
        return None
    sound = bounds.dtype == np.int64 and bounds.ndim == 1 and len(bounds) and bounds[0] == 0
    return bounds if sound and (np.diff(bounds) >= _HEADER + _FOOTER).all() else None


def _remember(kept, bounds):
    """Keeps the bounds for the next start; that it could not is no error."""
    content = io.BytesIO()
    np.save(content, bounds)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, content.getvalue())
    except OSError as error:
        console.say(f"{kept.parent}: cannot keep where records begin ({error.strerror})")


# === Other stores with random access ===


class RandomAccessStore:
    """The records of a tfds data source (array_record, or what `tfds.testing.mock_data` makes up).

    Args:
        name: What the records are called, in full, with the split they are of.
        source: Sequence of bytes.
        shards: As for `TFRecordStore`; empty where there are no files.
    """

    def __init__(self, name, source, shards):
        self._name, self._source, self._shards = name, source, shards

    def __len__(self):
        return len(self._source)

    def read(self, number):
        """Returns the content of a record as bytes."""
        return self._source[int(number)]

    def place(self, number):
        """Returns where a record lies, for a message."""
        return f"record {number} of {self._name}"

    def names(self):
        """Returns what identifies the store, apart from the folder it is in."""
        files = [(os.path.basename(path), *rest) for path, *rest in self._shards]
        sizes = [os.path.getsize(path) for path, *_ in self._shards]
        return self._name, files, sizes, len(self)

    def places(self, numbers):
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
