"""Commands that take the flags of training: train, preview."""

import dataclasses

from keras_mixer.commands.shared import check_writable
from keras_mixer.config.options import option
from keras_mixer.config.training import Config
from keras_mixer.console import printable, quiet_tensorflow
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError
from keras_mixer.jobs import run_job
from keras_mixer.training.open_run import plan_run


def train(config, arguments):
    """Trains a Mixer for --num_steps epochs, evaluates it once on the test set, and exports it.

    The same command resumes an interrupted run.
    """
    print(printable(_summary(run_job(config))))


def _summary(run):
    metrics, facts = run.scores, run.facts
    scores = [
        f"{name}: {metrics[name]['top1']:.2%} of {metrics[name]['n']:,} images"
        for name in SPLITS
        if name in metrics
    ]
    chosen = f"weights of epoch {facts['selected_epoch']}"
    exported = [f"exported: {facts['saved_model']}"] if "saved_model" in facts else []
    return "\n".join([f"{', '.join(scores)} ({chosen})", f"run: {run.directory}", *exported])


@dataclasses.dataclass(frozen=True)
class PreviewOptions(Config):
    """Flags of `preview`: those of `train`, and these."""

    output: str = option("preview.png", "Output file (.png).", heading="Preview")
    images: int = option(8, "Number of training images, one per row.", low=1, high=100)
    draws: int = option(8, "Number of augmented versions, one per column.", low=0, high=100)


def preview(options, arguments):
    """Draws training images as they are augmented, with the same flags as train."""
    if not options.output.endswith(".png"):
        raise InputError(f"--output={options.output}: expected a name that ends in .png")
    check_writable(options.output)
    run = plan_run(options)
    with quiet_tensorflow():
        from keras_mixer.studies.preview import contact_sheet

    images = min(options.images, len(run.dataset.train))
    contact_sheet(run, images, options.draws).save(options.output)
    print(options.output)
