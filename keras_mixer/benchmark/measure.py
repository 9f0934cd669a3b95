"""Benchmark: speed, memory and first call of training, inference and input, beside timm's.

Each is measured in a process of its own. All processes live at once and take turns, so that
whatever disturbs the machine disturbs all of them alike.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from keras_mixer.compute.environment import environment, module_command
from keras_mixer.config.options import options_of
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError, RunError
from keras_mixer.log import track
from keras_mixer.reports.markdown import table
from keras_mixer.runs.open_run import plan_run

MEASURES = ("training", "inference", "latency", "exported", "input", "fit")
THIS, ON_JAX = "keras_mixer", "keras_mixer on JAX"
TIMM = {"timm": False, "timm, compiled": True}  # whether `torch.compile` is used
OTHERS = ("timm", "jax")
_OF_TIMM = ("training", "inference", "latency", "fit")
_TIMM_OPTIONS = ("batch_size", "precision", "optimizer", "momentum", "lr", "crop_padding")
_BACKWARD = 3  # matrix products of a step, as a multiple of the forward pass's
VARIED = {"image_size": "image_shape", "depth": "depth", "dim": "dim", "batch_size": "batch_size"}
_FACTORS = (0.5, 1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured in one process.

    Attributes:
        measure: string, one of `MEASURES`, or `products`.
        side: string: `THIS`, `ON_JAX`, or a key of `TIMM`.
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

    @property
    def milliseconds(self):
        """Milliseconds of a call."""
        return 1000 * self.images / self.rate


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
        list of `Measurement`, that of `products` last.

    Raises:
        InputError: If the config is not valid.
        RunError: If a process fails.
    """
    values = {**options_of(config, Config), "channels": channels}
    tasks = [_task(name, values) for name in measures]
    if "timm" in compare:
        tasks += _timm_tasks(config, measures, python, channels)
    if "jax" in compare and "training" in measures:
        tasks.append((*_task("training", values, ON_JAX), {"KERAS_BACKEND": "jax"}))
    return _take_turns([*tasks, _task("products", values)], repeats, seconds)


def measure_training(config, repeats=1, seconds=1.0, channels=None):
    """Returns the `Measurement` of training steps, in a process of its own."""
    values = {**options_of(config, Config), "channels": channels}
    [found] = _take_turns([_task("training", values)], repeats, seconds)
    return found


def _task(measure, values, side=THIS):
    """Returns (measure, side, command, options) of a process of this package."""
    return measure, side, module_command("keras_mixer.benchmark.worker", measure), values


def _timm_tasks(config, measures, python, channels):
    """Yields the same of timm's processes, eager and compiled."""
    run = plan_run(config)
    sizes, config = run.spec.architecture, run.config
    options = sizes.to_json() | {"channels": channels or sizes.channels}
    options |= {name: getattr(config, name) for name in _TIMM_OPTIONS}
    options["train_images"] = len(run.dataset.train)
    command = [python, str(Path(__file__).with_name("timm_worker.py"))]
    for name in (name for name in measures if name in _OF_TIMM):
        for side, compiled in TIMM.items():
            yield name, side, command, {**options, "measure": name, "compiled": compiled}


def _take_turns(tasks, repeats, seconds):
    """Starts a process for each task, and measures each `repeats` times, by turns."""
    with contextlib.ExitStack() as stack:
        workers, starts = [], []
        for name, side, *how in track(tasks, "starting"):
            workers.append(stack.enter_context(Worker(f"{side}: {name}", *how)))
            starts.append(workers[-1].answer())  # once the first call is done
        answers = [[] for _ in workers]
        turns = [*zip(workers, answers, strict=True)] * repeats
        for worker, found in track(turns, "measuring"):
            worker.tell(seconds)
            found.append(worker.answer())
    tasks = [task[:2] for task in tasks]
    return [_measurement(*parts) for parts in zip(tasks, starts, answers, strict=True)]


def _measurement(task, start, answers):
    return Measurement(
        *task,
        rates=[answer["images_per_second"] for answer in answers],
        images=start["images"],
        first_call=start["first_call"],
        cores=statistics.median(answer["cores"] for answer in answers),
        memory=answers[-1]["memory"],
    )


class Worker:
    """A process that reads JSON lines, the first of which is `options`, and answers in such lines.

    Args:
        name: What it measures, for messages.
        command: list of strings.
        options: JSON value.
        variables: dict of environment variables beside those of this process.
    """

    def __init__(self, name, command, options, variables=None):
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by __exit__
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self.process = subprocess.Popen(
            command, env=os.environ | (variables or {}), text=True, **pipes
        )
        self.tell(options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        self._errors.close()

    def tell(self, value):
        """Sends a JSON value."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(value), file=self.process.stdin, flush=True)

    def answer(self):
        """Returns the next JSON value; raises a `RunError` if the process ends without one."""
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        raise self.failure()

    def failure(self):
        """Returns a `RunError` with the last line of standard error, once the process has ended."""
        self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return RunError(f"{self._name} cannot be measured: {lines[-1]}")


def vary(config, names, repeats, seconds, channels=None):
    """Measures training at multiples of some sizes of `VARIED`, one after the other.

    Returns:
        dict from the name of a size to a list of (value, `Measurement`).
    """
    planned = plan_run(config).config
    results = {name: [] for name in names}
    for name, factor in ((name, factor) for name in names for factor in _FACTORS):
        value, changes = _scale(planned, name, factor)
        with contextlib.suppress(InputError):  # such as half of the smallest image
            changed = dataclasses.replace(config, **changes)
            plan_run(changed)
            results[name].append((value, measure_training(changed, repeats, seconds, channels)))
    return results


def _scale(planned, name, factor):
    """Returns a size times a factor, and the fields of a config that has it."""
    size = getattr(planned, VARIED[name])
    if name == "image_size":
        shape = tuple(int(side * factor) for side in size)
        return shape[0], {"image_shape": shape, "patch_shape": planned.patch_shape}
    changes = {VARIED[name]: int(size * factor)}
    if name == "dim":  # the widths are multiples of it
        for width in ("tokens_mlp_dim", "channels_mlp_dim"):
            changes[width] = int(getattr(planned, width) * factor)
    return int(size * factor), changes


# === Results ===

_COLUMNS = (
    *("what", "side", "images/s", "range", "ms a call", "of peak", "cores", "memory", "first call"),
)


def as_table(measurements, architecture, precision):
    """Returns what `measure` returned for a model in a precision as a Markdown table."""
    *found, products = measurements
    found.sort(key=lambda one: MEASURES.index(one.measure))
    lines = [
        f"{architecture.parameters / 1e6:,.2f} M parameters, "
        f"{architecture.multiply_adds / 1e6:,.1f} M multiply-adds an image; products of large "
        f"matrices in {precision}: {products.rate / 1e9:,.0f} GFLOP/s.",
        "",
        *table(_COLUMNS, (_cells(one, architecture, products.rate) for one in found)),
    ]
    return "\n".join([*lines, "", *_ratios(found), *_fit_bound(found), ""])


def _cells(found, architecture, peak):
    passes = _BACKWARD if found.measure in ("training", "fit") else 1
    flops = 2 * passes * architecture.multiply_adds
    return (
        found.measure,
        found.side,
        f"{found.rate:,.1f}",
        f"{min(found.rates):,.1f}–{max(found.rates):,.1f}",
        f"{found.milliseconds:,.1f}",
        "–" if found.measure == "input" else f"{found.rate * flops / peak:.0%}",
        f"{found.cores:.2f}",
        f"{found.memory / 1e6:,.0f} MB",
        f"{found.first_call:.1f} s",
    )


def _ratios(measurements):
    """Yields a line per measure: images/s over the better of timm eager and compiled."""
    for name in dict.fromkeys(found.measure for found in measurements):
        rates = {found.side: found.rate for found in measurements if found.measure == name}
        for sides in (TIMM, [ON_JAX]):
            if others := rates.keys() & set(sides):
                best = max(others, key=rates.get)
                yield f"{name}: {rates[THIS] / rates[best]:.2f} times {best}  "


def _fit_bound(measurements):
    """Yields a line about how near `fit` is to what step and input allow on the same cores."""
    rates = {found.measure: found.rate for found in measurements if found.side == THIS}
    if {"training", "input", "fit"} <= rates.keys():
        bound = 1 / (1 / rates["training"] + 1 / rates["input"])
        yield f"fit: {rates['fit'] / bound:.2f} of 1 / (1/training + 1/input)  "


def varied_table(results):
    """Returns what `vary` returned as a Markdown table."""
    columns = ("varied", "value", "images/s", "ms a step", "memory")
    rows = [
        (name, value, f"{x.rate:,.1f}", f"{x.milliseconds:,.1f}", f"{x.memory / 1e6:,.0f} MB")
        for name, points in results.items()
        for value, x in points
    ]
    return "\n".join([*table(columns, rows), ""])


def as_json(measurements, results, architecture):
    """Returns all that was measured, and the environment, as a dict of JSON values."""
    return {
        "environment": environment(),
        "architecture": architecture.to_json(),
        "parameters": architecture.parameters,
        "multiply_adds": architecture.multiply_adds,
        "measured": list(map(dataclasses.asdict, measurements)),
        "varied": {
            name: [{"value": value, **dataclasses.asdict(found)} for value, found in points]
            for name, points in results.items()
        },
    }


def plot(results):
    """Returns a matplotlib figure of what `vary` returned: time and memory of a step by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 5), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False)
    for (name, points), (times, memories) in zip(results.items(), panels.T, strict=True):
        values = [value for value, _ in points]
        times.plot(values, [found.milliseconds for _, found in points], "o-")
        memories.plot(values, [found.memory / 1e6 for _, found in points], "o-", color="tab:orange")
        times.set(xscale="log", yscale="log", ylabel="ms a step")
        memories.set(xscale="log", xlabel=name, ylabel="peak memory, MB", ylim=(0, None))
        for panel in (times, memories):
            panel.set_xticks(values, [str(value) for value in values])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    return figure
