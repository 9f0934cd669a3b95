"""The verbs whose flags are those of training: train, preview."""

import dataclasses

from keras_mixer.commandline import option
from keras_mixer.config import Config
from keras_mixer.console import printable, say
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError
from keras_mixer.verbs.shared import check_writable, quiet_tensorflow

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
    with quiet_tensorflow():
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
    check_writable(options.output)
    run = plan_run(options)
    with quiet_tensorflow():
        from keras_mixer.studies.preview import contact_sheet

    images = min(options.images, len(run.source.train))
    contact_sheet(run, images, options.draws).save(options.output)
    print(options.output)
