"""Tests `keras_mixer/data/listing.py` and `verdicts.py`: large folders, and what is remembered."""

import os
import shutil
import subprocess
import sys

import index_many
import numpy as np
import pytest
from conftest import ROOT

from keras_mixer.preprocessing import resize
from keras_mixer.data import image_checks
from keras_mixer.data.image_listing import MISSING, SEVERAL, find_images, list_images
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.files import cache_folder

# === Listing ===


def test_listing_is_what_a_walk_finds(folder, tmp_path):
    (folder / "ant" / "deep" / "er").mkdir(parents=True)
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "deep" / "er" / "Ü 1.JPEG")
    (folder / "ant" / ".hidden").mkdir()
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / ".hidden" / "0.png")
    (folder / "ant" / "circle.png").symlink_to(folder)
    (folder / "bee" / "link.png").symlink_to(folder / "ant" / "0.png")
    listing, places = list_images(folder)
    expected = sorted(
        os.fsencode(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in (".png", ".jpg", ".jpeg") and path.is_file()
        if ".hidden" not in path.parts and "circle.png" not in path.parts
    )
    assert len(expected) == 38
    assert listing.names.tolist() == expected
    assert not places.any()
    for path, size, mtime in zip(listing.paths(), listing.sizes, listing.mtimes, strict=True):
        assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (size, mtime)


def test_listing_says_where_each_file_was_found(folder):
    listing, places = list_images(folder, ["cat", "ant"])
    tops = [name.split(b"/")[0] for name in listing.names.tolist()]
    assert tops == [b"cat"] * 12 + [b"ant"] * 12
    assert places.tolist() == [0] * 12 + [1] * 12


def test_an_empty_folder_is_an_empty_listing(tmp_path):
    listing, places = list_images(tmp_path)
    assert len(listing) == len(places) == len(listing.paths()) == 0


def test_classes_that_differ_in_case_only_stay_apart(folder):
    shutil.copytree(folder / "ant", folder / "Ant")
    assert open_dataset("folder", folder).class_names == ("Ant", "ant", "bee", "cat")


def test_files_are_found_with_and_without_suffix_and_folder():
    names = np.array(sorted([b"a.jpg", b"train/a.png", b"train/b.c.jpg", b"x.jpg", b"x.png"]))
    wanted = np.array([b"a", b"a.png", b"b.c", b"b.c.jpg", b"x", b"x.png", b"b", b"train/a", b"zz"])
    found = find_images(names, wanted, ["", "train"])
    expected = [b"a.jpg", b"train/a.png", b"train/b.c.jpg", b"train/b.c.jpg", SEVERAL, b"x.png",
                MISSING, b"train/a.png", MISSING]  # fmt: skip
    assert [names[i] if i >= 0 else i for i in found] == expected
    assert find_images(names[:0], wanted).tolist() == [MISSING] * len(wanted)


# === What is remembered ===


@pytest.fixture
def checked(monkeypatch):
    """The names of the files that were checked, as they are checked."""
    names = []

    def check(path, check_image_file=images.check_image_file):
        names.append(os.path.basename(os.fsdecode(path)))
        return check_image_file(path)

    monkeypatch.setattr(images, "check_image_file", check)
    return names


OPENED = """
import os, sys
from keras_mixer.data.sources import open_dataset

def note(event, arguments):
    if event == "open" and os.fsdecode(os.fspath(arguments[0])).startswith(sys.argv[1] + "/"):
        opened.append(arguments[0])

opened = []
sys.addaudithook(note)
print(open_dataset("folder", sys.argv[1]).identity, len(opened))
"""


def test_the_second_start_opens_no_image(folder):
    runs = [
        subprocess.run(
            [sys.executable, "-c", OPENED, str(folder)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert [int(opened) for _, opened in runs] == [36, 0]
    assert runs[0][0] == runs[1][0]


def test_only_new_and_changed_images_are_checked_again(folder, checked, write_image):
    open_dataset("folder", folder)
    assert len(checked) == 36
    checked.clear()
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "new.png")
    (folder / "bee" / "1.jpg").unlink()
    write_image(folder / "bee" / "2.png", (40, 41, 3))
    os.utime(folder / "cat" / "3.jpg", ns=(1, 1))
    open_dataset("folder", folder)
    assert sorted(checked) == ["2.png", "3.jpg", "new.png"]
    checked.clear()
    open_dataset("folder", folder)
    assert checked == []


@pytest.mark.parametrize("same", ["size", "mtime_ns"])
def test_an_image_that_broke_since_is_found(folder, same):
    """Where its size or its time of change alone tells."""
    open_dataset("folder", folder)
    path = folder / "ant" / "0.png"
    before = path.stat()
    path.write_bytes(b"x" * (before.st_size + (same != "size")))
    os.utime(path, ns=(0, before.st_mtime_ns + (same != "mtime_ns")))
    assert getattr(path.stat(), f"st_{same}") == getattr(before, f"st_{same}")
    with pytest.raises(InputError, match=r"ant/0\.png \(not a JPEG"):
        open_dataset("folder", folder)


def test_broken_images_are_never_remembered_as_sound(folder, checked):
    (folder / "ant" / "broken.png").write_bytes(b"x")
    for expected in (37, 1):
        with pytest.raises(InputError, match="broken.png"):
            open_dataset("folder", folder)
        assert len(checked) == expected
        checked.clear()


def test_an_interrupted_check_goes_on_where_it_stopped(folder, checked, monkeypatch):
    def interrupt(path, check=images.check_image_file):
        if len(checked) == 20:
            raise KeyboardInterrupt
        return check(path)

    with monkeypatch.context() as patch:
        patch.setattr(images, "check_image_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_dataset("folder", folder)
    assert len(checked) == 20
    open_dataset("folder", folder)
    assert len(checked) == 36


def test_other_checks_make_nothing_known(folder, checked, monkeypatch):
    open_dataset("folder", folder)
    monkeypatch.setattr(verdicts.PIL, "__version__", "another")
    open_dataset("folder", folder)
    assert len(checked) == 72


def test_a_folder_elsewhere_is_not_taken_for_this_one(folder, tmp_path, checked, monkeypatch):
    open_dataset("folder", folder)
    shutil.copytree(folder, tmp_path / "copy")
    open_dataset("folder", tmp_path / "copy")
    assert len(checked) == 72
    monkeypatch.chdir(folder)
    open_dataset("folder", ".")
    assert len(checked) == 72, "the same place, written otherwise"


DAMAGES = {
    "no archive": lambda path: path.write_bytes(b"hello"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"names", b"nemas")),
    "other columns": lambda path: np.savez(path, other=np.arange(3)),
    "objects": lambda path: np.savez(
        path, names=np.array([b"x"]), sizes=np.array([1]), mtimes=np.array([None])
    ),
    "uneven": lambda path: np.savez(
        path, names=np.array([b"x"]), sizes=np.arange(2), mtimes=np.arange(2)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_memory_is_no_memory(folder, tmp_path, checked, monkeypatch, capsys, damage):
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "mine"))
    open_dataset("folder", folder)
    (memory,) = (tmp_path / "mine").rglob("*.npz")
    damage(memory)
    open_dataset("folder", folder)
    assert len(checked) == 72
    assert capsys.readouterr().err.count("damaged, so the images are checked again") == 1
    open_dataset("folder", folder)
    assert len(checked) == 72
    assert capsys.readouterr().err == ""


def test_a_memory_that_cannot_be_kept_is_said_and_no_error(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "file"))
    assert len(open_dataset("folder", folder).train) == 25
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot remember which images are sound" in said


def test_the_memory_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_MIXER_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(cache_folder()) == "/home/somebody/.cache/keras_mixer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "keras_mixer"


def test_nothing_is_written_to_the_images(folder):
    before = sorted(folder.rglob("*"))
    open_dataset("folder", folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_memory_stays_flat_over_many_files():
    assert index_many.show(files=20_000, steps=300) <= index_many.MOST_GROWTH
