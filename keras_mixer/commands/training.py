"""Commands that take the flags of training: train, preview."""

import dataclasses
import io
import shlex
import sys

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.shared import check_writable, standard_stream, write
from keras_mixer.config.options import option
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError
from keras_mixer.files import is_special
from keras_mixer.jobs import run_job
from keras_mixer.log import logger, printable
from keras_mixer.runs.open_run import plan_run
from keras_mixer.runs.run import describe_scores


def train(config, arguments):
    """Trains a Mixer for --num_steps epochs, evaluates it once on the test set, and exports it.

    The same command resumes an interrupted run.
    """
    run = run_job(config)
    if run.group.is_main:
        print(printable(_summary(run)))
        logger.info(_next_steps(run))


def _summary(run):
    exported = [f"exported: {run.saved_model}"] if run.saved_model else []
    scores = f"{describe_scores(run.scores)} (weights of epoch {run.selected_epoch})"
    return "\n".join([scores, f"run: {run.directory}", *exported])


def _next_steps(run):
    """Returns commands to go on with, as text."""
    directory = shlex.quote(str(run.directory))
    steps = {
        f"keras-mixer evaluate {directory}": "precision, recall and confusion by class",
        f"keras-mixer predict {directory} IMAGE...": "the most likely classes of images",
        f"keras-mixer report {directory}": "a table of runs",
    }
    width = max(map(len, steps))
    return "\n".join(["next:", *(f"  {step:<{width}}  {what}" for step, what in steps.items())])


@dataclasses.dataclass(frozen=True)
class PreviewOptions(Config):
    """Flags of `preview`: those of `train`, and these."""

    output: str = option(
        "preview.png", "Output file (.png); -: standard output.", heading="Preview"
    )
    images: int = option(8, "Number of training images, one per row.", low=1, high=100)
    draws: int = option(8, "Number of augmented versions, one per column.", low=0, high=100)


def preview(options, arguments):
    """Draws training images as they are augmented, with the same flags as train."""
    plain = not (standard_stream(options.output) or is_special(options.output))
    if plain and not options.output.endswith(".png"):
        raise InputError(f"--output={options.output}: expected a name that ends in .png")
    check_writable(options.output)
    run = plan_run(options)
    with quiet_tensorflow():
        from keras_mixer.reports.preview import contact_sheet

    images = min(options.images, len(run.dataset.train))
    picture = io.BytesIO()
    contact_sheet(run, images, options.draws).save(picture, "PNG")
    write(options.output, picture.getvalue())
    if standard_stream(options.output) is not sys.stdout:
        print(options.output)
