"""Shows what four flaws of a public Mixer trainer cost, one at a time, with everything else equal.

    python tools/show_flaws.py --output=results/flaws.md --plot=results/flaws.png \
        -- --preset=photos_scratch --data_dir=data/photos

The flaws: one mixer layer applied `depth` times, whose weights are shared; a cosine and a linear
schedule that count batches where epochs are meant, and whose fractions are wrong; augmentation of
validation images. Flags after -- are those of train. Every arm is trained with each seed for the
same number of steps, at the same peak learning rate, and its last weights are scored.

The trainer itself ends with an error after its first epoch, as it calls a method that no module of
PyTorch has. The optimizer, the augmentation and the choice of weights are not the trainer's but
ours, so that each arm differs in one flaw alone.

Source: ngocphucck/MLP-Mixer, commit 45309c3.
"""

import argparse
import math
import shlex
import sys
import time
from typing import NamedTuple

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.shared import check_writable, write
from keras_mixer.compute.environment import environment
from keras_mixer.config.command_line import parse
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError
from keras_mixer.log import logger, track
from keras_mixer.reports.markdown import spread, table
from keras_mixer.reports.report import describe_machine
from keras_mixer.runs.open_run import plan_run

with quiet_tensorflow():
    import keras
    import numpy as np
    import tensorflow as tf
    from matplotlib.figure import Figure

    from keras_mixer.compute.plan import resolve_plan
    from keras_mixer.model.baselines import build_model
    from keras_mixer.preprocessing.input_pipeline import evaluation_batches, training_batches
    from keras_mixer.training.batches import batches_of, training_images
    from keras_mixer.training.losses import KERAS_LOSSES
    from keras_mixer.training.optimizers import build_optimizer
    from keras_mixer.training.schedules import WarmupDecay

DRAWS = 10  # of augmented validation images
# Options of train that the loop below does not have.
UNUSED = (
    *("accumulation", "checkpoint", "class_weights", "early_stopping", "ema", "freeze"),
    *("head_bias", "layer_decay", "precision", "schedule_unit", "scheduler", "stochastic_depth"),
)


class Scores(NamedTuple):
    """Top-1 accuracies of a trained model, as fractions; `augmented` is that of validation."""

    validation: float
    augmented: float
    test: float


# === Models ===


def own_layers(run):
    """Returns a Mixer of `depth` mixer layers."""
    return build_model(run.spec.architecture, dropout=run.config.dropout)


def one_layer(run):
    """Returns a Mixer whose only mixer layer is applied `depth` times."""
    sizes = run.spec.architecture
    model = build_model(sizes.replace(depth=1), dropout=run.config.dropout)
    x, block = model.get_layer("tokens").output, model.get_layer("mixer_block_0")
    for _ in range(sizes.depth):
        x = block(x)
    for name in ("pre_head_layer_norm", "pre_logits", "head"):
        x = model.get_layer(name)(x)
    return keras.Model(model.inputs, x)


# === Schedules: factors of the peak rate, by step ===


def decay(kind):
    """Returns our schedule of a kind: warm-up and decay over the steps of the run."""
    return lambda run: WarmupDecay(run.config.lr, run.warmup_steps, run.total_steps, kind)


class PerBatch(keras.optimizers.schedules.LearningRateSchedule):
    """A published schedule: epochs of the flags are taken as batches; see `PUBLISHED`."""

    def __init__(self, run, kind):
        super().__init__()
        steps = np.arange(run.total_steps + 1)
        end, warmup = run.config.num_steps, run.config.warmup_step
        factors = [PUBLISHED[kind](step, warmup, end) for step in steps.tolist()]
        self.rates = tf.constant(run.config.lr * np.array(factors), tf.float32)

    def __call__(self, step):
        return tf.gather(self.rates, tf.cast(step, tf.int32))


def _cosine(step, warmup, end):
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, end - step)))


def _linear(step, warmup, end):
    return step / warmup if step < warmup else (step - warmup) / (end - warmup)


PUBLISHED = {"cosine": _cosine, "linear": _linear}

# Name of an arm: (model, schedule), functions of a `Run`.
ARMS = {
    "cosine, as in the paper": (own_layers, decay("cosine")),
    "linear, as in the paper": (own_layers, decay("linear")),
    "one layer applied `depth` times": (one_layer, decay("cosine")),
    "published cosine": (own_layers, lambda run: PerBatch(run, "cosine")),
    "published linear": (own_layers, lambda run: PerBatch(run, "linear")),
}


# === Training ===


def train(arm, run, images):
    """Trains a model; returns (it, seconds)."""
    build, schedule = ARMS[arm]
    config = run.config
    keras.utils.set_random_seed(config.seed)
    model = build(run)
    optimizer = build_optimizer(
        config.optimizer,
        schedule(run),
        model.trainable_variables,
        momentum=config.momentum,
        decay=config.decay,
        clip_norm=config.clip_norm,
    )
    model.compile(optimizer, KERAS_LOSSES[config.loss]())
    epochs, start = run.total_steps // run.steps_per_epoch, time.monotonic()
    bar = iter(track(range(epochs), f"{arm}, seed {config.seed}"))
    model.fit(
        batches_of(run, images),
        steps_per_epoch=run.steps_per_epoch,
        epochs=epochs,
        verbose=0,
        shuffle=False,  # the pipeline does
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: next(bar))],
    )
    next(bar, None)
    return model, time.monotonic() - start


def score(model, run):
    """Returns the `Scores` of a model."""
    plain = {
        name: _accuracy(model, evaluation_batches(run.dataset.split(name), run.spec))
        for name in ("validation", "test")
    }
    augmented = [_accuracy(model, _augmented(run, draw)) for draw in range(DRAWS)]
    return Scores(plain["validation"], float(np.mean(augmented)), plain["test"])


def _augmented(run, draw):
    """Returns all validation images as one batch, augmented as in training, without mixing."""
    options = run.config.augmentation() | {"mixup": 0.0, "cutmix": 0.0}
    images = run.dataset.validation
    size = len(images)
    batches = training_batches(images, run.spec, batch_size=size, seed=draw, **options)
    return [(batch[0], tf.argmax(batch[1], axis=1)) for batch in batches.take(1)]


def _accuracy(model, batches):
    right = [np.argmax(model.predict_on_batch(x), axis=1) == np.array(y) for x, y in batches]
    return float(np.concatenate(right).mean())


def check_used(config):
    """Raises an `InputError` for options that would change nothing."""
    for name in UNUSED:
        if getattr(config, name) != getattr(Config, name):
            raise InputError(f"--{name}: expected the default, as this study has no other")


def study(flags, seeds):
    """Trains all arms with all seeds; returns (a planned run, results).

    Results are a dict from arm to a list of (`Scores`, seconds, number of parameters).
    """
    results, images = {}, None
    for seed in seeds:
        config = parse(Config, [*flags, f"--seed={seed}"])[0]
        check_used(config)
        run = plan_run(config)
        if run.dataset.validation is None or run.dataset.test is None:
            raise InputError("expected validation and test images; give --data_dir of both")
        resolve_plan(run.config).set_threads()
        images = images or training_images(run)
        for arm in ARMS:
            model, seconds = train(arm, run, images)
            scores = score(model, run)
            logger.info(f"{arm}, seed {seed}: {scores.test:.2%} of test images")
            results.setdefault(arm, []).append((scores, seconds, model.count_params()))
            keras.backend.clear_session()
    return run, results


# === As text and picture ===

_COLUMNS = (
    *("what was trained", "parameters", "validation top-1", "the same, augmented", "test top-1"),
    "time",
)


def as_table(run, results):
    """Returns a Markdown table with a row per arm."""
    sizes = {name: len(run.dataset.split(name)) for name in ("train", "validation", "test")}
    lines = [
        *table(_COLUMNS, (_row(arm, found) for arm, found in results.items())),
        "",
        f"Accuracy of the last weights in percent, mean ± standard deviation over "
        f"{len(next(iter(results.values())))} seeds; {run.total_steps:,} steps each. Images: "
        f"{', '.join(f'{count:,} {name}' for name, count in sizes.items())}. Augmented: the same "
        f"validation images, cropped and flipped as those of training, mean of {DRAWS} draws. By "
        f"the number of images alone, an accuracy has a standard error of up to "
        f"{50 / sizes['validation'] ** 0.5:.1f} points in validation and "
        f"{50 / sizes['test'] ** 0.5:.1f} in the test; all rows are scored on the same images.",
        "",
        describe_machine(environment()),
    ]
    return "\n".join(lines)


def _row(arm, found):
    columns = zip(*(scores for scores, _, _ in found), strict=True)
    cells = [spread([100 * value for value in column]) for column in columns]
    seconds = np.mean([seconds for _, seconds, _ in found])
    return arm, f"{found[0][2]:,}", *cells, f"{seconds:.0f} s"


def draw(path, run, results):
    """Draws the learning rates of the schedules, and the test accuracy of each arm, to a file."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rates, scores = figure.subplots(1, 2)
    steps = np.arange(run.total_steps)
    for arm, (build, schedule) in reversed(ARMS.items()):  # ours in front
        if build is own_layers:
            values = [float(schedule(run)(tf.constant(step))) for step in steps]
            rates.plot(steps, values, label=arm, linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.legend(fontsize=8)
    top1 = [[100 * scored.test for scored, _, _ in found] for found in results.values()]
    errors = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in top1]
    scores.barh(range(len(top1)), list(map(np.mean, top1)), xerr=errors)
    scores.set_yticks(range(len(top1)), results, fontsize=8)
    scores.invert_yaxis()
    scores.set_xlabel("test top-1 (%), mean ± std")
    figure.savefig(path, dpi=110)


def read_seeds(text):
    """Returns the integers in a list such as `0,1,2`."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds={text}: expected integers, such as 0,1,2") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2", help="seeds of each arm (default: 0,1,2)")
    parser.add_argument("--output", help="write the table to this file instead of printing it")
    parser.add_argument("--plot", help="draw learning rates and accuracies to this .png")
    parser.add_argument("flags", nargs="*", help="after --: flags of train")
    options = parser.parse_args()
    try:
        for flag in filter(lambda flag: getattr(options, flag), ("output", "plot")):
            check_writable(getattr(options, flag), flag)
        if options.plot and not options.plot.endswith(".png"):
            raise InputError(f"--plot={options.plot}: expected a name that ends in .png")
        run, results = study(options.flags, read_seeds(options.seeds))
        text = f"{as_table(run, results)}\n\nGenerated by `{shlex.join(['python', *sys.argv])}`."
        write(options.output, f"{text}\n") if options.output else print(text)
        if options.plot:
            draw(options.plot, run, results)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
