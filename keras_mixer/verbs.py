"""The verbs of the command line: what each does, and the flags it takes.

Mistakes are reported before TensorFlow is imported, which is why its users are imported where they
are called.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from keras_mixer.commandline import as_flags, option, parse
from keras_mixer.config import Config
from keras_mixer.console import printable, say, track
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import write_atomically

# === train ===


def train(config, arguments):
    """Trains a Mixer, scores it and exports it; given again, continues where it stopped."""
    from keras_mixer.training.opening import open_run

    with open_run(config) as run:
        if run.finished:
            say(f"{run.directory} is complete; nothing was changed")
        else:
            _train_score_export(run)
        print(printable(_summary(run)))


def _train_score_export(run):
    with _quiet_tensorflow():
        from keras_mixer.inference.evaluate import score_run
        from keras_mixer.inference.export import export_model
        from keras_mixer.training.fit import train as train_weights

    train_weights(run)
    metrics = score_run(run)
    if run.config.export and "saved_model" not in metrics:
        target = export_model(run.best, run.config.export_dir, run.config.name)
        run.write_metrics(metrics | {"saved_model": str(target)})


def _summary(run):
    metrics = run.metrics()
    scores = [
        f"{name}: {metrics[name]['top1']:.2%} of {metrics[name]['n']:,} images"
        for name in SPLITS
        if name in metrics
    ]
    chosen = f"weights of epoch {metrics['selected_epoch']}"
    exported = [f"exported: {metrics['saved_model']}"] if "saved_model" in metrics else []
    return "\n".join([f"{', '.join(scores)} ({chosen})", f"run: {run.directory}", *exported])


# === evaluate ===


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Flags of `evaluate`."""

    eval_split: str = option("test", "Split to score.", choices=SPLITS)
    data_dir: str | None = option(None, "Where the run's data are now, if they moved.")
    labels: str | None = option(None, "Where its table of labels is now, if it moved.")
    batch_size: int = option(128, "Images computed at a time; changes no score.", low=1)
    format: str = option("table", "What is printed.", choices=("table", "json"))
    output: str | None = option(None, "Write the scores as JSON to this file, too.")


def evaluate(options, arguments):
    """Scores a run: top-1, top-5, loss, and precision, recall and F1 of every class."""
    from keras_mixer.training.opening import read_run

    run = read_run(_only(arguments, "RUN"), options.data_dir, options.labels)
    run.source.split(options.eval_split)
    if options.output:
        _check_writable(options.output)
    with _quiet_tensorflow():
        from keras_mixer.inference.evaluate import as_table, evaluate_run

    scores = evaluate_run(run, options.eval_split, options.batch_size)
    text = json.dumps(scores, indent=2)
    if options.output:
        _write(options.output, text + "\n")
    print(text if options.format == "json" else as_table(scores))


# === predict ===


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Flags of `predict`."""

    top_k: int = option(5, "Classes reported for each image; --format=kaggle has all.", low=1)
    format: str = option(
        "table",
        "What is printed. kaggle: a submission, with the probability of every class.",
        choices=("table", "json", "csv", "kaggle"),
    )
    output: str | None = option(None, "Print to this file instead.")


def predict(options, arguments):
    """Classifies images: files, folders and globs. Exit status 1 if any cannot be read."""
    from keras_mixer.weights.load import read_checkpoint

    if len(arguments) < 2:
        raise InputError("expected a run and at least one image, folder or glob")
    run, *images = arguments
    checkpoint = read_checkpoint(run)
    if options.output:
        _check_writable(options.output)
    with _quiet_tensorflow():
        from keras_mixer.inference.predict import expand
        from keras_mixer.weights.load import model_of

    paths = expand(images)
    written = _submission if options.format == "kaggle" else _likeliest
    text, failed = written(options, paths, checkpoint, lambda: model_of(checkpoint, run))
    _write(options.output, text) if options.output else print(text, end="")
    return 1 if failed else 0


def _likeliest(options, paths, checkpoint, load):
    """Returns the text of the likeliest classes, and whether any image cannot be read."""
    from keras_mixer.inference.predict import FORMATS, predict_files

    rows = predict_files(load(), checkpoint.description, paths, options.top_k)
    rows = list(track(rows, "predicting", len(paths)))
    return FORMATS[options.format](rows), any("error" in row for row in rows)


def _submission(options, paths, checkpoint, load):
    """Returns the text of a submission to Kaggle, and whether images are missing from it."""
    from keras_mixer.inference.predict import (
        as_submission,
        classify,
        names_of,
        submission_ids,
    )

    ids = submission_ids(paths)
    rows = classify(load(), checkpoint.description, paths)
    found = list(track(rows, "predicting", len(paths)))
    problems = [(path, reason) for path, reason in found if isinstance(reason, str)]
    for path, reason in problems:
        say(f"{path}: {reason}; it is not in the submission")
    rows = [(id, p) for id, (_, p) in zip(ids, found, strict=True) if not isinstance(p, str)]
    return as_submission(rows, names_of(checkpoint.description)), bool(problems)


# === export ===


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Flags of `export`."""

    name: str = option("mlp_mixer", "Name of the exported model.", plain_name=True)
    export_dir: str = option("saved_models", "Where exports land: export_dir/name/version/.")


def export(options, arguments):
    """Exports a run's best weights as a SavedModel with its preprocessing inside."""
    from keras_mixer.weights import native

    run = Path(_only(arguments, "RUN"))
    with path_errors(run):
        folder = next((f for f in (run / "best", run) if native.is_native(f)), None)
    if folder is None:
        raise InputError(f"{run}: not a run directory (it holds no best/model.json)")
    with _quiet_tensorflow():
        from keras_mixer.inference.export import export_model

    print(export_model(folder, options.export_dir, options.name))


# === convert ===


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Flags of `convert`."""

    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images, in pixels; only where SOURCE cannot tell it, which is when the"
        " number of its patches is no square.",
        low=1,
        high=65536,
    )


def convert(options, arguments):
    """Rewrites a checkpoint: official .npz, timm's .safetensors, or, without suffix, our folder."""
    from keras_mixer.weights.convert import convert_checkpoint
    from keras_mixer.weights.load import summary

    if len(arguments) != 2:
        raise InputError(f"expected SOURCE and TARGET, received {len(arguments)} arguments")
    written = convert_checkpoint(*arguments, options.image_shape)
    say(f"{arguments[1]}: {summary(written)}")
    print(printable(arguments[1]))


# === report ===


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Flags of `report`."""

    output: str | None = option(None, "Write the table to this file instead of printing it.")
    presets: str = option("flags", "Folder of flagfiles; a run that follows one is called by it.")


def report(options, arguments):
    """Tabulates finished runs, those that differ only in their seed as mean ± std."""
    from keras_mixer.studies.report import tabulate

    if not arguments:
        raise InputError("expected at least one RUN")
    table = tabulate(arguments, _presets(Path(options.presets)))
    if options.output:
        command = shlex.join(["keras-mixer", "report", *arguments, f"--output={options.output}"])
        table = f"{table}\nGenerated by `{command}`.\n"
        _write(options.output, table)
    else:
        print(table, end="")


def _presets(folder):
    presets = {}
    for path in sorted(folder.glob("*.flags")):
        try:
            presets[path.as_posix()] = set(as_flags(parse(Config, [f"--flagfile={path}"])[0]))
        except InputError as error:
            raise InputError(f"{path}: {error}; mend it, or give another --presets") from error
    return presets


# === preview ===


@dataclasses.dataclass(frozen=True)
class PreviewOptions(Config):
    """Flags of `preview`: those of `train`, and these."""

    output: str = option("preview.png", "The picture.", heading="Preview")
    images: int = option(8, "Training images, a row each.", low=1, high=100)
    draws: int = option(8, "Augmented draws of each, a column each.", low=0, high=100)


def preview(options, arguments):
    """Draws training images as the model will see them, under the same flags as train."""
    from keras_mixer.training.opening import plan_run

    if not options.output.endswith(".png"):
        raise InputError(f"--output={options.output}: expected a name that ends in .png")
    _check_writable(options.output)
    run = plan_run(options)
    with _quiet_tensorflow():
        from keras_mixer.studies.preview import contact_sheet

    images = min(options.images, len(run.source.train))
    contact_sheet(run, images, options.draws).save(options.output)
    print(options.output)


# === All of them ===


class Verb(NamedTuple):
    """A command: what it does, what it takes."""

    run: object
    options: type
    arguments: str | None


VERBS = {
    "train": Verb(train, Config, None),
    "evaluate": Verb(evaluate, EvaluateOptions, "RUN"),
    "predict": Verb(predict, PredictOptions, "RUN IMAGE..."),
    "export": Verb(export, ExportOptions, "RUN"),
    "convert": Verb(convert, ConvertOptions, "SOURCE TARGET"),
    "preview": Verb(preview, PreviewOptions, None),
    "report": Verb(report, ReportOptions, "RUN..."),
}


# === What they share ===


def _only(arguments, what):
    if len(arguments) != 1:
        raise InputError(f"expected exactly one {what}, received {len(arguments)}")
    return arguments[0]


def _check_writable(path):
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise InputError(f"--output={path}: its folder does not exist, or it is itself a folder")


def _write(path, text):
    _check_writable(path)
    write_atomically(Path(path), text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def _quiet_tensorflow():
    """Keeps TensorFlow's start-up chatter, which no flag silences whole, off the terminal.

    TensorFlow 2.21 prints about oneDNN and missing CUDA libraries before its own log level is read
    (https://github.com/tensorflow/tensorflow/issues/100442). Errors are exceptions, and pass.
    """
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        raise InputError(f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}: expected tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "tensorflow" in sys.modules or os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow

        tensorflow.config.list_physical_devices()
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
