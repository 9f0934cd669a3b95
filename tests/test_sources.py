"""Tests `keras_mixer/data/sources.py`, `splits.py`, `in_memory.py` and `datasets.py`."""

import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from keras_mixer.data.datasets import DATASETS
from keras_mixer.data.readers import Reader
from keras_mixer.data.sources import READERS, open_dataset
from keras_mixer.data.splits import ArrayImages, split_stratified
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


def test_digits_are_split_once_and_for_all():
    dataset = open_dataset("digits")
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [1293, 144, 360]
    assert dataset.train.pixels.shape[1:] == (8, 8, 1)
    assert dataset.train.pixels.dtype == np.uint8
    assert dataset.train.pixels.max() == 255
    # The splits must never move, or published figures would be of other images.
    assert dataset.identity.startswith("51b593c577110ee6")


def test_splits_share_no_image_and_keep_the_shares_of_the_classes():
    dataset = open_dataset("digits")
    splits = (dataset.train, dataset.validation, dataset.test)
    one, other, another = ({image.tobytes() for image in split.pixels} for split in splits)
    assert not (one & other or one & another or other & another)
    for split in splits:
        shares = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(shares, 0.1, atol=0.012)


def test_no_validation_fraction_means_no_validation():
    dataset = open_dataset("digits", None, 0.0)
    assert dataset.validation is None
    assert len(dataset.train) == 1437
    with pytest.raises(InputError, match="no validation split; give one of train, test"):
        dataset.split("validation")


def test_another_split_seed_sets_other_images_aside():
    one, same, other = (open_dataset("digits", split_seed=seed) for seed in (1, 1, 2))
    assert one.identity == same.identity != other.identity
    assert [len(other.train), len(other.validation), len(other.test)] == [1293, 144, 360]
    assert open_dataset("digits", test_fraction=0.0).test is None


def test_rare_classes_are_on_both_sides_of_every_split():
    """Rounding would leave them on one side."""
    labels = np.repeat([0, 1, 2], [100, 2, 3])
    images = ArrayImages(np.arange(105, dtype=np.uint8).reshape(105, 1, 1, 1), labels)
    for fraction in (0.05, 0.1, 0.5, 0.9, 0.95):
        sides = split_stratified(images, fraction, 0, "--test_fraction", ("a", "b", "c"))
        for side in sides:
            assert (np.bincount(side.labels, minlength=3) > 0).all()
            np.testing.assert_array_equal(side.labels, labels[side.pixels.ravel()])
        together = np.concatenate([side.pixels.ravel() for side in sides])
        np.testing.assert_array_equal(np.sort(together), np.arange(105))


def test_classes_too_small_to_split_are_named(folder):
    for index in range(11):
        (folder / "bee" / f"{index}.{'jpg' if index % 2 else 'png'}").unlink()
    with pytest.raises(InputError, match="--test_fraction=0.2: fewer than 2 images.*: bee$"):
        open_dataset("folder", folder)


def test_an_impossible_fraction_is_named():
    with pytest.raises(InputError, match=r"--validation_fraction=0.999"):
        open_dataset("digits", None, 0.999)


def test_idx_files_are_read_exactly(idx_folder):
    dataset = open_dataset("mnist", idx_folder, 0.0)
    expected = np.random.default_rng(0).integers(0, 256, (60, 28, 28))
    np.testing.assert_array_equal(dataset.train.pixels[..., 0], expected)
    np.testing.assert_array_equal(dataset.train.labels, np.arange(60) % 10)
    assert dataset.class_names == tuple("0123456789")


def test_unpacked_idx_files_are_the_same_data(idx_folder, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    for path in idx_folder.glob("*.gz"):
        (plain / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    packed, unpacked = (open_dataset("mnist", path, 0.2) for path in (idx_folder, plain))
    assert packed.identity == unpacked.identity


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "expected the file train-images-idx3-ubyte.gz"),
        (lambda p: p.write_bytes(b"<html>not found</html>"), "cannot read.*train-images"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), "cannot read.*train-images"),
        (lambda p: p.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\0")), "not an IDX file of 3"),
        (
            lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:-7])),
            "expected 47040 values by its header, received 47033",
        ),
        (
            lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes()) + bytes(9999))),
            "expected 47040 values by its header, received more than 47040",
        ),
        (
            lambda p: p.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 1 << 17, 1000, 30))),
            "declares 3932160000 values, more than 20 times its size",
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
    with pytest.raises(InputError, match="holds 3 images and .* holds 2 labels"):
        open_dataset("mnist", idx_folder)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_idx_files_where_they_are_present(name):
    directory = ROOT.parent / "shared" / "data" / name
    if not directory.is_dir():
        pytest.skip(f"no {name} here")
    dataset = open_dataset(name, directory)
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [54000, 6000, 10000]


@pytest.mark.parametrize("row", DATASETS.values(), ids=DATASETS.keys())
def test_rows_of_the_table_make_sense(row):
    assert row.image_shape[0] % row.patch_shape[0] == row.image_shape[1] % row.patch_shape[1] == 0
    assert row.channels in (1, 3)
    assert row.origin in READERS


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


def test_a_new_kind_of_data_is_a_reader_and_two_rows(monkeypatch):
    def read_noise(request):
        count = request.options["amount"]
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
        return request.info.class_names, {"all": ArrayImages(pixels, np.arange(count) % 10)}

    monkeypatch.setitem(READERS, "noise", Reader(read_noise, "none", options=("amount",)))
    monkeypatch.setitem(DATASETS, "noise", DATASETS["digits"]._replace(origin="noise"))
    assert len(open_dataset("noise", amount=200).train) == 144
    with pytest.raises(InputError, match="--data_dir=here: --dataset=noise is embedded"):
        open_dataset("noise", "here", amount=200)
    message = "--amount=3 is for --dataset=noise and would change nothing with --dataset=digits"
    with pytest.raises(InputError, match=message):
        open_dataset("digits", amount=3)
    with pytest.raises(TypeError, match="no option amuont"):
        open_dataset("noise", amuont=3)
