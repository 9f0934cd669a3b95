"""Opens a data set by name: embedded digits, IDX files, image folders, images with a CSV file.

Nothing here imports TensorFlow, so every mistake in the data is reported within a second or two.
"""

from pathlib import Path
from typing import NamedTuple

from keras_mixer.data.arrays import read_digits, read_idx
from keras_mixer.data.datasets import DATASETS, Dataset
from keras_mixer.data.folders import read_folder
from keras_mixer.data.splits import Source, identity_of, stratified
from keras_mixer.data.tables import read_csv
from keras_mixer.errors import InputError, path_errors


class Request(NamedTuple):
    """What a reader is asked for.

    Attributes:
        row: The data set's row in `DATASETS`.
        directory: Folder that holds the files; None for embedded data.
        labels: File that holds the labels of images; None for the usual place.
    """

    row: Dataset
    directory: Path | None
    labels: str | None


# Each returns the class names and the splits that the data bring along, as a dict of `Split`s
# called train, validation and test, or a single one called `all`.
READERS = {"embedded": read_digits, "idx": read_idx, "folder": read_folder, "csv": read_csv}


def load_source(
    dataset,
    data_dir=None,
    validation_fraction=0.1,
    *,
    test_fraction=0.2,
    split_seed=0,
    labels=None,
    **_,
):
    """Opens a data set: reads small ones into memory, lists and checks the files of large ones.

    Args:
        dataset: string, a key of `DATASETS`.
        data_dir: Folder that holds the files; None for the embedded set.
        validation_fraction: float in [0, 1). Share of the training images set aside, stratified,
            where the data bring no validation split of their own.
        test_fraction: float in [0, 1). Share of all images set aside, stratified, where the data
            bring no splits at all.
        split_seed: int. Which images are set aside; it is apart from the seed of a run, so that
            runs of several seeds are scored on the same images.
        labels: Path of the CSV file of `--dataset=csv`; None for `labels.csv` in `data_dir`.

    Returns:
        A `Source`.

    Raises:
        InputError: If files are missing, damaged or inconsistent; the message names them.
    """
    row = DATASETS[dataset]
    directory = _data_directory(dataset, row, data_dir)
    if labels is not None and row.origin != "csv":
        raise InputError(f"--labels={labels} is for --dataset=csv, not --dataset={dataset}")
    class_names, found = READERS[row.origin](Request(row, directory, labels))
    splits = _completed(found, class_names, validation_fraction, test_fraction, split_seed)
    return Source(class_names, row.channels, *splits, identity_of(class_names, splits, directory))


def _data_directory(dataset, row, data_dir):
    if row.origin == "embedded":
        if data_dir is not None:
            raise InputError(
                f"--data_dir={data_dir}: --dataset={dataset} is embedded and reads no files; "
                f"to train on your own images add --dataset=folder"
            )
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
    if "all" in found and test_fraction > 0:
        train, test = stratified(train, test_fraction, seed, "--test_fraction", class_names)
    validation = found.get("validation")
    if validation is None and validation_fraction > 0:
        flag = "--validation_fraction"
        train, validation = stratified(train, validation_fraction, seed, flag, class_names)
    return train, validation, test
