"""The verbs for checkpoints of any known format: convert, verify."""

import dataclasses
import json

from keras_mixer.commandline import option
from keras_mixer.console import printable, say
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data_options import SourceOptions
from keras_mixer.errors import InputError
from keras_mixer.verbs.shared import only, quiet_tensorflow


def _image_shape():
    return option(
        None,
        "height,width of the images, in pixels; only where the file cannot tell it, which is when "
        "the number of its patches is no square.",
        low=1,
        high=65536,
    )


# === convert ===


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Flags of `convert`."""

    image_shape: tuple[int, int] | None = _image_shape()


def convert(options, arguments):
    """Rewrites a checkpoint: official .npz, timm's .safetensors, or, without suffix, our folder."""
    from keras_mixer.weights.convert import convert_checkpoint
    from keras_mixer.weights.load import summary

    if len(arguments) != 2:
        raise InputError(f"expected SOURCE and TARGET, received {len(arguments)} arguments")
    written = convert_checkpoint(*arguments, options.image_shape)
    say(f"{arguments[1]}: {summary(written)}")
    print(printable(arguments[1]))


# === verify ===


@dataclasses.dataclass(frozen=True)
class VerifyOptions(SourceOptions):
    """Flags of `verify`: those of the data, and these."""

    dataset: str | None = option(
        None,
        "Data to score it on, as for train; imagenet2012 for what was released. Left out: the data "
        "of the run that CHECKPOINT is, and the score in its metrics.json.",
    )
    eval_split: str = option("test", "Split to score, all of it.", choices=SPLITS)
    expected: float | None = option(
        None,
        "Top-1 accuracy to compare with, as a fraction, meant to 0.005 points (default: what was "
        "published).",
        low=0.0,
        high=1.0,
    )
    image_shape: tuple[int, int] | None = _image_shape()
    confidence: float = option(
        0.95, "Of the interval around the measured accuracy.", above=0.0, below=1.0
    )
    batch_size: int = option(128, "Images computed at a time; changes no score.", low=1)
    format: str = option("table", "What is printed.", choices=("table", "json"))


def verify(options, arguments):
    """Scores a checkpoint: match or no match with what was published? Exit status 1 if not."""
    from keras_mixer.inference.verify import as_text, check_classes, verify_checkpoint
    from keras_mixer.weights.load import read_checkpoint
    from keras_mixer.weights.registry import release_of

    path = only(arguments, "CHECKPOINT")
    claim, source = _claim_and_data(path, options)
    split, release = source.split(options.eval_split), release_of(path)
    if release:  # before hundreds of megabytes are downloaded
        check_classes(path, {"num_classes": release.num_classes}, None, source)
    checkpoint = read_checkpoint(path, options.image_shape)
    architecture, class_names, *_ = checkpoint.description
    check_classes(path, architecture, class_names, source)
    with quiet_tensorflow():
        import keras_mixer.inference.evaluate  # noqa: F401

    verdict = verify_checkpoint(
        checkpoint, path, split, source.class_names, claim, options.confidence, options.batch_size
    )
    title = f"{path} on {options.dataset or 'its own data'}, split {options.eval_split}"
    table = options.format == "table"
    print(as_text(verdict, title) if table else json.dumps(verdict, indent=2))
    return 0 if verdict["match"] else 1


def _claim_and_data(path, options):
    """Returns the `Claim` to be verified, and the `Source` to verify it on."""
    from keras_mixer.data.sources import load_source
    from keras_mixer.inference.verify import claim_of, claim_of_run

    if options.dataset is not None:
        claim = claim_of(path, options.dataset, options.eval_split, options.expected)
        return claim, load_source(**options.source())
    run = _own_run(path, options)
    if options.expected is not None:
        return claim_of(path, None, options.eval_split, options.expected), run.source
    return claim_of_run(run, options.eval_split), run.source


def _own_run(path, options):
    from keras_mixer.training.opening import read_run

    try:
        return read_run(path, options.data_dir, options.labels)
    except InputError as error:
        raise InputError(
            f"{error}; --dataset names other data to verify a checkpoint on"
        ) from error
