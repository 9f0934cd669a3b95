"""How training scales with processes: measured on this computer, and calculated for GPUs.

A step takes as long as its computation, which is divided among the devices, and then the exchange
of the gradients, a ring all-reduce, which does not overlap with it here:

    step(P) = step(1) / P + 2 (P - 1) / P * 4 bytes * parameters / bandwidth
"""

import contextlib
import statistics
import sys

from keras_mixer.benchmark.measure import Worker
from keras_mixer.compute.environment import cores
from keras_mixer.compute.rank import free_port, variables_of
from keras_mixer.config.options import options_of
from keras_mixer.config.training import Config
from keras_mixer.log import track
from keras_mixer.model.architecture import Architecture
from keras_mixer.reports.markdown import table

_STEPS = 20  # of a repeat
_BYTES = 4  # of a gradient, float32

# What the model assumes of a GPU: NVIDIA's figure for the H100 SXM, dense bfloat16, and the share
# of it that training reaches: a guess, between 23% (measured by others, small ViTs) and 45%.
PEAK, REACHED = 989.4e12, 0.35
BANDWIDTHS = {"25 Gb/s": 25e9 / 8, "100 Gb/s": 100e9 / 8, "400 Gb/s": 400e9 / 8}  # of each GPU
GPUS = (1, 2, 4, 8, 16, 32, 64)
VARIANTS = ("B/16", "L/16")
BATCH = 4096  # images of a step, as in the paper's pre-training


def measure(config, counts, repeats):
    """Measures training in several numbers of processes, each on a core of its own.

    Args:
        config: `Config`, valid.
        counts: list of ints. Numbers of processes.
        repeats: int.

    Returns:
        dict from the number of processes to a dict of `scaling_worker`.

    Raises:
        RunError: If a process fails.
    """
    options = options_of(config, Config) | {"repeats": repeats, "steps": _STEPS}
    return {count: _measure(count, options) for count in track(counts, "measuring")}


def _measure(count, options):
    port = free_port()
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_worker(count, port, index, options)) for index in range(count)
        ]
        failed = [worker for worker in workers if worker.process.wait()]
        if failed:
            raise failed[0].failure()
        return workers[0].answer()


def _worker(count, port, index, options):
    name, module = f"{count} processes", "keras_mixer.benchmark.scaling_worker"
    command = [sys.executable, "-m", module, str(index % cores())]
    variables = variables_of(port, count, index) | {"KERAS_BACKEND": "jax"}
    return Worker(name, command, options, variables)


# === Results ===


def as_table(results, architecture, batch_size):
    """Returns what `measure` returned, and the model for GPUs, as Markdown tables.

    Args:
        results: dict from the number of processes to a dict.
        architecture: `Architecture` of what was measured.
        batch_size: int.
    """
    alone = statistics.median(results[min(results)]["step"]) * min(min(results), cores())
    rows = (
        _cells(count, found, alone, architecture.parameters, batch_size)
        for count, found in results.items()
    )
    weights = results[min(results)]["weights"]
    return "\n".join(
        [
            f"{architecture.parameters:,} parameters in {weights} weights, "
            f"{batch_size} images a step, in processes with a core each. Calculated: the time of "
            f"one process by the number of cores, and the exchange of gradients, measured alone. "
            f"MB are those of the loopback device, with all that others send; calculated, those "
            f"of a ring.",
            "",
            *table(_COLUMNS, rows),
            "",
            f"Calculated for GPUs, {BATCH} images a step, {REACHED:.0%} of {PEAK / 1e12:,.0f} "
            f"TFLOP/s: time of a step, by what each GPU can send and receive (eight GPUs of a host "
            f"share its network), and the share of it that computes. Gradients are float32, "
            f"exchanged as a ring after the computation. The delay of each message is left out, "
            f"so these are lower bounds of the exchange. The last column is what all hosts "
            f"together have to read at {list(BANDWIDTHS)[-1]}.",
            "",
            *table(_GPU_COLUMNS, _predictions()),
            "",
        ]
    )


_COLUMNS = (
    *("processes", "cores", "ms a step", "range", "exchange, ms", "calculated, ms"),
    *("MB a step", "calculated, MB", "images/s", "with input", "input alone, of a process"),
)


def _cells(count, found, alone, parameters, batch_size):
    step, fit = (statistics.median(found[name]) for name in ("step", "fit"))
    used = min(count, cores())
    return (
        count,
        used,
        f"{1000 * step:,.1f}",
        f"{1000 * min(found['step']):,.1f}–{1000 * max(found['step']):,.1f}",
        f"{1000 * found['exchange']:,.1f}",
        f"{1000 * (alone / used + found['exchange']):,.1f}",
        f"{found['bytes'] / 1e6:,.2f}",
        f"{2 * (count - 1) * _BYTES * parameters / 1e6:,.2f}",
        f"{batch_size / step:,.1f}",
        f"{batch_size / fit:,.1f}",
        f"{batch_size / count / found['input']:,.1f}",
    )


_GPU_COLUMNS = ("model", "GPUs", "images of each", "compute, ms", *BANDWIDTHS, "images/s to read")


def _predictions():
    """Yields rows of the model: the step time, and the share of perfect scaling, by bandwidth."""
    for name in VARIANTS:
        architecture = Architecture.create(name, num_classes=1000)
        for count in GPUS:
            compute = seconds_of_compute(architecture, BATCH / count)
            steps = {
                bandwidth: compute + seconds_of_exchange(architecture.parameters, count, rate)
                for bandwidth, rate in BANDWIDTHS.items()
            }
            cells = (f"{1000 * step:,.0f} ms, {compute / step:.0%}" for step in steps.values())
            fastest = min(steps.values())
            yield (
                name,
                count,
                BATCH // count,
                f"{1000 * compute:,.0f}",
                *cells,
                f"{BATCH / fastest:,.0f}",
            )


def seconds_of_compute(architecture, images):
    """Returns the seconds of a step on images, forward and backward, on the GPU of the model."""
    return images * 3 * 2 * architecture.multiply_adds / (PEAK * REACHED)


def seconds_of_exchange(parameters, count, bandwidth):
    """Returns the seconds of a ring all-reduce of the gradients.

    Args:
        parameters: int.
        count: int. Number of devices.
        bandwidth: Bytes per second that each sends and receives.
    """
    return 2 * (count - 1) / count * _BYTES * parameters / bandwidth
