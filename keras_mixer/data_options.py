"""The options that say which images a command sees, and what becomes of them in training."""

import dataclasses

from keras_mixer.commandline import option

CLASS_WEIGHTS = ("none", "balanced")


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Which data, in which splits: the arguments of `data.sources.load_source`."""

    # Data
    dataset: str = option(
        "digits",
        "Data to learn. digits is embedded. folder: class folders of images. csv: a table of "
        "labels beside a folder of images. Any other name, such as stanford_dogs: the set of "
        "tensorflow-datasets; mnist and fashion_mnist also from their four IDX files.",
        heading="Data",
    )
    data_dir: str | None = option(
        None,
        "Folder that holds the data. With --dataset=folder: class folders, directly or under "
        "train/, val/ and test/. With csv: the images. With a set of tensorflow-datasets: where it "
        "is prepared (default: ~/tensorflow_datasets).",
        result=False,  # the identity of the data is compared instead
    )
    labels: str | None = option(
        None,
        "With --dataset=csv: the table, with a column of file names or ids and one called label, "
        "class, breed or the like (default: labels.csv in data_dir).",
        result=False,
    )
    train_split: str | None = option(
        None,
        'What to train on, in the split syntax of tensorflow-datasets, such as "train[:90%]"; '
        "only for its sets (default: train). A validation split of the set's own stands back where "
        "it shares images with this.",
        result=False,
    )
    validation_split: str | None = option(
        None, "What to choose with, likewise (default: the set's own, if any).", result=False
    )
    test_split: str | None = option(
        None, "What to score once at the end, likewise (default: the set's own).", result=False
    )
    validation_fraction: float = option(
        0.1,
        "Share of the training images set aside to choose with, stratified, where the data "
        "bring no validation split. 0: none, and the last weights are kept as the best.",
        low=0.0,
        below=1.0,
    )
    test_fraction: float = option(
        0.2,
        "Share of all images set aside to score once at the end, stratified, where the data "
        "bring no splits at all.",
        low=0.0,
        below=1.0,
    )
    split_seed: int = option(
        0,
        "Which images are set aside, whatever the seed of the run, so that runs of several seeds "
        "are scored on the same images.",
        low=0,
        high=2**31 - 1,
    )

    def source(self):
        """Returns the keyword arguments for `load_source`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SourceOptions)}


@dataclasses.dataclass(frozen=True)
class DataOptions(SourceOptions):
    """The first fields of `config.Config`: the data, their splits, augmentation."""

    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images fed to the model, in pixels; one number for a square "
        "(default: the data set's, as 8,8 for digits; 256,256 for photos; 224,224 with --variant).",
        low=1,
        high=65536,
    )
    eval_crop: float = option(
        0.0,
        "How images are fitted to image_shape when nothing is random. 0: squashed whole. Above "
        "0: scaled with their aspect ratio kept, and this share of the height and width cut out "
        "of the middle; the paper's evaluation is 0.875.",
        low=0.0,
        high=1.0,
    )
    class_weights: str = option(
        "none", "balanced: every class weighs the same in the loss.", choices=CLASS_WEIGHTS
    )

    # Augmentation
    flip: bool = option(
        False, "Mirror training images left to right with probability 1/2.", heading="Augmentation"
    )
    crop_padding: int = option(
        0,
        "Pad training images with this many black pixels on every side and crop back at a "
        "random place.",
        low=0,
        high=1024,
    )
    inception_crop: float = option(
        0.0,
        "Train on random crops, of this share of an image's area up to all of it and an aspect "
        "ratio of 3/4 to 4/3; the official recipe is 0.05. 0: none.",
        low=0.0,
        high=1.0,
    )
    randaugment: tuple[int, int] | None = option(
        None,
        "n,m: change every training image by n random operations of magnitude m, from 0 to 30; "
        "the official recipe is 2,15.",
        low=0,
        high=30,
        noun="n,m as integers",
    )
    color_jitter: float = option(
        0.0, "Change brightness, contrast and saturation by up to this share.", low=0.0, high=1.0
    )
    random_erasing: float = option(
        0.0, "Probability that a rectangle of a training image becomes noise.", low=0.0, high=1.0
    )
    mixup: float = option(
        0.0,
        "Blend training images and labels in pairs by a share drawn from Beta(mixup, mixup). "
        "Then `accuracy` in history.csv counts the class of the larger share. 0: none.",
        low=0.0,
        high=100.0,
    )
    cutmix: float = option(
        0.0,
        "Paste a rectangle of one training image into another, its area drawn from "
        "Beta(cutmix, cutmix), and the labels likewise. With mixup, too: one or the other, with "
        "probability 1/2. 0: none.",
        low=0.0,
        high=100.0,
    )
