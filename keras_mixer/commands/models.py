"""Commands that use a trained model: evaluate, predict, export."""

import dataclasses
from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.shared import (
    check_writable,
    only,
    publish_scores,
    with_standard_input,
    write,
)
from keras_mixer.config.data import DatasetOptions
from keras_mixer.config.options import RATE, SEED, format_value, option
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError, path_errors
from keras_mixer.inference.export.versions import check_target
from keras_mixer.log import logger
from keras_mixer.preprocessing.corruption_constants import CORRUPTIONS, SEVERITIES
from keras_mixer.runs.open_run import read_run
from keras_mixer.runs.run import CONFIG
from keras_mixer.weights.model_folder import digest
from keras_mixer.weights.pretrained import announce, read_pretrained


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(DatasetOptions):
    """Flags of `evaluate`: those of the data, and these."""

    dataset: str | None = option(
        None,
        "Labeled images to evaluate on, as in train: folder, csv or a name (default: the data of "
        "the run; --data_dir and --labels then say where they are now).",
        heading="Data",
        basic=True,
    )
    validation_fraction: float = option(
        0.0, "Fraction of the training images that is the validation split.", **RATE
    )
    test_fraction: float = option(
        0.0, "Fraction of all images that is the test split. 0: all are scored.", **RATE
    )
    eval_split: str | None = option(
        None,
        "Split to evaluate (default: test; validation if there is none; all images of data without "
        "splits).",
        choices=SPLITS,
        heading="Evaluation",
        basic=True,
    )
    batch_size: int = option(256, "Images per batch; does not change the scores.", low=1)
    temperature: bool = option(
        False,
        "Also report calibration with temperature scaling, fitted on the validation split of the "
        "run.",
        heading="Calibration and robustness",
    )
    corruptions: tuple[str, ...] | None = option(
        None,
        "Also report the accuracy on images with these common corruptions (ImageNet-C), made at "
        "the model's image size; all, or any of the names. Frost is drawn, not photographed.",
        choices=("all", *CORRUPTIONS),
    )
    severities: tuple[int, ...] = option(
        SEVERITIES, "Severities of the corruptions, from 1 to 5.", low=1, high=5
    )
    seed: int = option(0, "Seed of the corruptions.", **SEED)
    format: str = option("table", "Output format.", choices=("table", "json"), heading="Output")
    output: str | None = option(None, "Write the scores as JSON to this file, too.")


def evaluate(options, arguments):
    """Evaluates a run, or any weights, on labeled images: accuracy, calibration, robustness."""
    path = only(arguments, "RUN or checkpoint")
    if options.output:
        check_writable(options.output)
    on_own_data = options.dataset is None
    subject, validation = (_run_on_own_data if on_own_data else _on_other_data)(path, options)
    from keras_mixer.inference.evaluate import evaluate_subject
    from keras_mixer.inference.robustness import as_table

    scores = evaluate_subject(subject, validation) | _robustness(subject, options)
    publish_scores(scores, options, as_table)


def _robustness(subject, options):
    """Returns the requested accuracies on corrupted images."""
    from keras_mixer.inference.robustness import corruption_scores

    scores = {}
    if options.corruptions:
        every = "all" in options.corruptions
        names = CORRUPTIONS if every else dict.fromkeys(options.corruptions)
        severities = sorted(set(options.severities))
        scores["corruptions"] = corruption_scores(subject, names, severities, options.seed)
    return scores


def _run_on_own_data(path, options):
    """Returns (`Subject`, images to fit a temperature on, or None) of a run and its own data."""
    for field in dataclasses.fields(DatasetOptions):
        value, default = getattr(options, field.name), getattr(EvaluateOptions, field.name)
        if value != default and field.name not in ("data_dir", "labels"):
            raise InputError(
                f"--{field.name}={format_value(value)} is for other data than the run's, which "
                f"need --dataset"
            )
    run = _run_of(path, options)
    split = run.dataset.split_to_score(options.eval_split)
    run.dataset.split(split)
    validation = _validation_images(path, run) if options.temperature else None
    if options.temperature and split == "validation":
        logger.warning("the temperature is fitted on the images that are scored, which flatters it")
    with quiet_tensorflow():
        from keras_mixer.inference.evaluate import subject_of_run

    return subject_of_run(run, split, options.batch_size), validation


def _validation_images(path, run):
    """Returns the validation images of a run, or complains for --temperature; None: no run."""
    if run is None or run.dataset.validation is None:
        raise InputError(
            f"--temperature: expected a run with a validation split, on which it is fitted; "
            f"{path} {'has none' if run else 'is no run'}"
        )
    return run.dataset.validation


def _run_of(path, options):
    """Opens a run; explains what else the arguments may have been meant for."""
    other = "--dataset=folder --data_dir=..."
    with path_errors(path):
        weights = ":" in path and not Path(path).exists()  # such as preset:cifar10
        if weights or (Path(path).exists() and not (Path(path) / CONFIG).exists()):
            raise InputError(
                f"{path}: no run, so it has no data; say on which to score it: {other}"
            )
    try:
        return read_run(path, options.data_dir, options.labels)
    except InputError as error:
        if options.data_dir is None or "other data" not in str(error):
            raise
        raise InputError(
            f"--data_dir={options.data_dir} does not hold the data of {path}; to score it on other "
            f"images: {other}"
        ) from error


def _on_other_data(path, options):
    """Returns (`Subject`, images to fit a temperature on, or None) of a run or other weights."""
    pretrained = announce(read_pretrained(path), path)
    dataset = open_dataset(**options.dataset_options(), least_classes=1)
    validation = None
    if options.temperature:
        is_run = (Path(path) / CONFIG).exists()
        validation = _validation_images(path, read_run(path) if is_run else None)
    with quiet_tensorflow():
        from keras_mixer.inference.evaluate import subject_of_weights

    chosen = (options.eval_split, options.batch_size)
    return subject_of_weights(pretrained, path, dataset, *chosen), validation


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Flags of `predict`."""

    top_k: int = option(5, "Classes reported for each image; --format=kaggle reports all.", low=1)
    format: str = option(
        "table",
        "Output format. kaggle: a submission, with the probability of every class.",
        choices=("table", "json", "csv", "kaggle"),
    )
    output: str | None = option(None, "Write to this file instead of printing.")
    output_dir: str | None = option(
        None,
        "Write files of --shard_size images to this folder. The same command goes on with what is "
        "left, and several processes share the work.",
        heading="Many images",
    )
    shard_size: int = option(10_000, "Images in each file of --output_dir.", low=1)


def predict(options, arguments):
    """Classifies images (files, folders, globs; - for stdin); status 1 if any cannot be read.

    On standard input, - expects one image, or names of images, one per line or separated by NUL.
    """
    if len(arguments) < 2:
        raise InputError("expected a run and at least one image, folder or glob")
    _check_predict_outputs(options)
    run, *images = arguments
    pretrained = announce(read_pretrained(run), run)
    images = with_standard_input(images)
    with quiet_tensorflow():
        from keras_mixer.inference.predict import expand, predictions_as_text
        from keras_mixer.weights.load import build_pretrained

    images = expand(images)
    shards = _open_shards(options, images, pretrained) if options.output_dir else None
    model = build_pretrained(pretrained, run)
    if shards:
        failed = _predict_in_shards(shards, model)
    else:
        text, failed = predictions_as_text(model, images, options.format, options.top_k)
        write(options.output, text) if options.output else print(text, end="")
    return 1 if failed else 0


def _open_shards(options, images, pretrained):
    from keras_mixer.inference.shards import Shards

    if not all(isinstance(image, str) for image in images):
        raise InputError("--output_dir: expected names of images, received one on standard input")
    how = {"size": options.shard_size, "format": options.format, "top_k": options.top_k}
    return Shards(options.output_dir, images, digest(pretrained.arrays), **how)


def _predict_in_shards(shards, model):
    """Writes predictions to --output_dir; returns the number of images that cannot be read."""
    predicted, failed = shards.predict(model)
    print(
        f"{len(shards.images):,} images in {shards.folder}: {predicted:,} predicted, "
        f"{failed:,} could not be read"
    )
    return failed


def _check_predict_outputs(options):
    if options.output and options.output_dir:
        raise InputError("--output and --output_dir: give one of them, a file or a folder")
    if options.output:
        check_writable(options.output)
    if options.shard_size != PredictOptions.shard_size and not options.output_dir:
        raise InputError(f"--shard_size={options.shard_size} needs --output_dir")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Flags of `export`."""

    name: str = option("mlp_mixer", "Name of the exported model.", plain_name=True)
    export_dir: str = option("saved_models", "Folder for exports: export_dir/name/version/.")


def export(options, arguments):
    """Exports a run's best weights, or any others, as a SavedModel that takes raw images."""
    path = only(arguments, "RUN or checkpoint")
    pretrained = announce(read_pretrained(path), path)
    check_target(options.export_dir, options.name, pretrained.spec)
    with quiet_tensorflow():
        from keras_mixer.inference.export.saved_model import export_model

    print(export_model(path, options.export_dir, options.name))
