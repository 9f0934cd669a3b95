"""The data sets this program knows by name, as data: what `--dataset` accepts and implies."""

from typing import NamedTuple


class Dataset(NamedTuple):
    """One row of the table.

    Attributes:
        image_shape: Default (height, width) of the images fed to the model, in pixels.
        patch_shape: Default (height, width) of a patch, in pixels.
        channels: Colour channels of the images.
        class_names: One name per class; None where the data themselves tell.
        origin: Where the data come from: `embedded`, `idx`, `folder` or `csv`.
    """

    image_shape: tuple[int, int]
    patch_shape: tuple[int, int]
    channels: int
    class_names: tuple[str, ...] | None
    origin: str


_DIGITS = tuple("0123456789")
_CLOTHES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

DATASETS = {
    "digits": Dataset((8, 8), (2, 2), 1, _DIGITS, "embedded"),
    "mnist": Dataset((28, 28), (4, 4), 1, _DIGITS, "idx"),
    "fashion_mnist": Dataset((28, 28), (4, 4), 1, _CLOTHES, "idx"),
    "folder": Dataset((256, 256), (16, 16), 3, None, "folder"),
    "csv": Dataset((256, 256), (16, 16), 3, None, "csv"),
}


def dataset_row(name):
    """Returns the row of a data set.

    Args:
        name: string, a key of `DATASETS`.
    """
    return DATASETS[name]


SPLITS = ("train", "validation", "test")
