"""Resizing: accuracy of trained Mixers at other image and patch shapes, by `weights.resize`.

It is measured without further training, after some, and for models of the same sizes that are
trained from scratch for as long by the same recipe.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import keras

from keras_mixer import console
from keras_mixer.errors import InputError
from keras_mixer.files import write_atomically
from keras_mixer.inference.evaluate import compute_logits, score
from keras_mixer.jobs import JobSequence
from keras_mixer.studies.report import made_on, spread
from keras_mixer.training.open_run import read_run
from keras_mixer.weights.load import load_mixer
from keras_mixer.weights.resize import resized_architecture

SCRATCH = "scratch"
SCORES = "untrained.json"
_HEADER = (
    "| images / patches | grid | untrained: interpolated | untrained: tiled "
    "| {0}: interpolated | {0}: tiled | {0}: from scratch |",
    "|---|---|---|---|---|---|---|",
)
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
    return Shape(_pair(height, width), _pair(rows, columns))


def _pair(first, second):
    return int(first), int(second or first)


def study_resizing(directories, shapes, num_steps, output_dir):
    """Measures resizing of finished runs, and averages over them.

    Args:
        directories: Paths of finished runs of one recipe, which differ in their seeds.
        shapes: list of `Shape`.
        num_steps: int. Epochs of training after resizing, and from scratch; the first tenth of
            their steps is warm-up.
        output_dir: Folder for the runs of the study. Results found there are not computed again.

    Returns:
        A Markdown table of test top-1 in percent, mean ± sample standard deviation over the runs.

    Raises:
        InputError: If a directory holds no run, its data are missing or changed, or a shape does
            not fit its model.
    """
    output_dir = Path(output_dir)
    runs = _read(directories)
    arms = {shape: _methods(runs[0], shape) for shape in shapes}
    jobs = JobSequence(len(runs) * sum(len(methods) + 1 for methods in arms.values()))
    lines = [line.format(_epochs(num_steps)) for line in _HEADER]
    for shape, methods in arms.items():
        untrained = {
            method: [_untrained(run, shape, method, output_dir) for run in runs]
            for method in methods
        }
        trained = {
            method: [_trained(jobs, run, shape, method, num_steps, output_dir) for run in runs]
            for method in (*methods, SCRATCH)
        }
        lines.append(_row(runs[0], shape, untrained, trained))
    machines = made_on(run.directory for run in runs)
    return "\n".join([*_intro(runs), *lines, "", _SAME_GRID, "", *machines]) + "\n"


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


def _untrained(run, shape, method, output_dir):
    """Returns the test top-1 of a run's model, resized and not trained further."""
    path = output_dir / run.directory.name / SCORES
    scores = json.loads(path.read_text()) if path.exists() else {}
    key = f"{shape.name}-{method}"
    if key not in scores:
        model = load_mixer(run.best, *shape, method)
        name = f"{run.directory.name}, {shape}, {method}, untrained"
        outputs = compute_logits(model, model.spec, run.dataset.test, name)
        scores[key] = score(*outputs, model.spec)["top1"]
        console.say(f"{name}: {scores[key]:.2%}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(scores, indent=2).encode() + b"\n")
        keras.backend.clear_session()
    return scores[key]


def _trained(jobs, run, shape, method, num_steps, output_dir):
    """Returns the test top-1 after training of the run's model, resized, or of a new one."""
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
        eval_split="test",
        export=False,
    )
    name = f"{run.directory.name}, {shape}, {method}"
    return jobs.run(name, config).scores["test"]["top1"]


def _intro(runs):
    scores = spread([100 * run.scores["test"]["top1"] for run in runs])
    config = runs[0].config
    shape = Shape(config.image_shape, config.patch_shape)
    return [
        f"Test top-1 in percent, of {len(runs)} run{'s'[: len(runs) != 1]}. As trained, on "
        f"{shape}: {scores}.",
        "",
    ]


def _epochs(num_steps):
    return "after an epoch" if num_steps == 1 else f"after {num_steps} epochs"


def _row(run, shape, untrained, trained):
    def cell(scores):
        return spread([100 * score for score in scores])

    grid = resized_architecture(run.spec.architecture, *shape, "interpolate").grid
    methods = ("interpolate", "tile")
    cells = [
        str(shape),
        "×".join(map(str, grid)),
        *(cell(untrained.get(method, [])) for method in methods),
        *(cell(trained.get(method, [])) for method in (*methods, SCRATCH)),
    ]
    return f"| {' | '.join(cells)} |"
