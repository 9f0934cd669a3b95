"""Opens a dataset by name: digits, IDX files, class folders, CSV files, tensorflow-datasets.

Nothing here imports TensorFlow, so errors in the data are reported within a second or two.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from keras_mixer.data.class_folders import read_folder
from keras_mixer.data.csv_labels import read_csv
from keras_mixer.data.datasets import DatasetInfo, dataset_row
from keras_mixer.data.embedded import read_digits
from keras_mixer.data.idx import holds_idx, read_idx
from keras_mixer.data.splits import Dataset, identity_of, set_aside, without_bad
from keras_mixer.data.tfds import flag_of, read_tfds
from keras_mixer.errors import InputError, path_errors


class Request(NamedTuple):
    """The argument of a reader.

    Attributes:
        dataset: Name of the dataset, as given.
        row: Its `DatasetInfo`.
        directory: Folder of the files; None for embedded data and for the default folder of
            tensorflow-datasets.
        labels: Path of the label file; None for the default.
        expressions: dict from `train`, `validation` and `test` to the given split expression of
            tensorflow-datasets, or None.
        least_classes: Smallest number of classes that is enough.
        find_bad: As for `open_dataset`; if given, readers do not check the images.
    """

    dataset: str
    row: DatasetInfo
    directory: Path | None
    labels: str | None
    expressions: dict[str, str | None]
    least_classes: int = 2
    find_bad: Callable | None = None


# Each takes a `Request` and returns the class names and a dict of `Images`: the splits that the
# data have, named train, validation and test, or a single one, named all.
READERS = {
    "embedded": read_digits,
    "idx": read_idx,
    "folder": read_folder,
    "csv": read_csv,
    "tfds": read_tfds,
}


def open_dataset(
    dataset,
    data_dir=None,
    validation_fraction=0.1,
    *,
    test_fraction=0.2,
    split_seed=0,
    labels=None,
    train_split=None,
    validation_split=None,
    test_split=None,
    least_classes=2,
    find_bad=None,
):
    """Opens a dataset: reads small ones into memory, lists and checks the files of large ones.

    Args:
        dataset: string, a key of `DATASETS` or any name in tensorflow-datasets.
        data_dir: Folder of the files; None for the embedded dataset and for the default folder of
            tensorflow-datasets.
        validation_fraction: float in [0, 1). Share of the training images set aside if the data
            have no validation split: stratified, or at random for tensorflow-datasets, whose
            labels are not known beforehand.
        test_fraction: float in [0, 1). Share of all images set aside if the data have no splits.
        split_seed: int. Chooses the images set aside. It is not the seed of the run, so that runs
            with different seeds are scored on the same images.
        labels: Path of the CSV file of `--dataset=csv`; None for `labels.csv` in `data_dir`.
        train_split, validation_split, test_split: Split expressions of tensorflow-datasets, such
            as `train[:90%]`; None for those of the table, or for the splits the dataset has.
        least_classes: int. Smallest number of classes that is enough; 1 to score a trained model.
        find_bad: Function of `Images` that returns a list of (index, reason): images to leave out.
            None: files are checked by their headers and ends, and broken ones are an error.

    Returns:
        A `Dataset`.

    Raises:
        InputError: If files are missing, damaged or inconsistent; the message names them.
    """
    row = dataset_row(dataset)
    expressions = {"train": train_split, "validation": validation_split, "test": test_split}
    directory = _data_directory(dataset, row, data_dir)
    if row.origin == "idx" and not (directory and holds_idx(directory)):
        row = row._replace(origin="tfds")
    if row.origin != "tfds":
        _refuse_expressions(dataset, expressions)
    if labels is not None and row.origin != "csv":
        raise InputError(f"--labels={labels} is for --dataset=csv, not --dataset={dataset}")
    request = Request(dataset, row, directory, labels, expressions, least_classes, find_bad)
    class_names, splits = READERS[row.origin](request)
    skipped = ()
    if find_bad:
        splits, skipped = without_bad(splits, class_names, find_bad)
    splits = _complete(splits, class_names, validation_fraction, test_fraction, split_seed)
    return Dataset(class_names, *splits, identity_of(class_names, splits), skipped)


def _refuse_expressions(dataset, expressions):
    for name, expression in expressions.items():
        if expression is not None:
            raise InputError(
                f"--{flag_of(name)}={expression} is for sets of tensorflow-datasets and would "
                f"change nothing with --dataset={dataset}; leave it out"
            )


def _data_directory(dataset, row, data_dir):
    if row.origin == "embedded":
        if data_dir is not None:
            raise InputError(
                f"--data_dir={data_dir}: --dataset={dataset} is embedded and reads no files; "
                f"to train on your own images add --dataset=folder"
            )
        return None
    if data_dir is None and row.origin in ("idx", "tfds"):
        return None
    if data_dir is None:
        raise InputError(f"--dataset={dataset} needs --data_dir, the folder that holds its files")
    with path_errors(f"--data_dir={data_dir}"):
        if not Path(data_dir).is_dir():
            kind = "not a folder" if Path(data_dir).exists() else "no such folder"
            raise InputError(f"--data_dir={data_dir}: {kind}")
    return Path(data_dir)


def _complete(splits, class_names, validation_fraction, test_fraction, seed):
    """Returns (train, validation, test), setting aside those that the data lack."""
    train, test = splits.get("all", splits.get("train")), splits.get("test")
    if "all" in splits and test_fraction > 0:
        train, test = set_aside(train, test_fraction, seed, "--test_fraction", class_names)
    validation = splits.get("validation")
    if validation is None and validation_fraction > 0:
        flag = "--validation_fraction"
        train, validation = set_aside(train, validation_fraction, seed, flag, class_names)
    return train, validation, test
