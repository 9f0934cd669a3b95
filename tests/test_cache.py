"""Tests `keras_mixer/data/cache.py`: arrays come back, and damaged files are never used."""

import numpy as np
import pytest

from keras_mixer.data.cache import load_cached, save_cached

KINDS = {"names": "S", "sizes": "i"}
ARRAYS = {"names": np.array([b"a", b"bc"]), "sizes": np.array([3, 4])}

DAMAGES = {
    "no archive": lambda path: path.write_bytes(b"hello"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"names", b"nemas")),
    "other arrays": lambda path: np.savez(path, other=np.arange(3)),
    "objects": lambda path: np.savez(path, names=[b"x"], sizes=np.array([None])),
    "other types": lambda path: np.savez(path, names=[b"x"], sizes=[0.5]),
    "uneven": lambda path: np.savez(path, names=[b"x"], sizes=[0, 1]),
    "two axes": lambda path: np.savez(path, names=[[b"x"]], sizes=[[0]]),
    "wrong values": lambda path: np.savez(path, names=[b"x"], sizes=[-1]),
}


def is_valid(arrays):
    return (arrays["sizes"] >= 0).all()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path))
    save_cached("folder/file.npz", ARRAYS, "numbers")
    return tmp_path / "folder" / "file.npz"


def test_saved_arrays_are_loaded(capsys):
    loaded = load_cached("folder/file.npz", KINDS, is_valid)
    assert loaded.keys() == KINDS.keys()
    assert all(np.array_equal(loaded[name], ARRAYS[name]) for name in KINDS)
    assert load_cached("folder/none.npz", KINDS) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_not_used(cache, capsys, damage):
    damage(cache)
    assert load_cached("folder/file.npz", KINDS, is_valid) is None
    assert capsys.readouterr().err.startswith(f"{cache}: damaged, so it is written again")


def test_a_folder_that_cannot_be_written_is_reported(cache, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(cache))
    save_cached("folder/file.npz", ARRAYS, "numbers")
    assert "cannot cache numbers (Not a directory)" in capsys.readouterr().err
