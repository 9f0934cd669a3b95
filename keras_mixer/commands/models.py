"""Commands that use a trained model: evaluate, predict, export."""

import dataclasses
import json
from pathlib import Path

from keras_mixer.commands.shared import check_writable, only, write
from keras_mixer.config.options import option
from keras_mixer.console import quiet_tensorflow
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError, path_errors
from keras_mixer.training.open_run import read_run
from keras_mixer.weights.model_folder import is_model_folder
from keras_mixer.weights.pretrained import announce, read_pretrained


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Flags of `evaluate`."""

    eval_split: str = option("test", "Split to evaluate.", choices=SPLITS)
    data_dir: str | None = option(None, "New folder of the run's data, if moved.")
    labels: str | None = option(None, "New path of its CSV label file, if moved.")
    batch_size: int = option(256, "Images per batch; does not change the scores.", low=1)
    format: str = option("table", "Output format.", choices=("table", "json"))
    output: str | None = option(None, "Write the scores as JSON to this file, too.")


def evaluate(options, arguments):
    """Evaluates a run: accuracy, loss, and precision, recall and F1 of every class."""
    run = read_run(only(arguments, "RUN"), options.data_dir, options.labels)
    run.dataset.split(options.eval_split)
    if options.output:
        check_writable(options.output)
    with quiet_tensorflow():
        from keras_mixer.inference.evaluate import as_table, evaluate_run

    scores = evaluate_run(run, options.eval_split, options.batch_size)
    text = json.dumps(scores, indent=2)
    if options.output:
        write(options.output, text + "\n")
    print(text if options.format == "json" else as_table(scores))


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


def predict(options, arguments):
    """Classifies images (files, folders, globs); the exit status is 1 if any cannot be read."""
    if len(arguments) < 2:
        raise InputError("expected a run and at least one image, folder or glob")
    run, *images = arguments
    pretrained = announce(read_pretrained(run), run)
    if options.output:
        check_writable(options.output)
    with quiet_tensorflow():
        from keras_mixer.inference.predict import expand, predictions_as_text
        from keras_mixer.weights.load import build_pretrained

    model = build_pretrained(pretrained, run)
    text, complete = predictions_as_text(model, expand(images), options.format, options.top_k)
    write(options.output, text) if options.output else print(text, end="")
    return 0 if complete else 1


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Flags of `export`."""

    name: str = option("mlp_mixer", "Name of the exported model.", plain_name=True)
    export_dir: str = option("saved_models", "Folder for exports: export_dir/name/version/.")


def export(options, arguments):
    """Exports a run's best weights as a SavedModel with its preprocessing inside."""
    run = Path(only(arguments, "RUN"))
    with path_errors(run):
        folder = next((f for f in (run / "best", run) if is_model_folder(f)), None)
    if folder is None:
        raise InputError(f"{run}: not a run directory (it holds no best/model.json)")
    with quiet_tensorflow():
        from keras_mixer.inference.export import export_model

    print(export_model(folder, options.export_dir, options.name))
