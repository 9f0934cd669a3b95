"""The fewshot command."""

import dataclasses
from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.shared import check_writable, publish_scores, single_argument
from keras_mixer.config.data import DatasetOptions
from keras_mixer.config.options import (
    FRACTION,
    PIXELS,
    RATE,
    SEED,
    format_value,
    named_as_flags,
    option,
)
from keras_mixer.data.sources import open_dataset
from keras_mixer.data.splits import set_aside
from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import logger
from keras_mixer.runs.run import BEST, read_record
from keras_mixer.weights.pretrained import adapt_pretrained, log_pretrained, read_pretrained
from keras_mixer.weights.resize import RESIZE_TOKENS


@dataclasses.dataclass(frozen=True)
class FewShotOptions(DatasetOptions):
    """Flags of `fewshot`: those of the data, and these."""

    validation_fraction: float = option(
        0.1,
        "Fraction of the training images that L2 is chosen on, stratified by class; only where the "
        "data have no validation split. 0: L2 is chosen by cross-validation on the shots.",
        **RATE,
    )
    shots: tuple[int, ...] = option(
        (1, 5, 10, 25),
        "Training images per class; a score for each number.",
        low=1,
        high=1_000_000,
        heading="Regression",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "Seeds of the sampled images; scores are means over them.", **SEED
    )
    l2: tuple[float, ...] = option(
        tuple(4**power for power in range(11)),
        "L2 penalties to choose from, for each number of shots, without the test images. A single "
        "value is used as given; the official code uses 1024.",
        low=1e-6,
        high=1e12,
    )
    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images fed to the model, in pixels; the weights are adapted to it "
        "(default: the checkpoint's).",
        **PIXELS,
        heading="Model",
    )
    patch_shape: tuple[int, int] | None = option(
        None, "height,width of a patch, in pixels; the weights are adapted to it.", **PIXELS
    )
    resize_tokens: str = option(
        "interpolate",
        "How token mixing is adapted to another grid of patches, as in train.",
        choices=RESIZE_TOKENS,
    )
    eval_crop: float | None = option(
        None, "How images are resized, as in train (default: as the checkpoint says).", **FRACTION
    )
    batch_size: int = option(256, "Images per batch; does not change the scores.", low=1)
    format: str = option("table", "Output format.", choices=("table", "json"), heading="Output")
    output: str | None = option(None, "Also write the scores as JSON to this file.")


def few_shot(options, arguments):
    """Measures few-shot accuracy of features, by ridge regression on a few images per class."""
    path = single_argument(arguments, "CHECKPOINT")
    if options.output:
        check_writable(options.output)
    pretrained = _pretrained(options, path)
    dataset = _with_test_images(open_dataset(**options.dataset_options()), options)
    _check(options, dataset, path, pretrained.spec.architecture.channels)
    _note_other_splits(options, dataset, path)
    with named_as_flags(type(options)):
        shapes = (options.image_shape, options.patch_shape, options.resize_tokens)
        adapted = adapt_pretrained(log_pretrained(pretrained, path), *shapes)
    with quiet_tensorflow():
        from keras_mixer.inference.few_shot import as_table, score_few_shot
        from keras_mixer.weights.load import build_pretrained

    model = build_pretrained(adapted, path)
    scores = {"checkpoint": str(path), "dataset": options.dataset}
    chosen = (options.shots, options.seeds, options.l2)
    scores |= score_few_shot(model, dataset, *chosen, options.batch_size)
    publish_scores(scores, options, as_table)


def _pretrained(options, path):
    """Reads the weights; --eval_crop, if given, replaces that of their spec."""
    pretrained = read_pretrained(path, options.image_shape)
    if options.eval_crop is None:
        return pretrained
    spec = pretrained.spec
    with named_as_flags(type(options)):
        preprocessing = dataclasses.replace(spec.preprocessing, eval_crop=options.eval_crop)
    return pretrained._replace(spec=spec.replace(preprocessing=preprocessing))


def _with_test_images(dataset, options):
    """Returns the dataset, with its validation images as test images if it has none."""
    if dataset.test is not None or dataset.validation is None:
        return dataset
    fraction, validation, train = options.validation_fraction, None, dataset.train
    logger.warning("there are no test images: the validation images are scored instead")
    if fraction:
        flag = "--validation_fraction"
        train, validation = set_aside(
            train, fraction, options.split_seed, flag, dataset.class_names
        )
    return dataclasses.replace(dataset, train=train, validation=validation, test=dataset.validation)


def _check(options, dataset, path, channels):
    """Refuses data that the model cannot take, and data without test images."""
    if channels != dataset.channels:
        raise InputError(
            f"{path}: it was trained on images of {channels} channels, --dataset={options.dataset} "
            f"has {dataset.channels}"
        )
    if dataset.test is None:
        raise InputError(
            f"--dataset={options.dataset}: there are no test images to score; give "
            f"--test_fraction, or --test_split of a set of tensorflow-datasets"
        )


# Options that determine which images are training images and which are test images.
_SPLITTING = ("train_split", "test_split", "test_fraction", "split_seed")


def _note_other_splits(options, dataset, path):
    """Warns if a run may have been trained on images that are test images here."""
    with path_errors(path):
        record = read_record(path) if (Path(path) / BEST).is_dir() else None
    if record is None or record["data"]["identity"] == dataset.identity:
        return
    before = record["config"]
    if any(before.get(name) != getattr(options, name) for name in ("dataset", "data_dir")):
        return
    differing = [
        f"--{name}={format_value(before[name])}"
        for name in _SPLITTING
        if before.get(name, getattr(options, name)) != getattr(options, name)
    ]
    if differing:
        logger.warning(
            f"{path} was trained with {', '.join(differing)}: it may have seen images that are "
            f"test images here; give the same to rule that out"
        )
