"""Commands that use a trained model: evaluate, predict, export."""

import dataclasses
from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.shared import (
    check_writable,
    publish_scores,
    read_standard_input,
    single_argument,
    write,
)
from keras_mixer.config.data import DatasetOptions
from keras_mixer.config.options import PIXELS, RATE, SEED, flags_of, format_value, option
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.files import read_regular
from keras_mixer.inference.export.formats import FORMATS
from keras_mixer.inference.export.formats import export as export_model
from keras_mixer.inference.published import published_accuracy
from keras_mixer.preprocessing.corruption_constants import CORRUPTIONS, SEVERITIES
from keras_mixer.runs.open_run import read_run
from keras_mixer.runs.run import note_unfinished
from keras_mixer.weights.model_folder import digest
from keras_mixer.weights.pretrained import log_pretrained, read_pretrained

# === evaluate ===

_MOST_BYTES = 100_000_000  # of a file of class names


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
    expected: str | None = option(
        None,
        "Compare top-1 with this accuracy, a fraction; exit status 1 if they do not agree. They "
        "agree if it lies in the Wilson interval. published: that of released weights. recorded: "
        "that in metrics.json of the run, which must agree to the image.",
        basic=True,
    )
    confidence: float = option(
        0.95, "Confidence level of the interval for --expected.", above=0.0, below=1.0
    )
    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images fed to the model, in pixels; the weights are adapted to it "
        "(default: the checkpoint's).",
        **PIXELS,
    )
    class_names: str | None = option(
        None,
        "File with the names of the model's classes in its order, one per line (default: those of "
        "the weights; without, those of the data: in numeric order if they are numbers).",
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
    output: str | None = option(None, "Also write the scores as JSON to this file.")


def evaluate(options, arguments):
    """Evaluates a run, or any weights, on labeled images: accuracy, calibration, robustness."""
    path = single_argument(arguments, "RUN or checkpoint")
    if options.output:
        check_writable(options.output)
    expected = _expected(path, options)
    names = None if options.class_names is None else _read_names(options.class_names)
    if options.dataset is None:
        model, data = _open_run(path, options), None
    else:
        model, data = path, open_dataset(**options.dataset_options(), least_classes=1)
    with quiet_tensorflow():
        from keras_mixer.inference import evaluate as module

    corruptions = options.corruptions or ()
    scores = module.evaluate(
        model,
        data,
        options.eval_split,
        batch_size=options.batch_size,
        image_shape=options.image_shape,
        temperature=options.temperature,
        corruptions=CORRUPTIONS if "all" in corruptions else tuple(dict.fromkeys(corruptions)),
        severities=sorted(set(options.severities)),
        seed=options.seed,
        expected=expected,
        confidence=options.confidence,
        class_names=names,
    ).scores
    publish_scores(scores, options, module.as_table)
    return 0 if expected is None or scores["expected"]["agrees"] else 1


def _read_names(file):
    """Returns the lines of the file of --class_names."""
    try:
        return read_regular(Path(file), _MOST_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--class_names={file}: expected a text file with one class name per line ({error})"
        ) from error


def _expected(path, options):
    """Returns the value of --expected as `keras_mixer.evaluate` takes it."""
    if options.expected == "published":
        return published_accuracy(path, options.dataset, options.eval_split or "test")
    if options.expected in (None, "recorded"):
        return options.expected
    try:
        fraction = float(options.expected)
        if 0 <= fraction <= 1:
            return fraction
    except ValueError:
        pass
    raise InputError(
        f"--expected: expected a fraction from 0 to 1, published or recorded, received "
        f"{options.expected}"
    )


def _open_run(path, options):
    """Opens the run to evaluate on its own data, and refuses flags for other data."""
    for field in flags_of(DatasetOptions):
        value, default = getattr(options, field.name), getattr(EvaluateOptions, field.name)
        if value != default and field.name not in ("data_dir", "labels"):
            raise InputError(
                f"--{field.name}={format_value(value)} is for other data than the run's, which "
                f"need --dataset"
            )
    note_unfinished(path)
    try:
        return read_run(path, options.data_dir, options.labels)
    except InputError as error:
        raise InputError(
            f"{error}; to evaluate on other images: --dataset=folder --data_dir=..."
        ) from error


# === predict ===


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
        "Write files of --shard_size images to this folder. The same command continues where it "
        "stopped, and several processes share the work.",
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
    pretrained = log_pretrained(read_pretrained(run), run)
    if "-" in images:
        index = images.index("-")
        images[index : index + 1] = read_standard_input()
    with quiet_tensorflow():
        from keras_mixer.inference.predict import expand, predictions_as_text
        from keras_mixer.weights.load import build_pretrained

    images = expand(images)
    shards = _open_shards(options, images, pretrained) if options.output_dir else None
    note_unfinished(run)
    model = build_pretrained(pretrained, run)
    if shards:
        failed = _predict_in_shards(shards, model)
    else:
        text, failed = predictions_as_text(model, images, options.format, options.top_k)
        write(options.output or "-", text)
    return 1 if failed else 0


def _check_predict_outputs(options):
    if options.output and options.output_dir:
        raise InputError("--output and --output_dir: give one of them, a file or a folder")
    if options.output:
        check_writable(options.output)
    if options.shard_size != PredictOptions.shard_size and not options.output_dir:
        raise InputError(f"--shard_size={options.shard_size} needs --output_dir")


def _open_shards(options, images, pretrained):
    from keras_mixer.inference.shards import Shards

    if not all(isinstance(image, str) for image in images):
        raise InputError("--output_dir: expected names of images, received one on standard input")
    return Shards(
        options.output_dir,
        images,
        digest(pretrained.arrays),
        size=options.shard_size,
        format=options.format,
        top_k=options.top_k,
    )


def _predict_in_shards(shards, model):
    """Writes predictions to --output_dir; returns the number of images that cannot be read."""
    predicted, failed = shards.predict(model)
    print(
        f"{len(shards.images):,} images in {shards.folder}: {predicted:,} predicted, "
        f"{failed:,} could not be read"
    )
    return failed


# === export ===


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Flags of `export`."""

    format: str = option(
        "saved_model",
        "Format. saved_model: a TensorFlow SavedModel that takes raw images.",
        choices=tuple(FORMATS),
    )
    name: str = option("mlp_mixer", "Name of the exported model.", plain_name=True)
    export_dir: str = option("saved_models", "Folder for exports: export_dir/name/version/.")


def export(options, arguments):
    """Exports the best weights of a run, or any others, with preprocessing, for deployment."""
    path = single_argument(arguments, "RUN or checkpoint")
    log_pretrained(read_pretrained(path), path)
    with quiet_tensorflow():
        print(export_model(path, options.format, options.export_dir, options.name))
