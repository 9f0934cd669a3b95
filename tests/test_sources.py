"""Tests `keras_mixer/data/sources.py`."""

import gzip
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from keras_mixer.data.idx import read_digits, read_idx
from keras_mixer.data.datasets import DATASETS
from keras_mixer.data.class_folders import read_folder
from keras_mixer.data.image_listing import list_images
from keras_mixer.data.sources import READERS, open_dataset
from keras_mixer.data.splits import Split, stratified
from keras_mixer.data.csv_labels import read_csv
from keras_mixer.data.tfds import read_tfds
from keras_mixer.errors import InputError


def write_idx(folder, prefix, images, labels, compress=True):
    """Writes an image file and a label file as MNIST is published."""
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        values = np.asarray(values, np.uint8)
        header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
        opened = gzip.open if compress else open
        name = f"{prefix}-{kind}-ubyte" + (".gz" if compress else "")
        with opened(folder / name, "wb") as file:
            file.write(header + values.tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    generator = np.random.default_rng(0)
    for prefix, n in (("train", 60), ("t10k", 20)):  # six and two of each class
        images = generator.integers(0, 256, (n, 28, 28))
        write_idx(tmp_path, prefix, images, np.arange(n) % 10)
    return tmp_path


# === Digits ===


def test_digits_are_split_once_and_for_all():
    source = open_dataset("digits")
    assert [len(source.train), len(source.validation), len(source.test)] == [1293, 144, 360]
    assert source.train.images.shape[1:] == (8, 8, 1)
    assert source.train.images.dtype == np.uint8
    assert source.train.images.max() == 255
    # The splits must never move, or published figures would be of other images.
    assert source.identity.startswith("51b593c577110ee6")


def test_splits_share_no_image_and_keep_the_shares_of_the_classes():
    source = open_dataset("digits")
    keys = [{i.tobytes() for i in s.images} for s in (source.train, source.validation, source.test)]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    for split in (source.train, source.validation, source.test):
        shares = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(shares, 0.1, atol=0.012)


def test_no_validation_fraction_means_no_validation():
    source = open_dataset("digits", None, 0.0)
    assert source.validation is None
    assert len(source.train) == 1437
    with pytest.raises(InputError, match="no validation split; give one of train, test"):
        source.split("validation")


def test_classes_too_small_to_split_are_named(folder):
    for index in range(11):
        (folder / "bee" / f"{index}.{'jpg' if index % 2 else 'png'}").unlink()
    with pytest.raises(InputError, match="--test_fraction=0.2: fewer than 2 images.*: bee$"):
        open_dataset("folder", folder)


def test_impossible_fraction_is_named():
    with pytest.raises(InputError, match=r"--validation_fraction=0.999"):
        open_dataset("digits", None, 0.999)


# === IDX ===


def test_idx_files_are_read_exactly(idx_folder):
    source = open_dataset("mnist", idx_folder, 0.0)
    expected = np.random.default_rng(0).integers(0, 256, (60, 28, 28))
    np.testing.assert_array_equal(source.train.images[..., 0], expected)
    np.testing.assert_array_equal(source.train.labels, np.arange(60) % 10)
    assert source.class_names == tuple("0123456789")


def test_unpacked_idx_files_are_the_same_data(idx_folder, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    for path in idx_folder.glob("*.gz"):
        (plain / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert (
        open_dataset("mnist", plain, 0.2).identity == open_dataset("mnist", idx_folder, 0.2).identity
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "expected the file train-images-idx3-ubyte.gz"),
        (lambda p: p.write_bytes(b"<html>not found</html>"), "cannot read.*train-images"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), "cannot read.*train-images"),
        (lambda p: p.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\0")), "not an IDX file of 3"),
        (
            lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:-7])),
            "announces 47040 values, the file holds 47033",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes()[:40] + b"\xff" * 40 + p.read_bytes()[80:]),
            "cannot read|damaged",
        ),
    ],
)
def test_damaged_idx_files_are_named(idx_folder, damage, message):
    damage(idx_folder / "train-images-idx3-ubyte.gz")
    with pytest.raises(InputError, match=message):
        open_dataset("mnist", idx_folder)


def test_idx_labels_must_fit(idx_folder):
    write_idx(idx_folder, "train", np.zeros((3, 28, 28)), [0, 1, 10])
    with pytest.raises(InputError, match="holds the label 10"):
        open_dataset("mnist", idx_folder)
    write_idx(idx_folder, "train", np.zeros((3, 28, 28)), [0, 1])
    with pytest.raises(InputError, match="holds 3 images, but .* holds 2 labels"):
        open_dataset("mnist", idx_folder)


# === Folders ===


def test_class_folders_are_split_stratified(folder):
    source = open_dataset("folder", folder, 0.1)
    assert source.class_names == ("ant", "bee", "cat")
    assert [len(source.train), len(source.validation), len(source.test)] == [25, 3, 8]
    everything = [*source.train.images, *source.validation.images, *source.test.images]
    assert sorted(everything) == sorted(list_images(folder)[0].paths())
    for split in (source.train, source.validation, source.test):
        for path, label in zip(split.images, split.labels, strict=True):
            assert f"/{source.class_names[label]}/" in os.fsdecode(path)


def test_folders_for_train_val_and_test_are_used(folder, tmp_path):
    root = tmp_path / "split"
    for split in ("train", "val", "test"):
        shutil.copytree(folder, root / split)
    (root / "test" / "cat" / "0.png").unlink()
    source = open_dataset("folder", root)
    assert [len(source.train), len(source.validation), len(source.test)] == [36, 36, 35]


def test_train_folder_alone_has_no_test_split(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "train")
    source = open_dataset("folder", tmp_path / "split")
    assert source.test is None
    assert len(source.train) + len(source.validation) == 36


def test_hidden_and_other_files_are_left_alone(folder):
    before = open_dataset("folder", folder).identity
    (folder / "ant" / ".DS_Store").write_bytes(b"x")
    (folder / "ant" / "._0.png").write_bytes(b"x")
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / ".cache").mkdir()
    assert open_dataset("folder", folder).identity == before


def test_identity_follows_content_and_not_the_place(folder, tmp_path, write_image):
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
        (lambda f: [shutil.rmtree(f / n) for n in ("ant", "bee")], "holds 1 class folders"),
        (lambda f: (f / "dog").mkdir(), "class folder .*dog holds no image"),
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


def test_splits_must_have_the_same_classes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "train")
    shutil.copytree(folder, tmp_path / "split" / "val")
    shutil.rmtree(tmp_path / "split" / "val" / "bee")
    with pytest.raises(InputError, match="differ in their class folders: bee"):
        open_dataset("folder", tmp_path / "split")


@pytest.mark.parametrize("place", ["Training", "TRAIN", "train"])
def test_split_folders_may_be_written_in_capitals(folder, tmp_path, place):
    shutil.copytree(folder, tmp_path / "split" / place)
    shutil.copytree(folder, tmp_path / "split" / "Testing")
    source = open_dataset("folder", tmp_path / "split")
    assert source.class_names == ("ant", "bee", "cat")
    assert len(source.test) == 36


def test_a_test_folder_without_a_train_folder_is_no_class(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "test")
    with pytest.raises(InputError, match="holds test but no train folder"):
        open_dataset("folder", tmp_path / "split")


# === The table ===


@pytest.mark.parametrize("row", DATASETS.values(), ids=DATASETS.keys())
def test_rows_of_the_table_make_sense(row):
    assert row.image_shape[0] % row.patch_shape[0] == row.image_shape[1] % row.patch_shape[1] == 0
    assert row.channels in (1, 3)
    assert row.origin in READERS


def test_origins_have_their_readers():
    readers = {"embedded": read_digits, "idx": read_idx, "folder": read_folder, "csv": read_csv}
    assert {**readers, "tfds": read_tfds} == READERS


def test_another_split_seed_sets_other_images_aside():
    one, same, other = (open_dataset("digits", split_seed=seed) for seed in (1, 1, 2))
    assert one.identity == same.identity != other.identity
    assert [len(other.train), len(other.validation), len(other.test)] == [1293, 144, 360]
    assert open_dataset("digits", test_fraction=0.0).test is None


# === Directories ===


@pytest.mark.parametrize(
    "dataset, data_dir, message",
    [
        ("digits", "here", "is embedded and reads no files.*--dataset=folder"),
        ("folder", None, "--dataset=folder needs --data_dir"),
        ("folder", "nowhere", "--data_dir=nowhere: no such folder"),
        ("folder", __file__, "not a folder"),
    ],
)
def test_data_dir_is_checked(dataset, data_dir, message):
    with pytest.raises(InputError, match=message):
        open_dataset(dataset, data_dir)


def test_reading_data_needs_no_tensorflow(folder):
    code = (
        "import sys; from keras_mixer.data.sources import open_dataset; open_dataset('digits'); "
        f"open_dataset('folder', {str(folder)!r}); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_idx_files_where_they_are_present(name):
    directory = ROOT.parent / "shared" / "data" / name
    if not directory.is_dir():
        pytest.skip(f"no {name} here")
    source = open_dataset(name, directory)
    assert [len(source.train), len(source.validation), len(source.test)] == [54000, 6000, 10000]


def test_rare_classes_are_on_both_sides_of_every_split():
    """Rounding would leave them on one side."""
    labels = np.repeat([0, 1, 2], [100, 2, 3])
    split = Split(np.arange(105, dtype=np.uint8).reshape(105, 1, 1, 1), labels)
    for fraction in (0.05, 0.1, 0.5, 0.9, 0.95):
        sides = split_stratified(split, fraction, 0, "--test_fraction", ("a", "b", "c"))
        for side in sides:
            assert (np.bincount(side.labels, minlength=3) > 0).all()
            np.testing.assert_array_equal(side.labels, labels[side.images.ravel()])
        together = np.concatenate([side.images.ravel() for side in sides])
        np.testing.assert_array_equal(np.sort(together), np.arange(105))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only there")
def test_class_folders_must_be_text(folder):
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"not UTF-8, rename them: 'caf\\udce9'"):
        open_dataset("folder", folder)
