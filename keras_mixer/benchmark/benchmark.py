"""Benchmark: speed, memory and start of training, inference and input, and of timm beside them.

Everything is measured in a process of its own, all of which live at once and take turns: what
disturbs the machine for a while disturbs all of them.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from keras_mixer.compute.environment import environment
from keras_mixer.config.options import options_of
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError, RunError
from keras_mixer.log import track
from keras_mixer.reports.markdown import table
from keras_mixer.runs.open_run import plan_run

MEASURES = ("training", "inference", "latency", "exported", "input", "fit")
OURS, ON_JAX = "keras_mixer", "keras_mixer on JAX"
TIMM = {"timm": False, "timm, compiled": True}  # whether `torch.compile` is used
OTHERS = ("timm", "jax")
_OF_TIMM = ("training", "inference", "latency", "fit")
_TIMM_OPTIONS = ("batch_size", "precision", "optimizer", "momentum", "lr", "crop_padding")
_BACKWARD = 3  # matrix products of a step, as a multiple of the forward pass's
VARIED = {"image_size": "image_shape", "depth": "depth", "dim": "dim", "batch_size": "batch_size"}
_FACTORS = (0.5, 1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured in one process.

    Attributes:
        measure: string, one of `MEASURES`, or `products`.
        side: string: `OURS`, `ON_JAX`, or a key of `TIMM`.
        rates: list of images per second (of FLOPs per second, for products), one per repeat.
        images: Images per call.
        first_call: Seconds of the first call: tracing and compilation.
        cores: Processor time by wall time, the median.
        memory: Peak in bytes: of the GPU's, if there is one, or else of the process.
    """

    measure: str
    side: str
    rates: list
    images: int
    first_call: float
    cores: float
    memory: int

    @property
    def rate(self):
        """Median of `rates`."""
        return statistics.median(self.rates)


# === Measuring ===


def measure(config, measures, compare, python, repeats, seconds, channels=None):
    """Measures a model, by turns.

    Args:
        config: `Config`.
        measures: list of strings of `MEASURES`.
        compare: What else to measure, of `OTHERS`: timm; training on Keras's JAX backend.
        python: Python with torch and timm.
        repeats: int. Number of times that everything is measured.
        seconds: float. Duration of each.
        channels: int. Color channels of random images; None for the data's.

    Returns:
        list of `Row`, that of `products` last.

    Raises:
        InputError: If the config is not valid.
        RunError: If a process fails.
    """
    processes = [*_own(config, [*measures, "products"], channels)]
    if "timm" in compare:
        processes[-1:-1] = _of_timm(config, measures, python, channels)
    if "jax" in compare:
        processes[-1:-1] = _on_jax(config, measures, channels)
    return _by_turns(processes, repeats, seconds, track)


def measure_training(config, seconds=1.0):
    """Returns the `Row` of training steps, measured once in a process of its own."""
    [row] = _by_turns([*_own(config, ["training"], None)], 1, seconds)
    return row


def _by_turns(processes, repeats, seconds, track=lambda items, _: items):
    """Starts processes and measures each of them `repeats` times, by turns; returns their rows."""
    with contextlib.ExitStack() as stack:
        workers = []
        for process in track(processes, "starting"):
            workers.append(stack.enter_context(_Worker(*process)))
            workers[-1].start()
        turns = [worker for _ in range(repeats) for worker in workers]
        for worker in track(turns, "measuring"):
            worker.measure(seconds)
        return [worker.row() for worker in workers]


def _own(config, measures, channels):
    """Yields (measure, side, command, first line) of our processes."""
    values = {**options_of(config, Config), "channels": channels}
    for name in measures:
        command = [sys.executable, "-m", "keras_mixer.benchmark.worker", name]
        yield name, OURS, command, values


def _on_jax(config, measures, channels):
    """Yields the same, and environment variables, for training on Keras's JAX backend."""
    for name, _, command, values in _own(config, set(measures) & {"training"}, channels):
        yield name, ON_JAX, command, values, {"KERAS_BACKEND": "jax"}


def _of_timm(config, measures, python, channels):
    """Yields (measure, side, command, first line) of timm's processes."""
    run = plan_run(config)
    sizes, config = run.spec.architecture, run.config
    options = sizes.to_json() | {"channels": channels or sizes.channels}
    options |= {name: getattr(config, name) for name in _TIMM_OPTIONS}
    options["train_images"] = len(run.dataset.train)
    script = str(Path(__file__).with_name("timm_worker.py"))
    for name in (name for name in measures if name in _OF_TIMM):
        for side, compiled in TIMM.items():
            yield name, side, [python, script], {**options, "measure": name, "compiled": compiled}


class _Worker:
    """A process that measures when it is asked to."""

    def __init__(self, measure, side, command, options, variables=None):
        self.measure_name, self.side = measure, side
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by __exit__
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._options, self._start, self._answers = options, None, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def start(self):
        """Waits until what is measured has run once."""
        self._start = self._ask(json.dumps(self._options))

    def measure(self, seconds):
        """Measures for some seconds."""
        self._answers.append(self._ask(seconds))

    def _ask(self, line):
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        raise RunError(f"{self.side}: {self.measure_name} cannot be measured: {lines[-1]}")

    def row(self):
        """Returns the `Row` of all that was measured."""
        return Row(
            measure=self.measure_name,
            side=self.side,
            rates=[answer["images_per_second"] for answer in self._answers],
            images=self._start["images"],
            first_call=self._start["first_call"],
            cores=statistics.median(answer["cores"] for answer in self._answers),
            memory=self._answers[-1]["memory"],
        )


def vary(config, names, repeats, seconds, channels=None):
    """Measures training at multiples of some sizes, one after the other.

    Args:
        config: `Config`.
        names: list of strings of `VARIED`.
        repeats, seconds, channels: As `measure`'s.

    Returns:
        dict from the name to a list of (value, `Row`).
    """
    planned = plan_run(config).config
    points = [(name, factor) for name in names for factor in _FACTORS]
    results = {name: [] for name in names}
    for name, factor in track(points, "measuring sizes"):
        value, changes = _scaled(planned, name, factor)
        with contextlib.suppress(InputError):  # such as half of the smallest image
            changed = dataclasses.replace(config, **changes)
            plan_run(changed)
            [row] = _by_turns([*_own(changed, ["training"], channels)], repeats, seconds)
            results[name].append((value, row))
    return results


def _scaled(planned, name, factor):
    """Returns a size times a factor, and the fields of a config that has it."""
    size = getattr(planned, VARIED[name])
    if name == "image_size":
        shape = tuple(int(side * factor) for side in size)
        return shape[0], {"image_shape": shape, "patch_shape": planned.patch_shape}
    changes = {VARIED[name]: int(size * factor)}
    if name == "dim":  # the widths are multiples of it
        changes |= {
            width: int(getattr(planned, width) * factor)
            for width in ("tokens_mlp_dim", "channels_mlp_dim")
        }
    return int(size * factor), changes


# === Results ===

_COLUMNS = (
    *("what", "side", "images/s", "range", "ms a call", "of peak", "cores", "memory", "first call"),
)


def as_table(rows, architecture, precision):
    """Returns what `measure` returned as a Markdown table.

    Args:
        rows: list of `Row`.
        architecture: `Architecture` of the model.
        precision: string, of the config.
    """
    *rows, products = rows
    rows.sort(key=lambda row: MEASURES.index(row.measure))
    lines = [
        f"{architecture.parameters / 1e6:,.2f} M parameters, "
        f"{architecture.multiply_adds / 1e6:,.1f} M multiply-adds an image; products of large "
        f"matrices in {precision}: {products.rate / 1e9:,.0f} GFLOP/s.",
        "",
        *table(_COLUMNS, (_cells(row, architecture, products.rate) for row in rows)),
    ]
    return "\n".join([*lines, "", *_ratios(rows), *_bound(rows), ""])


def _cells(row, architecture, peak):
    flops = (
        2 * architecture.multiply_adds * (_BACKWARD if row.measure in ("training", "fit") else 1)
    )
    return (
        row.measure,
        row.side,
        f"{row.rate:,.1f}",
        f"{min(row.rates):,.1f}–{max(row.rates):,.1f}",
        f"{1000 * row.images / row.rate:,.1f}",
        "–" if row.measure == "input" else f"{row.rate * flops / peak:.0%}",
        f"{row.cores:.2f}",
        f"{row.memory / 1e6:,.0f} MB",
        f"{row.first_call:.1f} s",
    )


def _ratios(rows):
    """Returns a line per measure: images/s over the better of timm eager and compiled."""
    for name in dict.fromkeys(row.measure for row in rows):
        of_measure = [row for row in rows if row.measure == name]
        [ours] = [row for row in of_measure if row.side == OURS]
        for sides in (TIMM, [ON_JAX]):
            if others := [row for row in of_measure if row.side in sides]:
                best = max(others, key=lambda row: row.rate)
                yield f"{name}: {ours.rate / best.rate:.2f} times {best.side}  "


def _bound(rows):
    """Returns a line about how near `fit` is to what step and input allow on the same cores."""
    rates = {row.measure: row.rate for row in rows if row.side == OURS}
    if {"training", "input", "fit"} <= rates.keys():
        bound = 1 / (1 / rates["training"] + 1 / rates["input"])
        yield f"fit: {rates['fit'] / bound:.2f} of 1 / (1/training + 1/input)  "


def varied_table(results):
    """Returns what `vary` returned as a Markdown table."""
    columns = ("varied", "value", "images/s", "ms a step", "memory")
    rows = ((name, *_point(*point)) for name, points in results.items() for point in points)
    return "\n".join([*table(columns, rows), ""])


def _point(value, row):
    milliseconds = 1000 * row.images / row.rate
    return value, f"{row.rate:,.1f}", f"{milliseconds:,.1f}", f"{row.memory / 1e6:,.0f} MB"


def as_json(rows, results, architecture):
    """Returns all that was measured, and the environment, as a dict of JSON values."""
    return {
        "environment": environment(),
        "architecture": architecture.to_json(),
        "parameters": architecture.parameters,
        "multiply_adds": architecture.multiply_adds,
        "measured": [dataclasses.asdict(row) for row in rows],
        "varied": {
            name: [{"value": value, **dataclasses.asdict(row)} for value, row in points]
            for name, points in results.items()
        },
    }


def draw(results):
    """Returns a matplotlib figure of what `vary` returned: time and memory of a step by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 5), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False)
    for (name, points), (times, memories) in zip(results.items(), panels.T, strict=True):
        values = [value for value, _ in points]
        times.plot(values, [1000 * row.images / row.rate for _, row in points], "o-")
        memories.plot(values, [row.memory / 1e6 for _, row in points], "o-", color="tab:orange")
        times.set(xscale="log", yscale="log", ylabel="ms a step")
        memories.set(xscale="log", xlabel=name, ylabel="peak memory, MB", ylim=(0, None))
        for panel in (times, memories):
            panel.set_xticks(values, [str(value) for value in values])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    return figure
