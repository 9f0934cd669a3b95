"""Tests `keras_mixer/files.py`: atomic writes and packed arrays."""

import numpy as np
import pytest
from safetensors.numpy import load

from keras_mixer import files


def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_arrays_of_any_memory_layout_are_read_back_equal():
    arrays = {
        "transposed": np.arange(6, dtype="float32").reshape(2, 3).T,
        "every other": np.arange(10, dtype="int64")[::2],
        "scalar": np.array(7, "uint32"),
    }
    found = load(files.pack(arrays))
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_equal_arrays_are_packed_to_equal_bytes():
    arrays = {str(i): np.full(i, i, "float32") for i in range(20)}
    backwards = dict(reversed(arrays.items()))
    assert files.pack(arrays, {"a": "b"}) == files.pack(backwards, {"a": "b"})
