"""Reads datasets of image files with labels in a CSV file, as in Kaggle competitions."""

import csv
import os
import re
import sys
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mixer.data.class_folders import SPLIT_FOLDERS, SPLIT_OF, refuse_unreadable, subfolders
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.image_listing import (
    MISSING,
    SEVERAL,
    find_images,
    has_image_suffix,
    list_images,
)
from keras_mixer.data.readers import Reader
from keras_mixer.data.splits import FileImages
from keras_mixer.errors import InputError, join_names, path_errors

LABEL_COLUMNS = ("label", "labels", "class", "class_name", "breed", "species", "category", "target")
SPLIT_COLUMN = "split"
IMAGE_FOLDERS = (*SPLIT_FOLDERS["train"], "images", "image", "imgs", "img", "train_images")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class _Table(NamedTuple):
    """A label file by columns; `lines` has the line number of each row, `splits` may be None."""

    file: Path
    header: list[str]
    lines: array
    images: list[str]
    labels: list[str]
    splits: list[str] | None


def _read_csv(request):
    """Reads images and labels by a CSV file: its first column names images, another has labels.

    Names may lack the suffix, and the folder if it is one of `IMAGE_FOLDERS` or that of the
    image's split. An optional column `split` gives each image's split.

    Raises:
        InputError: If the file is not such a table, or images are missing or unreadable.
    """
    directory = request.directory
    table = _read_table(_find_label_file(directory, request.options["labels"]))
    _refuse_faulty(table)
    class_names, labels = _encode_labels(table, request.least_classes)
    listing, _ = list_images(directory)
    indices = _match_images(table, listing.names, directory)
    order = np.argsort(indices)  # by name: the order of the rows does not matter
    listing = listing.take(indices[order])
    images = FileImages(listing, labels[order], request.info.channels)
    splits = _take_splits(table, order, images)
    _refuse_untrained(table, class_names, splits)
    if not request.find_bad:
        refuse_unreadable(images)
    return class_names, splits


def _find_label_file(directory, labels):
    file = Path(labels) if labels else directory / "labels.csv"
    with path_errors(f"--labels={file}"):
        if not file.is_file():
            csv_files = sorted(path.name for path in directory.glob("*.csv"))
            hint = f"; {directory} holds {join_names(csv_files)}" if csv_files else ""
            raise InputError(f"--labels={file}: no such file{hint}")
    return file


def _read_table(file):
    try:
        with path_errors(f"--labels={file}"), open(file, newline="", encoding="utf-8-sig") as text:
            delimiter = max(",;\t", key=text.readline().count)  # spreadsheets write all three
            text.seek(0)
            return _read_columns(file, csv.reader(text, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"--labels={file}: not a text file in UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise InputError(f"--labels={file}: not a CSV file ({error})") from error


def _read_columns(file, reader):
    header = [name.strip() for name in next(reader, [])]
    label, split = _find_columns(file, header)
    table = _Table(file, header, array("q"), [], [], None if split is None else [])
    for row in reader:
        cells = [cell.strip() for cell in row] + [""] * (len(header) - len(row))
        _refuse_row(file, reader.line_num, header, cells)
        if any(cells):
            table.lines.append(reader.line_num)
            table.images.append(cells[0])
            table.labels.append(sys.intern(cells[label]))
            if split is not None:
                table.splits.append(SPLIT_OF.get(cells[split].lower(), ""))
    return table


def _refuse_row(file, line, header, cells):
    """Refuses a row with too many cells or with control characters, as after a missing quote."""
    if any(cells[len(header) :]):
        raise InputError(
            f"--labels={file}: line {line} has {len(cells)} cells, the header {len(header)}; "
            f"expected quotes around a cell that contains a delimiter"
        )
    if any(map(_CONTROL.search, cells)):
        raise InputError(
            f"--labels={file}: a cell that ends in line {line} has a line break or another control "
            f"character; a quote may be missing there"
        )


def _find_columns(file, header):
    """Returns the indices of the label column and of the split column, which may be None."""
    names = [name.lower() for name in header]
    split = names.index(SPLIT_COLUMN) if SPLIT_COLUMN in names else None
    known = [names.index(name) for name in LABEL_COLUMNS if name in names]
    others = [index for index in range(1, len(names)) if index != split]
    label = known[0] if known else others[0] if len(others) == 1 else 0
    if label == 0 or split == 0:
        raise InputError(
            f"--labels={file}: expected a header, with a column of images first and one of labels "
            f"({', '.join(LABEL_COLUMNS)}); received the columns {join_names(header) or '(none)'}"
        )
    if repeated := [header[i] for i in (label, split) if i and names.count(names[i]) > 1]:
        raise InputError(f"--labels={file}: the header has several columns {repeated[0]}")
    return label, split


def _refuse_faulty(table):
    """Checks what does not depend on the image files."""
    if not table.lines:
        raise InputError(f"--labels={table.file}: expected rows below the header, received none")
    _refuse(table, [not name for name in table.images], "without an image")
    _refuse(table, [not label for label in table.labels], "without a label")
    _refuse(table, list(map(_is_outside, table.images)), "with an image outside of --data_dir")
    if table.splits is not None:
        unknown = [not split for split in table.splits]
        _refuse(table, unknown, f"whose {SPLIT_COLUMN} is none of {', '.join(SPLITS)}")


def _refuse(table, faulty, what):
    if len(rows := np.flatnonzero(faulty)):
        names = join_names([f"{table.images[row]} (line {table.lines[row]})" for row in rows])
        plural = "s" * (len(rows) > 1)
        raise InputError(f"--labels={table.file}: {len(rows)} row{plural} {what}: {names}")


def _is_outside(name):
    name = name.replace("\\", "/")
    return bool(re.match("/|[A-Za-z]:/", name)) or ".." in name.split("/")


def _encode_labels(table, least):
    """Returns the sorted class names, and the labels as indices into them."""
    names = tuple(sorted(set(table.labels)))
    if len(names) < least:
        raise InputError(
            f"--labels={table.file}: expected at least {least} classes, received one label, "
            f"{names[0]}"
        )
    label_of = {name: label for label, name in enumerate(names)}
    return names, np.fromiter(map(label_of.get, table.labels), np.int64, len(table.labels))


def _take_splits(table, order, images):
    if table.splits is None:
        return {"all": images}
    split_of = np.array(table.splits)[order]
    return {
        name: images.take(np.flatnonzero(split_of == name)) for name in SPLITS if name in split_of
    }


def _refuse_untrained(table, class_names, splits):
    """Refuses classes without training images."""
    train = splits.get("all", splits.get("train"))
    trained = set() if train is None else set(train.labels.tolist())
    missing = [name for label, name in enumerate(class_names) if label not in trained]
    if missing:
        raise InputError(
            f"--labels={table.file}: no training image of {len(missing)} of {len(class_names)} "
            f"classes: {join_names(missing)}"
        )


def _match_images(table, names, directory):
    """Returns the index of each row's image in the sorted names of the files."""
    folders = subfolders(directory)
    indices = np.full(len(table.images), MISSING)
    for split in SPLITS if table.splits else ("train",):
        rows = np.flatnonzero([s == split for s in table.splits or ["train"] * len(indices)])
        wanted = np.array([_to_bytes(table.images[row]) for row in rows], np.bytes_)
        searched = [folders[f] for f in (*SPLIT_FOLDERS[split], *IMAGE_FOLDERS) if f in folders]
        indices[rows] = find_images(names, wanted, ["", *searched])
    _refuse_no_header(table, names)
    looked = f"without an image in {directory} or its {', '.join(IMAGE_FOLDERS)}"
    _refuse(table, indices == MISSING, looked)
    _refuse(table, indices == SEVERAL, "with several images; give the suffix")
    _, image, counts = np.unique(indices, return_inverse=True, return_counts=True)
    _refuse(table, counts[image] > 1, "that share an image")
    return indices


def _to_bytes(name):
    parts = name.replace("\\", "/").split("/")
    return os.fsencode(os.sep.join(part for part in parts if part not in ("", ".")))


def _refuse_no_header(table, names):
    """Refuses a first line that names an image, which would be lost as the header."""
    name = _to_bytes(table.header[0])
    if has_image_suffix(name) or find_images(names, np.array([name]), ["", "train"])[0] != MISSING:
        raise InputError(
            f"--labels={table.file}: its first line is {','.join(table.header)}; "
            f"expected a header, such as id,label"
        )


CSV = Reader(_read_csv, options=("labels",))
