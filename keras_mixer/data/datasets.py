"""The table of datasets known by name; other names are looked up in tensorflow-datasets."""

import re
from typing import NamedTuple

SPLITS = ("train", "validation", "test")


class DatasetInfo(NamedTuple):
    """One row of the table.

    Attributes:
        image_shape: Default (height, width) of the images fed to the model, in pixels.
        patch_shape: Default (height, width) of a patch, in pixels.
        channels: Color channels of the images; not used for `tfds`, where the data define them.
        class_names: One name per class; None if the data define them.
        origin: `embedded`, `idx` (without the IDX files: `tfds`), `folder`, `csv` or `tfds`.
        splits: Split expressions of tensorflow-datasets for train, validation (None: set aside
            from train) and test; None for the splits of those names.
    """

    image_shape: tuple[int, int]
    patch_shape: tuple[int, int]
    channels: int
    class_names: tuple[str, ...] | None
    origin: str
    splits: tuple[str, str | None, str | None] | None = None


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

_TRAIN_TEST = ("train", None, "test")

DATASETS = {
    "digits": DatasetInfo((8, 8), (2, 2), 1, _DIGITS, "embedded"),
    "mnist": DatasetInfo((28, 28), (4, 4), 1, _DIGITS, "idx"),
    "fashion_mnist": DatasetInfo((28, 28), (4, 4), 1, _CLOTHES, "idx"),
    "folder": DatasetInfo((256, 256), (16, 16), 3, None, "folder"),
    "csv": DatasetInfo((256, 256), (16, 16), 3, None, "csv"),
    # Splits as in the catalog of tensorflow-datasets, https://www.tensorflow.org/datasets
    "beans": DatasetInfo((256, 256), (16, 16), 3, None, "tfds"),
    "caltech101": DatasetInfo((256, 256), (16, 16), 3, None, "tfds", _TRAIN_TEST),
    "cifar10": DatasetInfo((32, 32), (4, 4), 3, None, "tfds", _TRAIN_TEST),
    "cifar100": DatasetInfo((32, 32), (4, 4), 3, None, "tfds", _TRAIN_TEST),
    "eurosat": DatasetInfo((64, 64), (8, 8), 3, None, "tfds"),
    "food101": DatasetInfo((256, 256), (16, 16), 3, None, "tfds", ("train", None, "validation")),
    "imagenet2012": DatasetInfo(
        (224, 224), (16, 16), 3, None, "tfds", ("train[:99%]", "train[99%:]", "validation")
    ),
    "imagenette": DatasetInfo((256, 256), (16, 16), 3, None, "tfds", ("train", None, "validation")),
    "kmnist": DatasetInfo((28, 28), (4, 4), 1, None, "tfds", _TRAIN_TEST),
    "oxford_flowers102": DatasetInfo(
        (256, 256), (16, 16), 3, None, "tfds", ("train", "validation", "test")
    ),
    "oxford_iiit_pet": DatasetInfo((256, 256), (16, 16), 3, None, "tfds", _TRAIN_TEST),
    "patch_camelyon": DatasetInfo(
        (96, 96), (8, 8), 3, None, "tfds", ("train", "validation", "test")
    ),
    "stanford_dogs": DatasetInfo((256, 256), (16, 16), 3, None, "tfds", _TRAIN_TEST),
    "svhn_cropped": DatasetInfo((32, 32), (4, 4), 3, None, "tfds", _TRAIN_TEST),
    "tf_flowers": DatasetInfo((256, 256), (16, 16), 3, None, "tfds"),
}

_PHOTOS = DatasetInfo((256, 256), (16, 16), 3, None, "tfds")

# Avg-5 is the mean accuracy on these (paper, section 3).
AVG5 = ("imagenet2012", "cifar10", "cifar100", "oxford_iiit_pet", "oxford_flowers102")


def dataset_row(name):
    """Returns the `DatasetInfo` of a name, with defaults for photos if it is not in the table.

    Args:
        name: string. Names of tensorflow-datasets may end in a config and a version, as in
            `eurosat/rgb:2.*.*`, which do not matter here.
    """
    plain = re.split("[/:]", name, maxsplit=1)[0]
    row = DATASETS.get(plain, _PHOTOS)
    return row if row.origin in ("tfds", "idx") else DATASETS.get(name, _PHOTOS)
