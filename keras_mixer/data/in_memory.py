"""Reads small datasets into memory: scikit-learn's digits, and the IDX files of MNIST."""

import gzip
import math
import os
import struct
import zlib

import numpy as np

from keras_mixer.data.readers import Reader
from keras_mixer.data.splits import ArrayImages
from keras_mixer.errors import InputError

_EXPANSION, _SLACK = 20, 64 << 20  # of a .gz; MNIST's images expand 5 times


def _read_digits(request):
    """Returns the class names and scikit-learn's 1,797 handwritten digits, not split yet."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # levels 0 to 16
    return request.info.class_names, {"all": ArrayImages(images, bunch.target.astype(np.int64))}


def _read_idx(request):
    """Reads the four files of MNIST or Fashion-MNIST, gzipped or not, into memory.

    Raises:
        InputError: If a file is missing or damaged, or images and labels do not match.
    """
    class_names, directory = request.info.class_names, request.directory
    splits = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images_path = _find_file(directory, f"{prefix}-images-idx3-ubyte")
        images = _read_values(images_path, dimensions=3)[..., None]
        labels_path = _find_file(directory, f"{prefix}-labels-idx1-ubyte")
        labels = _read_values(labels_path, dimensions=1).astype(np.int64)
        if len(images) != len(labels) or not len(labels):
            raise InputError(
                f"--data_dir: expected as many images as labels, but {images_path} holds "
                f"{len(images)} images and {labels_path} holds {len(labels)} labels"
            )
        if labels.max() >= len(class_names):
            raise InputError(
                f"--data_dir: {labels_path} holds the label {labels.max()}; expected labels "
                f"below {len(class_names)}"
            )
        splits[name] = ArrayImages(images, labels)
    return class_names, splits


def _holds_idx(directory):
    """Returns whether any of the four files exists."""
    return any(any(directory.glob(f"{prefix}-*-ubyte*")) for prefix in ("train", "t10k"))


def _find_file(directory, name):
    for candidate in (directory / f"{name}.gz", directory / name):
        if candidate.is_file():
            return candidate
    raise InputError(f"--data_dir={directory}: expected the file {name}.gz (or {name})")


def _read_values(path, dimensions):
    """Reads an IDX file of unsigned bytes: a magic number, the sizes, then the values."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            shape = _read_shape(file, path, dimensions)
            size = math.prod(shape)
            if size > _SLACK + _EXPANSION * os.path.getsize(path):
                raise InputError(
                    f"--data_dir: {path} declares {size} values, more than {_EXPANSION} times its "
                    f"size; copy or download it again"
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--data_dir: cannot read {path}: {error}") from error
    if len(content) != size:
        received = f"more than {size}" if len(content) > size else len(content)
        raise InputError(
            f"--data_dir: {path} is damaged: expected {size} values by its header, "
            f"received {received}; copy or download it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_shape(file, path, dimensions):
    header = file.read(4 * (1 + dimensions))
    expected_magic = 0x0800 + dimensions  # 08: unsigned byte
    if len(header) < 4 * (1 + dimensions) or struct.unpack(">I", header[:4])[0] != expected_magic:
        raise InputError(f"--data_dir: {path} is not an IDX file of {dimensions} dimensions")
    return struct.unpack(f">{dimensions}I", header[4:])


DIGITS = Reader(_read_digits, data_dir="none")
IDX = Reader(_read_idx, data_dir="optional", holds=_holds_idx)
