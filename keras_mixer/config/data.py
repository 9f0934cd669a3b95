"""Options of the data: which dataset, how it is split, how training images are augmented."""

import dataclasses

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.config.options import FRACTION, PIXELS, RATE, SEED, option, options_of
from keras_mixer.model.architecture import INTERPOLATIONS


def _find_bad(images):
    with quiet_tensorflow():
        from keras_mixer.preprocessing.bad_images import find_bad

    return find_bad(images)


FIND_BAD = {"error": None, "skip": _find_bad}  # arguments of `data.sources.open_dataset`


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """The dataset and its splits."""

    dataset: str = option(
        "digits",
        "Dataset. digits: 1,797 included images, no download. folder: images in class folders. "
        "csv: images with a CSV label file. Any other name, such as stanford_dogs: from "
        "tensorflow-datasets; mnist and fashion_mnist also from their four IDX files.",
        heading="Data",
        basic=True,
    )
    data_dir: str | None = option(
        None,
        "Folder of the data. With --dataset=folder: class folders, directly or under train/, val/ "
        "and test/. With csv: the images. With tensorflow-datasets: its data folder (default: "
        "~/tensorflow_datasets).",
        basic=True,
        result=False,  # the identity of the data is compared instead
    )
    labels: str | None = option(
        None,
        "CSV label file, with --dataset=csv: file names or ids in the first column, and a column "
        "called label, class, breed or similar (default: labels.csv in data_dir).",
        result=False,
    )
    train_split: str | None = option(
        None,
        'Training split, in the syntax of tensorflow-datasets, such as "train[:90%]"; only for its '
        "datasets (default: train). If it overlaps the dataset's validation split, that split is "
        "not used.",
        result=False,
    )
    validation_split: str | None = option(
        None,
        "Validation split, in the same syntax (default: the dataset's own, if any).",
        result=False,
    )
    test_split: str | None = option(
        None, "Test split, in the same syntax (default: the dataset's own).", result=False
    )
    validation_fraction: float = option(
        0.1,
        "Fraction of the training images used for validation, stratified by class; only if the "
        "data have no validation split. 0: no validation, and the last weights are kept.",
        **RATE,
    )
    test_fraction: float = option(
        0.2,
        "Fraction of all images used for testing, stratified by class; only if the data have no "
        "splits.",
        **RATE,
    )
    split_seed: int = option(
        0,
        "Seed of the random split. Independent of --seed, so that runs with different seeds use "
        "the same test images.",
        **SEED,
    )
    bad_images: str = option(
        "error",
        "What to do about images that cannot be decoded. error: stop at the first one. skip: leave "
        "them out, after all images have been decoded once; a run lists them in skipped.jsonl.",
        choices=tuple(FIND_BAD),
        result=False,  # the identity of the data is compared instead
    )

    def dataset_options(self):
        """Returns the keyword arguments for `open_dataset`."""
        options = options_of(self, DatasetOptions)
        return options | {"find_bad": FIND_BAD[options.pop("bad_images")]}


@dataclasses.dataclass(frozen=True)
class PreprocessingOptions:
    """How images are prepared, augmentation apart."""

    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images fed to the model, in pixels; one number for a square (default: "
        "the dataset's, such as 8,8 for digits; 256,256 for photos; 224,224 with --variant).",
        basic=True,
        **PIXELS,
    )
    eval_crop: float = option(
        0.0,
        "How images are resized to image_shape in evaluation. 0: the whole image, ignoring its "
        "aspect ratio. From 0.1 to 1: center crop of this fraction, keeping the aspect ratio "
        "(timm's crop_pct; the paper uses 0.875).",
        **FRACTION,
    )
    interpolation: str = option(
        "bilinear",
        "How pixels are interpolated, antialiased, when images are resized in evaluation, and in "
        "training without --inception_crop, which is bilinear. timm evaluates with bicubic.",
        choices=INTERPOLATIONS,
    )


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """Augmentation of training images: arguments of `input_pipeline.training_batches`."""

    flip: bool = option(
        False, "Random horizontal flip, with probability 1/2.", heading="Augmentation"
    )
    crop_padding: int = option(
        0, "Random crop after padding every side with this many black pixels.", low=0, high=1024
    )
    inception_crop: float = option(
        0.0,
        "Inception crop (random resized crop): smallest fraction of the area that is kept, with an "
        "aspect ratio of 3/4 to 4/3; the official recipe is 0.05. 0: none.",
        **FRACTION,
    )
    randaugment: tuple[int, int] | None = option(
        None,
        "RandAugment as n,m: n random operations of magnitude m, 0 to 30; the official recipe is "
        "2,15.",
        low=0,
        high=30,
        noun="n,m as integers",
    )
    color_jitter: float = option(
        0.0,
        "Color jitter: maximum relative change of brightness, contrast and saturation.",
        **FRACTION,
    )
    random_erasing: float = option(
        0.0,
        "Random erasing: probability that a rectangle of an image is replaced by noise.",
        **FRACTION,
    )
    mixup: float = option(
        0.0,
        "MixUp: alpha of the Beta distribution for mixing pairs of images and their labels. "
        "Training accuracy then counts the class with the larger weight. 0: none.",
        low=0.0,
        high=100.0,
    )
    cutmix: float = option(
        0.0,
        "CutMix: alpha of the Beta distribution for the area of the pasted rectangle. With "
        "--mixup: either one, with probability 1/2. 0: none.",
        low=0.0,
        high=100.0,
    )
