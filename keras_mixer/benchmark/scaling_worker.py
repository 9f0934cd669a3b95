"""Measures the steps of one run in several processes, as one of them.

Started as `python -m keras_mixer.benchmark.scaling_worker CORE`, with the place of the process in
its environment. Standard input is a JSON object: the fields of a `Config`, `repeats`, `steps`.
Process 0 answers with a JSON object of seconds: `step` (on random images) and `fit` (on the input
pipeline), a list each; `exchange` of the gradients alone; `input` of this process's part of a
batch, alone. Also `bytes`, which the computer's loopback device carried a step, and the number of
`weights`.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.benchmark.timm_worker import take_standard_output
from keras_mixer.benchmark.worker import random_batch
from keras_mixer.compute.process_group import join_processes
from keras_mixer.config.training import Config
from keras_mixer.runs.open_run import plan_run

_WARM_UP = 3  # steps before those that are measured


def main(values, answer):
    """Measures everything.

    Args:
        values: dict, see above.
        answer: Function that takes a dict of JSON values.
    """
    repeats, steps = values.pop("repeats"), values.pop("steps")
    run = plan_run(Config(**values))
    with join_processes() as group, quiet_tensorflow():
        from keras_mixer.compute.plan import compute_plan

        run = dataclasses.replace(run, group=group)
        with compute_plan(run.config, group) as plan, plan.data_parallel():
            measured = _measure(run, plan, repeats, steps)
    if group.is_main:
        answer(measured)


def _measure(run, plan, repeats, steps):
    import keras

    from keras_mixer.training.batches import batches_of
    from keras_mixer.training.compile import compile_model

    keras.utils.set_random_seed(run.config.seed)
    model, _ = compile_model(run, plan, run.config.lr)
    carried = _carried()
    random = [_seconds_of_step(model, _random_batches(run), steps) for _ in range(repeats)]
    carried = (_carried() - carried) / (repeats * (steps + _WARM_UP))
    batches = batches_of(run, run.dataset.train)
    return {
        "step": random,
        "fit": [_seconds_of_step(model, batches, steps) for _ in range(repeats)],
        "exchange": _seconds_of_exchange(run, [v.shape for v in model.trainable_variables], steps),
        "weights": len(model.trainable_variables),
        "input": _seconds_of_input(batches, steps),
        "bytes": carried,
    }


def _random_batches(run):
    import tensorflow as tf

    batch = random_batch(run, run.config.batch_size // run.group.count)
    return tf.data.Dataset.from_tensors(batch).repeat()


def _seconds_of_step(model, batches, steps):
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


def _seconds_of_exchange(run, shapes, steps):
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


def _seconds_of_input(batches, steps):
    iterator = iter(batches)
    return _mean_seconds(lambda: next(iterator), 2 * steps)


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


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(sys.argv[1])})
    write = take_standard_output()
    main(json.loads(sys.stdin.readline()), write)
