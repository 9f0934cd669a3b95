"""Tests `keras_mixer/files.py`: atomic writes, devices and pipes, packed arrays, locks."""

import csv
import errno
import io
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT
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


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """Its name is a random one, also in containers whose processes have equal numbers."""
    path, target = tmp_path / "file", tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / f".file.tmp-{os.getpid()}").symlink_to(target)
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".file.tmp-guessed").symlink_to(target)
    with pytest.raises(FileExistsError):
        files.write_atomically(path, b"newer")
    assert (path.read_bytes(), target.read_bytes()) == (b"new", b"mine")


@pytest.mark.parametrize("exists", [True, False])
def test_links_stay_and_what_they_lead_to_is_replaced_at_once(tmp_path, exists):
    """Atomically: a process that has the old file open still reads the old content."""
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "file", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("far/file")
    with open(target if exists else os.devnull, "rb") as reader:
        files.write_output(str(link), b"new")
        assert reader.read() == (b"old" if exists else b"")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["far", "file", "link"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    files.write_output(str(pipe), b"content" * 20_000)
    reader.join(timeout=30)
    assert received == [b"content" * 20_000]
    assert pipe.is_fifo()


def test_a_full_device_is_an_error_and_stays_a_device(tmp_path):
    """A device of our own, since a mistake would replace it."""
    full = tmp_path / "full"
    try:
        os.mknod(full, stat.S_IFCHR | 0o666, os.stat("/dev/full").st_rdev)
        os.close(os.open(full, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"only root can make devices ({error})")
    with pytest.raises(OSError, match="No space left"):
        files.write_output(str(full), b"content")
    assert full.is_char_device()
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


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


def test_no_cell_of_a_table_is_a_formula():
    """Neither is a title; numbers stay, and so does the name of standard input."""
    rows = [{"=a": cell} for cell in ("=cmd|' /C calc'!A0", "@SUM(1)", "+x", "-x", "\tx", "\nx")]
    rows += [{"=a": cell} for cell in ("-0.5", -1, "-", "x=1", "a\r=x", None)]
    title, *cells = csv.reader(io.StringIO(files.rows_as_csv(rows), newline=""))
    assert title == ["'=a"]
    plain = [["-0.5"], ["-1"], ["-"], ["x=1"], ["a\\r=x"], [""]]
    assert cells == [*([f"'{row['=a']}"] for row in rows[:6]), *plain]


# === Locks ===


@pytest.mark.parametrize("code", [None, errno.ENOLCK])
def test_locks_hold_also_where_the_file_system_has_none(tmp_path, code):
    """A second process is kept out; the lock of a killed one, or an empty file, is ignored."""
    (tmp_path / "lock").touch()
    refuse = f"""
import fcntl, os, sys
def flock(*arguments):
    raise OSError({code}, "no locks")
if {code}:
    fcntl.flock = flock
"""
    path = tmp_path / "lock"
    imports = "from pathlib import Path; from keras_mixer.files import locked"
    take = f"{imports}; lock = locked(Path('{path}'), timeout=0)"
    keep = f"{refuse}{take}\nlock.__enter__(); print('taken', flush=True); sys.stdin.read()"
    start = [sys.executable, "-W", "error", "-c"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    holder = subprocess.Popen([*start, keep], **pipes)
    assert holder.stdout.readline() == "taken\n"
    other = [*start, f"{refuse}{take}\nwith lock: print('taken, too')"]
    refused = subprocess.run(other, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "Timeout" in refused.stderr
    holder.kill()
    holder.communicate()
    done = subprocess.run(other, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "taken, too\n", done.stderr
