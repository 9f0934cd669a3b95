"""Tests `keras_mixer/data/csv_labels.py`: images with labels from a CSV file."""

import os
import shutil

import numpy as np
import pytest

from keras_mixer.data.csv_labels import LABEL_COLUMNS
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError

BREEDS = ("boxer", "corgi", "pug")


def write_table(path, header, rows, encoding="utf-8", delimiter=","):
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    path.write_bytes("\n".join([*lines, ""]).encode(encoding))


@pytest.fixture
def kaggle(tmp_path, write_image):
    """Kaggle's dog breeds in small: 30 labeled images in train/, 4 in test/ without labels."""
    folder = tmp_path / "dogs"
    rows = [(f"{index:03x}f", BREEDS[index % 3]) for index in range(30)]
    for index, (name, _) in enumerate(rows):
        write_image(folder / "train" / f"{name}.jpg", (9, 8, 3), seed=index)
    for index in range(4):
        write_image(folder / "test" / f"{index}.jpg", (9, 8, 3), seed=90 + index)
    write_table(folder / "labels.csv", ("id", "breed"), rows)
    write_table(folder / "sample_submission.csv", ("id", *BREEDS), [(0, 0.2, 0.4, 0.4)])
    return folder


def labels_by_name(dataset):
    return {
        os.path.basename(os.fsdecode(path)): dataset.class_names[label]
        for split in (dataset.train, dataset.validation, dataset.test)
        if split is not None
        for path, label in zip(split.paths, split.labels, strict=True)
    }


def test_kaggles_layout_is_read_and_split_by_class(kaggle):
    dataset = open_dataset("csv", kaggle, 0.25, split_seed=1)
    assert dataset.class_names == BREEDS
    assert labels_by_name(dataset) == {f"{i:03x}f.jpg": BREEDS[i % 3] for i in range(30)}
    for split, n in ((dataset.train, 18), (dataset.validation, 6), (dataset.test, 6)):
        assert np.bincount(split.labels).tolist() == [n // 3] * 3
        assert split.listing.sizes.tolist() == [os.stat(path).st_size for path in split.paths]
    other = open_dataset("csv", kaggle, 0.25, split_seed=2)
    assert other.test.paths.tolist() != dataset.test.paths.tolist()


def test_the_order_of_the_rows_does_not_matter(kaggle):
    before = open_dataset("csv", kaggle).identity
    header, *rows = (kaggle / "labels.csv").read_text().splitlines()
    (kaggle / "labels.csv").write_text("\r\n".join([header, *reversed(rows), "", ""]))
    assert open_dataset("csv", kaggle).identity == before
    rows[0] = rows[0].replace("boxer", "pug")
    (kaggle / "labels.csv").write_text("\n".join([header, *rows]))
    assert open_dataset("csv", kaggle).identity != before


WAYS = {
    "another file": lambda d: (d / "labels.csv").rename(d / "train_labels.csv"),
    "utf-8 with a mark": lambda d: _rewrite(d, encoding="utf-8-sig"),
    "semicolons": lambda d: _rewrite(d, delimiter=";"),
    "tabs": lambda d: _rewrite(d, delimiter="\t"),
    "file names": lambda d: _rewrite(d, lambda id, breed: (f"{id}.jpg", breed)),
    "with the folder": lambda d: _rewrite(d, lambda id, breed: (f"./train/{id}", breed)),
    "from Windows": lambda d: _rewrite(d, lambda id, breed: (f"train\\{id}.jpg", breed)),
    "beside the table": lambda d: [p.rename(d / p.name) for p in (d / "train").iterdir()],
    "in images": lambda d: (d / "train").rename(d / "Images"),
    "capital suffix": lambda d: [p.rename(p.with_suffix(".JPG")) for p in d.glob("train/*")],
    "quoted": lambda d: _rewrite(d, lambda id, breed: (f'"{id}"', f' "{breed}" '.strip())),
    "more columns": lambda d: _rewrite(
        d, lambda id, breed: (id, "x", breed, "y", "more"), ("id", "age", "Breed", "note", "more")
    ),
}


def _rewrite(folder, change=lambda *row: row, header=("id", "breed"), **options):
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    write_table(folder / "labels.csv", header, [change(*row) for row in rows], **options)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_tables_may_be_written_in_many_ways(kaggle, way):
    expected = labels_by_name(open_dataset("csv", kaggle))
    way(kaggle)
    labels = None if (kaggle / "labels.csv").exists() else str(kaggle / "train_labels.csv")
    found = labels_by_name(open_dataset("csv", kaggle, labels=labels))
    assert {name.lower(): label for name, label in found.items()} == expected


@pytest.mark.parametrize("name", [*LABEL_COLUMNS, "Breed", "anything, where there are two"])
def test_the_column_of_labels_is_found_by_its_name(kaggle, name):
    header = ("image", name) if "," in name else ("image", "other", name)
    row = lambda id, breed: (id, breed) if "," in name else (id, "x", breed)  # noqa: E731
    _rewrite(kaggle, row, [f'"{cell}"' for cell in header])
    assert open_dataset("csv", kaggle).class_names == BREEDS


def test_a_column_of_splits_is_used(kaggle):
    splits = {0: "train", 1: "val", 2: "Test"}
    row = lambda id, breed: (id, splits[int(id[:3], 16) // 3 % 3], breed)  # noqa: E731
    _rewrite(kaggle, row, ("id", "split", "anything"))
    dataset = open_dataset("csv", kaggle, 0.5)
    rows = [line.split(",") for line in (kaggle / "labels.csv").read_text().splitlines()[1:]]
    for name, written in (("train", "train"), ("validation", "val"), ("test", "Test")):
        names = [os.path.basename(p)[:-4].decode() for p in dataset.split(name).paths]
        assert names == [id for id, split, _ in rows if split == written]
        assert len(names) >= 9


def test_an_image_is_looked_for_in_the_folder_of_its_split(kaggle, write_image):
    """Where train/ and test/ have the same names."""
    for name in range(4):
        write_image(kaggle / "train" / f"{name}.jpg", (7, 7, 3))
    rows = [(n, s, BREEDS[n % 2]) for n in range(4) for s in ("train", "test")]
    write_table(kaggle / "labels.csv", ("id", "split", "breed"), rows)
    dataset = open_dataset("csv", kaggle, 0.0)
    assert [len(dataset.train), dataset.validation, len(dataset.test)] == [4, None, 4]
    assert all(b"/train/" in path for path in dataset.train.paths)
    assert all(b"/test/" in path for path in dataset.test.paths)


ROW = "000f,boxer\n001f,corgi\n"
FAULTS = {
    "no file": (None, r"labels\.csv: no such file; .*dogs holds sample_submission\.csv"),
    "empty": ("", r"received the columns \(none\)"),
    "header alone": ("id,breed\n", "expected rows below the header"),
    "one column": ("id\n000f\n", "received the columns id"),
    "unknown columns": ("id,size,age\n000f,1,2\n", "received the columns id, size, age"),
    "labels first": ("breed,id\nboxer,000f\n", "a column of images first"),
    "labels first, after a mark": ("\ufeffbreed,id\nboxer,000f\n", "a column of images first"),
    "no header": (ROW + "002f,pug\n", "its first line is 000f,boxer; expected a header"),
    "no header, file names": ("gone.jpg,boxer\n" + ROW, r"its first line is gone\.jpg,boxer"),
    "missing": ("id,breed\nfff,pug\n" + ROW + "eee,pug\n", r"2 rows without an image in .*: "
                r"fff \(line 2\), eee \(line 5\)"),
    "twice": ("id,breed\n" + ROW + "\n000f.jpg,corgi\n", r"2 rows that share an image: "
              r"000f \(line 2\), 000f\.jpg \(line 5\)"),
    "no label": ("id,breed\n" + ROW + "002f\n003f, \n", r"2 rows without a label: 002f \(line 4\), "
                 r"003f \(line 5\)"),
    "no image": ("id,breed\n,pug\n" + ROW, r"1 row without an image:  \(line 2\)"),
    "one class": ("id,breed\n000f,pug\n001f,pug\n", "expected at least 2 classes, .* pug"),
    "too few": ("id,breed\n" + ROW, "--test_fraction=0.2: fewer than 2 images .*: boxer, corgi"),
    "dots": ("id,breed\n../train/000f,pug\n", r"1 row with an image outside of --data_dir: \.\."),
    "absolute": ("id,breed\n/etc/x,pug\n", "outside of --data_dir: /etc/x"),
    "drive": ("id,breed\nC:\\x.jpg,pug\n", "outside of --data_dir: C:"),
    "split": ("id,split,breed\n000f,more,pug\n001f,,pug\n002f,test,pug\n", r"2 rows whose split is "
              r"none of train, validation, test: 000f \(line 2\), 001f \(line 3\)"),
    "untrained": ("id,split,breed\n000f,train,pug\n001f,test,corgi\n",
                  "no training image of 1 of 2 classes: corgi"),
    "no training": ("id,split,breed\n000f,test,pug\n001f,test,corgi\n", "image of 2 of 2 classes"),
    "more cells": ("id,breed\n000f,boxer, brown\n" + ROW, r"line 2 has 3 cells, the header 2; "
                   "expected quotes"),
    "columns twice": ("id,breed,Breed\n000f,pug,boxer\n", "the header has several columns breed"),
    "line break": ('id,breed\n000f,"boxer\n001f,corgi\n002f",pug\n'.replace('",pug', '"'),
                   "a cell that ends in line 4 has a line break"),
    "NUL": ("id,breed\n000f,bo\0xer\n001f,pug\n", "line 2 has a line break or another control"),
    "quote": ('id,breed\n000f,"pug\n', "not a CSV file"),
    "huge cell": ("id,breed\n000f," + "x" * 200_000, "not a CSV file"),
    "another encoding": ("id,breed\n000f,Löwchen\n".encode("latin-1"), "not a text file in UTF-8"),
    "UTF-16": ("id,breed\n000f,pug\n".encode("utf-16"), "not a text file in UTF-8"),
    "a spreadsheet": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00\xff\xfe", "not a text file in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", FAULTS.values(), ids=FAULTS.keys())
def test_faulty_tables_are_one_line(kaggle, content, message):
    path = kaggle / "labels.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        open_dataset("csv", kaggle)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--")


def test_many_faults_are_counted(kaggle):
    rows = [(f"gone{index:02}", "pug") for index in range(30)]
    write_table(kaggle / "labels.csv", ("id", "breed"), [("000f", "boxer"), *rows])
    with pytest.raises(InputError, match=r"30 rows.*gone19 \(line 22\) and 10 more$") as error:
        open_dataset("csv", kaggle)
    assert "gone20" not in str(error.value)


def test_a_name_that_fits_two_suffixes_is_refused(kaggle, write_image):
    write_image(kaggle / "train" / "000f.png", (9, 9, 3))
    with pytest.raises(InputError, match=r"with several images; give the suffix: 000f \(line 2\)"):
        open_dataset("csv", kaggle)
    _rewrite(kaggle, lambda id, breed: (f"{id}.jpg", breed))
    assert len(open_dataset("csv", kaggle).class_names) == 3


def test_only_labeled_images_must_be_readable(kaggle):
    (kaggle / "test" / "0.jpg").write_bytes(b"broken")
    open_dataset("csv", kaggle)
    (kaggle / "train" / "000f.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1 unreadable image.*000f\.jpg"):
        open_dataset("csv", kaggle)


def test_a_folder_without_images_is_refused(kaggle):
    for name in ("train", "test"):
        shutil.rmtree(kaggle / name)
    with pytest.raises(InputError, match="30 rows without an image"):
        open_dataset("csv", kaggle)


@pytest.mark.parametrize(
    "dataset, labels, message",
    [
        (
            "folder",
            "labels.csv",
            "is for --dataset=csv and would change nothing with --dataset=folder",
        ),
        ("csv", "nowhere.csv", "--labels=nowhere.csv: no such file"),
        ("csv", os.sep, "no such file"),
        ("csv", "x" * 5000, "no such file|name too long"),
    ],
)
def test_labels_are_checked(kaggle, dataset, labels, message):
    with pytest.raises(InputError, match=message):
        open_dataset(dataset, kaggle, labels=labels)
