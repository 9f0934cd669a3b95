"""The verb that scores a model's features: fewshot."""

import dataclasses
import json
from pathlib import Path

from keras_mixer.commandline import option, shown
from keras_mixer.console import say
from keras_mixer.data_options import SourceOptions
from keras_mixer.errors import InputError, path_errors
from keras_mixer.resolve import check_eval_crop
from keras_mixer.verbs.shared import check_writable, only, quiet_tensorflow, write
from keras_mixer.weights.resize import RESIZE_TOKENS


@dataclasses.dataclass(frozen=True)
class FewshotOptions(SourceOptions):
    """Flags of `fewshot`: those of the data, and these."""

    validation_fraction: float = option(
        0.1,
        "Share of the training images set aside to choose L2 with, stratified, where the data "
        "bring no validation split. 0: none, and L2 is chosen by cross-validation on the shots.",
        low=0.0,
        below=1.0,
    )
    shots: tuple[int, ...] = option(
        (1, 5, 10, 25),
        "Numbers of training images of every class.",
        low=1,
        high=1_000_000,
        heading="Regression",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "Draws of them; the scores are the mean over these.", low=0, high=2**31 - 1
    )
    l2: tuple[float, ...] = option(
        tuple(4**power for power in range(11)),
        "Weights of the L2 penalty to choose from, for each number of shots; the test images take "
        "no part. A single one is taken as it is: 1024 is the official code's.",
        low=1e-6,
        high=1e12,
    )
    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images fed to the model, in pixels, to which its weights are adapted "
        "(default: the checkpoint's).",
        low=1,
        high=65536,
        heading="Model",
    )
    patch_shape: tuple[int, int] | None = option(
        None, "height,width of a patch, in pixels, likewise.", low=1, high=65536
    )
    resize_tokens: str = option(
        "interpolate",
        "How token mixing is adapted to another grid of patches, as in train; tiles would need "
        "training, which nothing here does.",
        choices=RESIZE_TOKENS,
    )
    eval_crop: float | None = option(
        None,
        "How images are fitted to image_shape, as in train (default: as the checkpoint says).",
        low=0.0,
        high=1.0,
    )
    batch_size: int = option(128, "Images computed at a time; changes no score.", low=1)
    format: str = option("table", "What is printed.", choices=("table", "json"), heading="Output")
    output: str | None = option(None, "Write the scores as JSON to this file, too.")


def fewshot(options, arguments):
    """Scores a model's pre-logits: ridge regression on a few images of every class."""
    from keras_mixer.data.sources import load_source
    from keras_mixer.weights.load import adapt_checkpoint, introduced, read_checkpoint

    path = only(arguments, "CHECKPOINT")
    if options.output:
        check_writable(options.output)
    check_eval_crop(options.eval_crop or 0.0)
    checkpoint = introduced(read_checkpoint(path, options.image_shape), path)
    source = load_source(**options.source())
    _check(options, source, path, checkpoint.description.architecture["channels"])
    _note_other_splits(options, source, path)
    shapes = (options.image_shape, options.patch_shape, options.resize_tokens)
    scores = _scores(options, source, path, adapt_checkpoint(checkpoint, *shapes))
    text = json.dumps(scores, indent=2)
    if options.output:
        write(options.output, text + "\n")
    print(text if options.format == "json" else _as_table(scores))


def _scores(options, source, path, checkpoint):
    with quiet_tensorflow():
        from keras_mixer.inference.fewshot import score_fewshot
        from keras_mixer.weights.load import model_of

    crop = options.eval_crop
    crop = checkpoint.description.eval_crop if crop is None else crop
    chosen = (options.shots, options.seeds, options.l2)
    scores = score_fewshot(model_of(checkpoint, path), source, *chosen, crop, options.batch_size)
    return {"checkpoint": str(path), "dataset": options.dataset, **scores}


def _as_table(scores):
    from keras_mixer.inference.fewshot import as_table

    return as_table(scores)


def _check(options, source, path, channels):
    """Refuses what cannot be scored."""
    if channels != source.channels:
        raise InputError(
            f"{path}: it was trained on images of {channels} channels, --dataset={options.dataset} "
            f"has {source.channels}"
        )
    if source.test is None:
        raise InputError(
            f"--dataset={options.dataset}: there are no test images to score; give "
            f"--test_fraction, or --test_split of a set of tensorflow-datasets"
        )


# What decides which images are trained on and which are test images.
_SPLITTING = ("train_split", "test_split", "test_fraction", "split_seed")


def _note_other_splits(options, source, path):
    """Says so when a run may have been trained on images that are test images here."""
    from keras_mixer.training.run import BEST, read_record

    with path_errors(path):
        record = read_record(path) if (Path(path) / BEST).is_dir() else None
    if record is None or record["data"]["identity"] == source.identity:
        return
    before = record["config"]
    if any(before.get(name) != getattr(options, name) for name in ("dataset", "data_dir")):
        return
    differing = [
        f"--{name}={shown(before[name])}"
        for name in _SPLITTING
        if before.get(name, getattr(options, name)) != getattr(options, name)
    ]
    if differing:
        say(
            f"{path} was trained under {', '.join(differing)}: it may have seen images that are "
            f"test images here; give the same to rule that out"
        )
