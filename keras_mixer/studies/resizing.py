"""Resizing: accuracy of trained Mixers at other image and patch shapes, by `weights.resize`.

Three accuracies are compared: without further training, after some, and of models of the same sizes
that are trained from scratch for as long by the same recipe.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from keras_mixer.config.options import as_flags
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError
from keras_mixer.inference.evaluate import compute_logits, score
from keras_mixer.jobs import JobSequence, without_retracing_warnings
from keras_mixer.log import logger
from keras_mixer.reports.markdown import spread, table
from keras_mixer.reports.report import made_on
from keras_mixer.runs.open_run import read_run
from keras_mixer.weights.load import load_mixer
from keras_mixer.weights.resize import resized_architecture

SCRATCH = "scratch"
METHODS = {"interpolate": "interpolated", "tile": "tiled", SCRATCH: "from scratch"}
_SAME_GRID = "Where the grid of patches stays, only patch kernels are resampled, in one way."


class Shape(NamedTuple):
    """Image and patch shapes, both (height, width) in pixels."""

    image: tuple[int, int]
    patch: tuple[int, int]

    def __str__(self):
        sides = ["×".join(map(str, pair)) for pair in self]
        return f"{sides[0]} / {sides[1]}"

    @property
    def name(self):
        """The shape as part of a path: `56x56-8x8`."""
        return "-".join("x".join(map(str, pair)) for pair in self)


def parse_shape(text):
    """Parses `image/patch` as a `Shape`: each a number for a square or heightxwidth: `56x28/4`.

    Raises:
        InputError: If the text has another form.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?/(\d+)(?:x(\d+))?", text)
    if not match:
        raise InputError(f"--shapes: expected image/patch such as 56/8 or 56x28/4, received {text}")
    height, width, rows, columns = match.groups()
    return Shape((int(height), int(width or height)), (int(rows), int(columns or rows)))


def study_resizing(directories, shapes, num_steps, output_dir):
    """Measures resizing of finished runs, and averages over them.

    Args:
        directories: Paths of finished runs of one recipe, which differ in their seeds.
        shapes: list of `Shape`.
        num_steps: int. Epochs of training after resizing, and from scratch; the first tenth of
            their steps is warm-up. 0: no training.
        output_dir: Folder for the runs of the study; finished ones are not repeated.

    Returns:
        A Markdown table of top-1 in percent, of the split that the runs were scored on: mean ±
        sample standard deviation over the runs.

    Raises:
        InputError: If a directory holds no run, its data are missing or changed, or a shape does
            not fit its model.
    """
    runs = _read(directories)
    arms = {shape: _methods(runs[0], shape) for shape in shapes}
    jobs = JobSequence(len(runs) * sum(len(methods) + 1 for methods in arms.values()))
    after = "after an epoch" if num_steps == 1 else f"after {num_steps} epochs"
    columns = [f"untrained: {METHODS[method]}" for method in ("interpolate", "tile")]
    columns += [f"{after}: {name}" for name in METHODS.values()] if num_steps else []
    rows = []
    for shape, methods in arms.items():
        scores = {
            f"untrained: {METHODS[method]}": [_untrained(run, shape, method) for run in runs]
            for method in methods
        }
        for method in (*methods, SCRATCH) if num_steps else ():
            scores[f"{after}: {METHODS[method]}"] = [
                _trained(jobs, run, shape, method, num_steps, Path(output_dir)) for run in runs
            ]
        grid = resized_architecture(runs[0].spec.architecture, *shape, "interpolate").grid
        cells = (spread([100 * top1 for top1 in scores.get(column, [])]) for column in columns)
        rows.append([shape, "×".join(map(str, grid)), *cells])
    lines = table(["images / patches", "grid", *columns], rows)
    machines = made_on(run.directory for run in runs)
    return "\n".join([_intro(runs), "", *lines, "", _SAME_GRID, "", *machines]) + "\n"


def _read(directories):
    runs = [read_run(directory) for directory in directories]
    names = [run.directory.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"runs of the same name given twice: {', '.join(twice)}")
    return runs


def _methods(run, shape):
    """Returns `interpolate`, and `tile` where the grid grows by whole factors."""
    architecture = run.spec.architecture
    resized = resized_architecture(architecture, *shape, "interpolate")
    methods = ["interpolate"]
    try:
        resized_architecture(architecture, *shape, "tile")
    except InputError:
        return methods
    return methods if resized.grid == architecture.grid else [*methods, "tile"]


def _untrained(run, shape, method):
    """Returns the top-1 of a run's model, resized and not trained further."""
    model = load_mixer(run.best, *shape, method)
    name = f"{run.directory.name}, {shape}, {method}, untrained"
    with without_retracing_warnings():
        split = run.dataset.split(run.config.eval_split)
        outputs = compute_logits(model, model.spec, split, name)
    top1 = score(*outputs, model.spec)["top1"]
    logger.info(f"{name}: {top1:.2%}")
    return top1


def _trained(jobs, run, shape, method, num_steps, output_dir):
    """Returns the top-1 after training of the run's model, resized, or of a new one."""
    total = num_steps * run.steps_per_epoch
    start = {"checkpoint": None, "resize_tokens": "auto"}
    if method != SCRATCH:
        start = {"checkpoint": str(run.directory), "resize_tokens": method, "tokens_mlp_dim": None}
    config = dataclasses.replace(
        run.config,
        **start,
        image_shape=shape.image,
        patch_shape=shape.patch,
        schedule_unit="step",
        num_steps=total,
        warmup_step=total // 10,
        output_dir=str(output_dir / run.directory.name / f"{shape.name}-{method}"),
        overwrite=False,
        export=False,
    )
    name = f"{run.directory.name}, {shape}, {method}"
    return jobs.run(name, config).scores[run.config.eval_split]["top1"]


def _intro(runs):
    config = runs[0].config
    scores = spread([100 * run.scores[config.eval_split]["top1"] for run in runs])
    shape = Shape(config.image_shape, config.patch_shape)
    recipe = ", ".join(as_flags(Config(**config.augmentation()))) or "no augmentation"
    return (
        f"{config.eval_split.capitalize()} top-1 in percent, of {len(runs)} "
        f"run{'s'[: len(runs) != 1]} trained with {recipe}. As trained, on {shape}: {scores}."
    )
