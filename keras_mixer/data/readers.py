"""What a reader of one kind of data is given, returns and declares; `sources.READERS` has all."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from keras_mixer.data.datasets import DatasetInfo
from keras_mixer.data.splits import Images


class Request(NamedTuple):
    """The argument of a reader.

    Attributes:
        dataset: Name of the dataset, as given.
        info: Its `DatasetInfo`.
        directory: Folder of the files; None for embedded data and for the default folder of
            tensorflow-datasets.
        options: dict of the reader's own options; None for those that are not given.
        least_classes: Smallest number of classes that is enough.
        find_bad: As for `open_dataset`; if given, readers do not check the images.
    """

    dataset: str
    info: DatasetInfo
    directory: Path | None
    options: dict[str, str | None]
    least_classes: int
    find_bad: Callable | None


class Read(Protocol):
    """A function that reads data."""

    def __call__(self, request: Request) -> tuple[tuple[str, ...], dict[str, Images]]:
        """Returns the class names, and the splits that the data have.

        The splits are train, validation and test, or a single one, called all.

        Raises:
            InputError: If files are missing, damaged or inconsistent; the message names them.
        """


class Reader(NamedTuple):
    """A kind of data.

    Attributes:
        read: Function that reads them.
        data_dir: "required"; "optional", if there is a default folder; or "none".
        options: Names of the options of `open_dataset` that are for this kind only.
        holds: Function of the folder that returns whether it has such data; without them, the
            dataset is looked up in tensorflow-datasets. None: no other reader is tried.
    """

    read: Read
    data_dir: str = "required"
    options: tuple[str, ...] = ()
    holds: Callable[[Path], bool] | None = None
