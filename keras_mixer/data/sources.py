"""Opens a data set by name: digits, IDX files, class folders, CSV files, tensorflow-datasets.

Nothing here imports TensorFlow, so every mistake in the data is reported within a second or two.
"""

from pathlib import Path
from typing import NamedTuple

from keras_mixer.data.class_folders import read_folder
from keras_mixer.data.csv_labels import read_csv
from keras_mixer.data.datasets import DatasetInfo, dataset_row
from keras_mixer.data.embedded import read_digits
from keras_mixer.data.idx import holds_idx, read_idx
from keras_mixer.data.splits import Dataset, identity_of, split_randomly, split_stratified
from keras_mixer.data.tfds import flag_of, read_tfds
from keras_mixer.errors import InputError, path_errors


class Request(NamedTuple):
    """What a reader is asked for.

    Attributes:
        dataset: The name that was given.
        row: The data set's row.
        directory: Folder that holds the files; None for embedded data, and for
            tensorflow-datasets in its own folder.
        labels: File that holds the labels of images; None for the usual place.
        expressions: dict from `train`, `validation` and `test` to the split expression of
            tensorflow-datasets that was given, or None.
    """

    dataset: str
    row: DatasetInfo
    directory: Path | None
    labels: str | None
    expressions: dict[str, str | None]


# Each returns the class names and the splits that the data bring along, as a dict of `Images`
# called train, validation and test, or a single one called `all`.
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
):
    """Opens a data set: reads small ones into memory, lists and checks the files of large ones.

    Args:
        dataset: string, a key of `DATASETS` or any name that tensorflow-datasets knows.
        data_dir: Folder that holds the files; None for the embedded set, and for
            tensorflow-datasets in its own folder.
        validation_fraction: float in [0, 1). Share of the training images set aside, stratified,
            where the data bring no validation split of their own. (Of tensorflow-datasets it is a
            random share: their labels are not known beforehand.)
        test_fraction: float in [0, 1). Share of all images set aside, stratified, where the data
            bring no splits at all.
        split_seed: int. Which images are set aside; it is apart from the seed of a run, so that
            runs of several seeds are scored on the same images.
        labels: Path of the CSV file of `--dataset=csv`; None for `labels.csv` in `data_dir`.
        train_split, validation_split, test_split: Split expressions of tensorflow-datasets, such
            as `train[:90%]`; None for what the data set's row says, or the splits it has.

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
    request = Request(dataset, row, directory, labels, expressions)
    class_names, found = READERS[row.origin](request)
    splits = _completed(found, class_names, validation_fraction, test_fraction, split_seed)
    return Dataset(class_names, *splits, identity_of(class_names, splits))


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


def _completed(found, class_names, validation_fraction, test_fraction, seed):
    """Returns (train, validation, test), set aside where the data bring none."""
    train, test = found.get("all", found.get("train")), found.get("test")
    set_aside = split_randomly if train.labels is None else split_stratified
    if "all" in found and test_fraction > 0:
        train, test = set_aside(train, test_fraction, seed, "--test_fraction", class_names)
    validation = found.get("validation")
    if validation is None and validation_fraction > 0:
        flag = "--validation_fraction"
        train, validation = set_aside(train, validation_fraction, seed, flag, class_names)
    return train, validation, test
