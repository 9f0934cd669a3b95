"""Opens a dataset by name: digits, IDX files, class folders, CSV files, tensorflow-datasets.

Nothing here imports TensorFlow, so errors in the data are reported within a second or two.

A new kind of data is a file with a `Reader`, a row in `READERS`, and a row in `datasets.DATASETS`.
"""

import re
from pathlib import Path

from keras_mixer.data.class_folders import CLASS_FOLDERS
from keras_mixer.data.csv_labels import CSV
from keras_mixer.data.datasets import DATASETS, SPLITS, dataset_row
from keras_mixer.data.in_memory import DIGITS, IDX
from keras_mixer.data.readers import Request
from keras_mixer.data.splits import Dataset, identity_of, set_aside, without_bad
from keras_mixer.data.tfds import TFDS
from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import logger

READERS = {  # by `DatasetInfo.origin`
    "embedded": DIGITS,
    "idx": IDX,
    "folder": CLASS_FOLDERS,
    "csv": CSV,
    "tfds": TFDS,
}


def open_dataset(
    dataset,
    data_dir=None,
    validation_fraction=0.1,
    *,
    test_fraction=0.2,
    split_seed=0,
    least_classes=2,
    find_bad=None,
    **options,
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
        least_classes: int. Smallest number of classes that is enough; 1 to score a trained model.
        find_bad: Function of `Images` that returns a list of (index, reason): images to leave out.
            None: files are checked by their headers and ends, and broken ones are an error.
        **options: Those of one kind of data, see its `Reader`: `labels` of CSV files, and
            `train_split`, `validation_split`, `test_split` of tensorflow-datasets; None: not given.

    Returns:
        A `Dataset`.

    Raises:
        InputError: If files are missing, damaged or inconsistent; the message names them.
    """
    _check_name(dataset)
    info = dataset_row(dataset)
    reader = READERS[info.origin]
    directory = _data_directory(dataset, reader, data_dir)
    if reader.holds and not (directory and reader.holds(directory)):
        reader = TFDS
    _refuse_options(dataset, reader, options)
    options = dict.fromkeys(reader.options) | options
    request = Request(dataset, info, directory, options, least_classes, find_bad)
    class_names, splits = reader.read(request)
    skipped = ()
    if find_bad:
        splits, skipped = without_bad(splits, class_names, find_bad)
    splits = _complete(splits, class_names, validation_fraction, test_fraction, split_seed)
    if reader in (CLASS_FOLDERS, CSV):
        _tell_what_was_read(class_names, splits)
    return Dataset(class_names, *splits, identity_of(class_names, splits), skipped)


def _check_name(dataset):
    """Refuses another spelling of a name in the table, such as `cifar-10` or `MNIST`."""
    plain = re.sub("[-_ ]", "", dataset).lower()
    names = [name for name in DATASETS if re.sub("[-_ ]", "", name) == plain]
    if names and dataset not in DATASETS:
        raise InputError(f"--dataset={dataset}: it is called {names[0]} here")


def _tell_what_was_read(class_names, splits):
    counts = {name: len(split) for name, split in zip(SPLITS, splits, strict=True) if split}
    each = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    logger.info(f"{sum(counts.values()):,} photos: {each}; {len(class_names):,} classes")


def _refuse_options(dataset, reader, options):
    """Refuses the options of another kind of data."""
    for name, value in options.items():
        kinds = [kind for kind, other in READERS.items() if name in other.options]
        if not kinds:
            raise TypeError(f"open_dataset has no option {name}")
        if value is not None and name not in reader.options:
            owner = "sets of tensorflow-datasets" if kinds == ["tfds"] else f"--dataset={kinds[0]}"
            raise InputError(
                f"--{name}={value} is for {owner} and would change nothing with "
                f"--dataset={dataset}; leave it out"
            )


def _data_directory(dataset, reader, data_dir):
    if data_dir is None:
        if reader.data_dir == "required":
            raise InputError(
                f"--dataset={dataset} needs --data_dir, the folder that holds its files"
            )
        return None
    if reader.data_dir == "none":
        raise InputError(
            f"--data_dir={data_dir}: --dataset={dataset} is embedded and reads no files; "
            f"to train on your own images give --preset=photos --data_dir={data_dir}, or "
            f"--dataset=folder for a model from scratch"
        )
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
