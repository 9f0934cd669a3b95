"""How training scales with processes: measured on this computer, and calculated for GPUs.

A step takes as long as its computation, which is divided among the devices, and then the exchange
of the gradients, a ring all-reduce, which does not overlap with it here:

    step(P) = step(1) / P + 2 (P - 1) / P * 4 bytes * parameters / bandwidth
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.benchmark.measure import Worker
from keras_mixer.benchmark.timm_worker import take_standard_output
from keras_mixer.benchmark.worker import random_batch
from keras_mixer.compute.environment import cores, module_command
from keras_mixer.compute.process_group import join_processes
from keras_mixer.compute.rank import free_port, variables_of
from keras_mixer.config.options import options_of
from keras_mixer.config.training import Config
from keras_mixer.log import track
from keras_mixer.model.architecture import Architecture
from keras_mixer.reports.markdown import table
from keras_mixer.runs.open_run import plan_run

_STEPS = 20  # of a repeat
_BYTES = 4  # of a gradient, float32

# Assumed of a GPU: NVIDIA's figure for the H100 SXM, dense bfloat16, and the share of it that
# training reaches: a guess, between 23% (measured by others, small ViTs) and 45%.
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
        dict from the number of processes to a dict. In seconds: `step` (on random images) and
        `fit` (on the input pipeline), lists; `exchange` of the gradients alone; `input` of the part
        of a batch of one process, alone. Also `bytes`, which the loopback device of this computer
        carried a step, and the number of `weights`.

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
    command = module_command("keras_mixer.benchmark.scaling", str(index % cores()))
    variables = variables_of(port, count, index) | {"KERAS_BACKEND": "jax"}
    return Worker(f"{count} processes", command, options, variables)


# === One of the processes ===

_WARM_UP = 3  # steps before those that are measured


def main(options, answer):
    """Measures as one of the processes; the first one answers.

    Args:
        options: dict: the fields of a `Config`, `repeats` and `steps`.
        answer: Function that takes a dict of JSON values.
    """
    repeats, steps = options.pop("repeats"), options.pop("steps")
    run = plan_run(Config(**options))
    with join_processes() as group, quiet_tensorflow():
        from keras_mixer.compute.plan import compute_plan

        run = dataclasses.replace(run, group=group)
        with compute_plan(run.config, group) as plan, plan.data_parallel():
            measured = _measure_as_one(run, plan, repeats, steps)
    if group.is_main:
        answer(measured)


def _measure_as_one(run, plan, repeats, steps):
    import keras

    from keras_mixer.training.batches import batches_of
    from keras_mixer.training.compile import compile_model

    keras.utils.set_random_seed(run.config.seed)
    model, _ = compile_model(run, plan, run.config.lr)
    carried = _carried()
    random = [_measure_step(model, _random_batches(run), steps) for _ in range(repeats)]
    carried = (_carried() - carried) / (repeats * (steps + _WARM_UP))
    batches = batches_of(run, run.dataset.train)
    return {
        "step": random,
        "fit": [_measure_step(model, batches, steps) for _ in range(repeats)],
        "exchange": _measure_exchange(run, [v.shape for v in model.trainable_variables], steps),
        "weights": len(model.trainable_variables),
        "input": _mean_seconds(iter(batches).__next__, 2 * steps),
        "bytes": carried,
    }


def _random_batches(run):
    import tensorflow as tf

    batch = random_batch(run, run.config.batch_size // run.group.count)
    return tf.data.Dataset.from_tensors(batch).repeat()


def _measure_step(model, batches, steps):
    import keras

    class Timer(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch in (_WARM_UP - 1, _WARM_UP + steps - 1):
                float(logs["loss"])  # waits until it is computed
                self.begun, self.ended = getattr(self, "ended", None), time.perf_counter()

    timer = Timer()
    total = _WARM_UP + steps
    model.fit(batches, steps_per_epoch=total, callbacks=[timer], shuffle=False, verbose=0)
    return (timer.ended - timer.begun) / steps


def _measure_exchange(run, shapes, steps):
    """Returns the seconds of adding up arrays of the weights' shapes, one of each device's.

    XLA adds up every gradient by itself on a CPU, as here; on GPUs it puts them together.
    """
    import jax

    if run.group.count == 1:
        return 0.0
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))
    dealt, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (["devices"], [])
    )
    ones = (np.ones((jax.local_device_count(), *shape), np.float32) for shape in shapes)
    arrays = [jax.make_array_from_process_local_data(dealt, array) for array in ones]
    add_up = jax.jit(lambda arrays: [a.sum(axis=0) for a in arrays], out_shardings=whole)
    return _mean_seconds(lambda: jax.block_until_ready(add_up(arrays)), steps)


def _mean_seconds(call, times):
    for _ in range(_WARM_UP):
        call()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def _carried():
    """Returns the bytes that the loopback device has carried; 0 where it is not known."""
    table = Path("/proc/net/dev")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split()[1]) for line in lines if line.strip().startswith("lo:")), 0)


# === Results ===


def as_table(results, architecture, batch_size):
    """Returns what `measure` returned, and the calculation for GPUs, as Markdown tables."""
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
    """Yields cells for GPUs: the step time, and the share of perfect scaling, by bandwidth."""
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
    """Returns the seconds of a step on images, forward and backward, on one GPU."""
    return images * 3 * 2 * architecture.multiply_adds / (PEAK * REACHED)


def seconds_of_exchange(parameters, count, bandwidth):
    """Returns the seconds of a ring all-reduce of the gradients among `count` devices.

    Each sends and receives `bandwidth` bytes per second.
    """
    return 2 * (count - 1) / count * _BYTES * parameters / bandwidth


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(sys.argv[1])})
    write = take_standard_output()
    main(json.loads(sys.stdin.readline()), write)
