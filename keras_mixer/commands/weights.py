"""Commands for pretrained weights: convert, verify."""

import dataclasses
import json

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.shared import only
from keras_mixer.config.data import DatasetOptions
from keras_mixer.config.options import FRACTION, PIXELS, named_as_flags, option
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.inference.verify import (
    as_text,
    check_classes,
    claim_of,
    claim_of_run,
    verify_accuracy,
)
from keras_mixer.log import logger, printable
from keras_mixer.reports.experiments import provenance_of
from keras_mixer.runs.open_run import read_run
from keras_mixer.weights.convert import convert_weights
from keras_mixer.weights.pretrained import log_pretrained, read_unadapted, summary
from keras_mixer.weights.registry import release_of


def _image_shape():
    return option(
        None,
        "height,width of the images that the weights are for, in pixels. Needed where a file has "
        "only the number of patches (.npz, timm's, .weights.h5) and their grid is not square, as "
        "in 2×8 patches, which would be taken for 4×4.",
        **PIXELS,
    )


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Flags of `convert`."""

    image_shape: tuple[int, int] | None = _image_shape()
    mean: tuple[float, ...] | None = option(
        None,
        "Mean that timm subtracts from images in [0, 1]: one number, or one for each channel "
        "(default: 0.5). Only for files of timm without the config.json of the Hugging Face hub "
        "beside them. --mean and --std are folded into the weights, which then take images in "
        "[-1, 1] like all others; such as 0 and 1 for timm's miil weights "
        "(mixer_b16_224.miil_in21k and its ImageNet-1k version).",
    )
    std: tuple[float, ...] | None = option(
        None, "Standard deviation that timm then divides by, likewise (default: 0.5)."
    )


def convert(options, arguments):
    """Converts weights to official .npz, timm's .safetensors or, without suffix, a model folder."""
    if len(arguments) != 2:
        raise InputError(f"expected SOURCE and TARGET, received {len(arguments)} arguments")
    with named_as_flags(type(options)):
        written = convert_weights(
            *arguments, options.image_shape, options.mean, options.std, provenance_of(arguments[0])
        )
    logger.info(f"{arguments[1]}: {summary(written)}")
    if written.spec.provenance:
        logger.info(printable(written.spec.provenance))
    print(printable(arguments[1]))


@dataclasses.dataclass(frozen=True)
class VerifyOptions(DatasetOptions):
    """Flags of `verify`: those of the data, and these."""

    dataset: str | None = option(
        None,
        "Dataset to evaluate on, as for train; imagenet2012 for released files (default: that of "
        "the run, compared with its metrics.json).",
    )
    eval_split: str = option("test", "Split to evaluate, all of it.", choices=SPLITS)
    expected: float | None = option(
        None,
        "Top-1 accuracy to compare with, as a fraction (default: the published one).",
        **FRACTION,
    )
    image_shape: tuple[int, int] | None = _image_shape()
    confidence: float = option(
        0.95, "Confidence level of the interval for the measured accuracy.", above=0.0, below=1.0
    )
    batch_size: int = option(256, "Images per batch; does not change the scores.", low=1)
    format: str = option("table", "Output format.", choices=("table", "json"))


def verify(options, arguments):
    """Checks that weights reach their published accuracy; the exit status is 1 if they do not."""
    path = only(arguments, "CHECKPOINT")
    claim, dataset = _claim_and_data(path, options)
    split, release = dataset.split(options.eval_split), release_of(path)
    if release:  # before hundreds of megabytes are downloaded
        check_classes(path, dataset, release.num_classes)
    pretrained = read_unadapted(path, options.image_shape)
    sizes, class_names = pretrained.spec.architecture, pretrained.spec.class_names
    check_classes(path, dataset, sizes.num_classes, sizes.channels, class_names)
    log_pretrained(pretrained, path)
    with quiet_tensorflow():
        import keras_mixer.inference.evaluate  # noqa: F401

    result = verify_accuracy(
        pretrained, path, split, dataset.class_names, claim, options.confidence, options.batch_size
    )
    title = f"{path} on {options.dataset or 'its own data'}, split {options.eval_split}"
    table = options.format == "table"
    print(as_text(result, title) if table else json.dumps(result, indent=2))
    return 0 if result["match"] else 1


def _claim_and_data(path, options):
    """Returns the `Claim` to verify and the `Dataset` to verify it on."""
    if options.dataset is not None:
        claim = claim_of(path, options.dataset, options.eval_split, options.expected)
        return claim, open_dataset(**options.dataset_options())
    run = _own_run(path, options)
    if options.expected is not None:
        return claim_of(path, None, options.eval_split, options.expected), run.dataset
    return claim_of_run(run, options.eval_split), run.dataset


def _own_run(path, options):
    try:
        return read_run(path, options.data_dir, options.labels)
    except InputError as error:
        raise InputError(
            f"{error}; --dataset names other data to verify a checkpoint on"
        ) from error
