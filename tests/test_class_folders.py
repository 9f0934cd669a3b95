"""Tests `keras_mixer/data/class_folders.py` and `image_listing.py`."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from keras_mixer.data.image_listing import MISSING, SEVERAL, find_images, list_images
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError


def test_listing_is_what_a_walk_finds(folder):
    (folder / "ant" / "deep" / "er").mkdir(parents=True)
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "deep" / "er" / "Ü 1.JPEG")
    (folder / "ant" / ".hidden").mkdir()
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / ".hidden" / "0.png")
    (folder / "bee" / "link.png").symlink_to(folder / "ant" / "0.png")
    listing, found_in = list_images(folder)
    expected = sorted(
        os.fsencode(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        and path.is_file()
        and ".hidden" not in path.parts
    )
    assert len(expected) == 38
    assert listing.names.tolist() == expected
    assert not found_in.any()
    for path, size, mtime in zip(listing.paths(), listing.sizes, listing.mtimes, strict=True):
        assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (size, mtime)


def test_images_of_other_formats_are_left_out_with_a_warning(folder, capsys):
    for name in ("ant/scan.TIFF", "bee/phone.heic", "bee/notes.txt"):
        (folder / name).touch()
    listing, _ = list_images(folder)
    assert len(listing) == 36
    said = capsys.readouterr().err
    assert said.startswith(f"{folder}: 2 images left out (.heic, .tiff); expected .jpg, .jpeg, .pn")


def test_a_link_to_itself_is_named_and_nothing_else_is_lost(folder):
    for name in ("ring", "ant/ring.png", "ant/ring", "ant/ring.heic"):
        (folder / name).symlink_to(folder / name)
    assert len(list_images(folder)[0]) == 37
    message = f"1 unreadable image, .*: {folder}/ant/ring.png \\(not a regular file\\)"
    with pytest.raises(InputError, match=message):
        open_dataset("folder", folder)
    (folder / "ant" / "ring.png").unlink()
    assert len(open_dataset("folder", folder).class_names) == 3


def test_thousands_of_folders_within_each_other_are_listed(folder, monkeypatch):
    monkeypatch.chdir(folder / "ant")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    shutil.copy(folder / "ant" / "0.png", "deep.png")
    os.chdir(folder)
    names = list_images("ant")[0].names.tolist()
    assert names[-1] == b"d/" * 1200 + b"deep.png"
    subprocess.run(["rm", "-r", folder / "ant" / "d"], check=True)  # shutil recurses


def test_listing_numbers_the_folder_of_each_file(folder):
    listing, found_in = list_images(folder, ["cat", "ant"])
    tops = [name.split(b"/")[0] for name in listing.names.tolist()]
    assert tops == [b"cat"] * 12 + [b"ant"] * 12
    assert found_in.tolist() == [0] * 12 + [1] * 12


def test_an_empty_folder_is_an_empty_listing(tmp_path):
    listing, found_in = list_images(tmp_path)
    assert len(listing) == len(found_in) == len(listing.paths()) == 0


def test_files_are_found_with_and_without_suffix_and_folder():
    names = np.array(sorted([b"a.jpg", b"train/a.png", b"train/b.c.jpg", b"x.jpg", b"x.png"]))
    wanted = np.array([b"a", b"a.png", b"b.c", b"b.c.jpg", b"x", b"x.png", b"b", b"train/a", b"zz"])
    found = find_images(names, wanted, ["", "train"])
    expected = [b"a.jpg", b"train/a.png", b"train/b.c.jpg", b"train/b.c.jpg", SEVERAL, b"x.png",
                MISSING, b"train/a.png", MISSING]  # fmt: skip
    assert [names[i] if i >= 0 else i for i in found] == expected
    assert find_images(names[:0], wanted).tolist() == [MISSING] * len(wanted)


def test_class_folders_are_split_stratified(folder):
    dataset = open_dataset("folder", folder, 0.1)
    assert dataset.class_names == ("ant", "bee", "cat")
    splits = (dataset.train, dataset.validation, dataset.test)
    assert list(map(len, splits)) == [25, 3, 8]
    paths = np.concatenate([split.paths for split in splits])
    assert sorted(paths) == sorted(list_images(folder)[0].paths())
    for path, label in zip(paths, np.concatenate([s.labels for s in splits]), strict=True):
        assert f"/{dataset.class_names[label]}/" in os.fsdecode(path)


def test_folders_for_train_val_and_test_are_used(folder, tmp_path):
    root = tmp_path / "split"
    for split in ("train", "val", "test"):
        shutil.copytree(folder, root / split)
    (root / "test" / "cat" / "0.png").unlink()
    dataset = open_dataset("folder", root)
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [36, 36, 35]


def test_train_folder_alone_has_no_test_split(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "train")
    dataset = open_dataset("folder", tmp_path / "split")
    assert dataset.test is None
    assert len(dataset.train) + len(dataset.validation) == 36


def test_hidden_and_other_files_are_left_alone(folder):
    before = open_dataset("folder", folder).identity
    (folder / "ant" / ".DS_Store").write_bytes(b"x")
    (folder / "ant" / "._0.png").write_bytes(b"x")
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / ".cache").mkdir()
    assert open_dataset("folder", folder).identity == before


def test_identity_follows_the_files_and_not_their_folder(folder, tmp_path, write_image):
    before = open_dataset("folder", folder).identity
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert open_dataset("folder", moved).identity == before
    write_image(moved / "ant" / "0.png", (30, 31, 3))
    assert open_dataset("folder", moved).identity != before
    (folder / "cat").rename(folder / "dog")
    assert open_dataset("folder", folder).identity != before


@pytest.mark.parametrize(
    "arrange, message",
    [
        (lambda f: [shutil.rmtree(f / n) for n in ("ant", "bee", "cat")], "holds 0 class folders"),
        (
            lambda f: [shutil.rmtree(f / n) for n in ("ant", "bee")],
            r"holds 1 class folder: cat/ \(12 images\);",
        ),
        (lambda f: (f / "dog").mkdir(), "class folder .*dog has no images"),
        (lambda f: (f / "ant" / "0.png").write_bytes(b""), r"0\.png \(empty file\)"),
        (lambda f: (f / "ant" / "x.jpg").write_text("hello"), r"x\.jpg \(not a JPEG, PNG, BMP"),
        (lambda f: os.mkfifo(f / "ant" / "pipe.jpg"), r"pipe\.jpg \(not a regular file\)"),
    ],
)
def test_faulty_folders_are_named(folder, arrange, message):
    arrange(folder)
    with pytest.raises(InputError, match=message):
        open_dataset("folder", folder)


def test_many_unreadable_images_are_counted(folder):
    for index in range(30):
        (folder / "bee" / f"broken{index:02}.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="30 unreadable images.*broken19.* and 10 more") as error:
        open_dataset("folder", folder)
    assert "broken20" not in str(error.value)


def test_a_class_that_training_lacks_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "train")
    shutil.copytree(folder, tmp_path / "split" / "val")
    shutil.rmtree(tmp_path / "split" / "train" / "bee")
    with pytest.raises(InputError, match="val has class folders that .*train has not: bee;"):
        open_dataset("folder", tmp_path / "split")


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda f: [p.unlink() for p in f.iterdir()]])
def test_a_class_that_test_lacks_is_accepted_with_a_warning(folder, tmp_path, remove, capsys):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "split" / split)
    remove(tmp_path / "split" / "test" / "bee")
    dataset = open_dataset("folder", tmp_path / "split", 0)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert np.bincount(dataset.test.labels).tolist() == [12, 0, 12]
    assert (
        f"{tmp_path}/split/test: no images of bee; they are not scored\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("flat", ["test", "test/test", "test/unknown"])
def test_a_test_folder_without_classes_is_left_aside(folder, tmp_path, flat, capsys):
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    alone = open_dataset("folder", root).identity
    capsys.readouterr()
    shutil.copytree(folder / "ant", root / flat)
    assert open_dataset("folder", root).identity == alone
    where = root / ("test/test" if flat == "test/test" else "test")
    hint = f"no class folders; to classify its images: keras-mixer predict RUN {where}\n"
    assert capsys.readouterr().err == (
        f"left aside: {where}, {hint}36 photos: 32 train, 4 validation; 3 classes\n"
    )


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("seg_train/seg_train", None, "seg_test/seg_test"),
        ("training_set/training_set", None, "Test Set"),
        ("train", "dev", "test"),
        ("training/train", "val-set", "testing"),
    ],
)
def test_splits_are_known_by_many_names(folder, tmp_path, train, validation, test):
    for name in filter(None, (train, validation, test)):
        shutil.copytree(folder, tmp_path / "split" / name)
    dataset = open_dataset("folder", tmp_path / "split", 0)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert {os.fsdecode(name).rsplit("/", 2)[0] for name in dataset.train.listing.names} == {train}
    assert (len(dataset.train), len(dataset.test)) == (36, 36)
    assert (dataset.validation is None) == (validation is None)


@pytest.mark.parametrize(
    "beside, tree",
    [
        ("ant", r"ant/ \(12 images\), train/ \(ant/, bee/, cat/\); to read train as splits"),
        (
            "training",
            r"train/ \(ant/, bee/, cat/\), training/ \(12 images\); to read train, training as",
        ),
    ],
)
def test_classes_and_splits_side_by_side_are_refused(folder, tmp_path, beside, tree):
    shutil.copytree(folder, tmp_path / "split" / "train")
    shutil.copytree(folder / "ant", tmp_path / "split" / beside)
    with pytest.raises(InputError, match=f"{tree}.* into a new {tmp_path}/split/train"):
        open_dataset("folder", tmp_path / "split")


def test_a_class_called_train_is_one_below_a_train_folder(folder, tmp_path):
    (folder / "ant").rename(folder / "train")
    with pytest.raises(
        InputError, match=r"bee/ \(12 images\), .*train/ \(12 images\); to read train as"
    ):
        open_dataset("folder", folder)
    shutil.copytree(folder, tmp_path / "split" / "train")
    assert open_dataset("folder", tmp_path / "split").class_names == ("bee", "cat", "train")


def test_what_is_left_aside_is_said(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "split" / "train")
    (tmp_path / "split" / "xml").mkdir()
    shutil.copytree(folder / "ant", tmp_path / "split" / "seg_pred" / "seg_pred")
    shutil.copy(folder / "ant" / "0.png", tmp_path / "split" / "train" / "loose.png")
    open_dataset("folder", tmp_path / "split")
    root = tmp_path / "split"
    assert capsys.readouterr().err.splitlines() == [
        f"left aside: {root}/seg_pred, no class folders; to classify its images: "
        f"keras-mixer predict RUN {root}/seg_pred",
        f"left aside: {root}/xml, no images",
        f"left aside: 1 images in {root}/train, outside of its folders",
        "36 photos: 32 train, 4 validation; 3 classes",
    ]


@pytest.mark.parametrize("litter", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", ".thumbnails"])
def test_folders_of_systems_are_no_data(folder, litter):
    before = open_dataset("folder", folder).identity
    shutil.copytree(folder / "ant", folder / litter)
    shutil.copytree(folder / "ant", folder / "ant" / litter)
    assert open_dataset("folder", folder).identity == before


def test_linked_folders_are_followed_and_loops_refused(folder, tmp_path):
    shutil.copytree(folder / "ant", tmp_path / "more" / "ants")
    (folder / "ant" / "more").symlink_to(tmp_path / "more")
    assert len(list_images(folder)[0]) == 48
    assert len(open_dataset("folder", folder, 0, test_fraction=0).train) == 48
    back = tmp_path / "more" / "ants" / "back"
    back.symlink_to(folder / "ant")  # a loop of two links
    with pytest.raises(InputError, match=r"ant/more/ants/back: a link to .*/ant/, a folder that"):
        list_images(folder)


@pytest.mark.parametrize("name", ["Training", "TRAIN", "train"])
def test_split_folders_may_be_written_in_capitals(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "split" / name)
    shutil.copytree(folder, tmp_path / "split" / "Testing")
    dataset = open_dataset("folder", tmp_path / "split")
    assert dataset.class_names == ("ant", "bee", "cat")
    assert len(dataset.test) == 36


def test_a_test_folder_needs_a_train_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "test")
    with pytest.raises(InputError, match="keep one train folder"):
        open_dataset("folder", tmp_path / "split")


def test_classes_may_differ_in_case_only(folder):
    shutil.copytree(folder / "ant", folder / "Ant")
    assert open_dataset("folder", folder).class_names == ("Ant", "ant", "bee", "cat")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only there")
def test_class_folders_must_be_text(folder):
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"not UTF-8, rename them: 'caf\\udce9'"):
        open_dataset("folder", folder)


@pytest.mark.slow
def test_memory_stays_flat_over_many_files():
    subprocess.run([sys.executable, ROOT / "tools" / "index_many.py", "--files=20000"], check=True)
