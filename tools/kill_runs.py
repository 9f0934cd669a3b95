"""Kills training runs with SIGKILL at random moments and compares what they become in the end.

    python tools/kill_runs.py --kills=20

A run is killed up to three times, at moments spread uniformly over the time after its first step,
and started again with the same command until it is done. It must then equal a run that nothing
disturbed, bit for bit: weights, optimizer, moving average, seed states, metrics, history, best
weights. Dropout, stochastic depth, flips, crops and the moving average are on. Kills before the
first step (while Python imports and XLA compiles) would prove nothing and are not counted.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from keras_mixer.training.checkpoints import newest_checkpoint
from keras_mixer.training.run import read_metrics
from keras_mixer.weights import model_folder

TRAIN = Path(__file__).parents[1] / "train.py"
MOST_KILLS_PER_RUN = 3
FLAGS = [
    "--dataset=digits", "--depth=2", "--dim=16", "--batch_size=32", "--num_steps=8",
    "--warmup_step=2", "--optimizer=adamw", "--lr=0.01", "--decay=0.1", "--clip_norm=1",
    "--label_smoothing=0.1", "--dropout=0.1", "--stochastic_depth=0.2", "--flip",
    "--crop_padding=1", "--ema=0.9", "--seed=3", "--export=false",
    "--save_every=5", "--save_unit=step",
]  # fmt: skip


def start(directory):
    """Starts a run and returns its process; its standard error can be read line by line."""
    command = [sys.executable, str(TRAIN), *FLAGS, f"--output_dir={directory}"]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=directory.parent
    )


def wait_for_first_step(process):
    """Reads a run's standard error up to its first step, or its end if all steps were taken."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "first step done" in line:
            break
    return "".join(lines)


def finish(process, said=""):
    """Lets a run end well; `said` is what was read of its standard error."""
    errors = said + process.communicate()[1]
    if process.returncode != 0:
        raise AssertionError(f"exit status {process.returncode}:\n{errors}")


def fingerprint(directory):
    """Everything a finished run holds that must not depend on interruptions."""
    checkpoint = newest_checkpoint(directory / "checkpoints")
    with open(directory / "history.csv") as file:
        rows = list(csv.DictReader(file))
    weights, facts = model_folder.read_weights(directory / "best")
    for row in [*rows, checkpoint.progress["best"]]:
        del row["seconds"], row["images_per_second"]
    return {
        "arrays": {name: array.tobytes() for name, array in checkpoint.arrays.items()},
        "best": {name: array.tobytes() for name, array in weights.items()},
        "facts": [facts, checkpoint.progress["best"], checkpoint.step],
        "history": rows,
        "metrics": read_metrics(directory),
    }


def undisturbed(directory):
    """Runs without interruption; returns the fingerprint and the seconds after the first step."""
    process = start(directory)
    wait_for_first_step(process)
    began = time.monotonic()
    finish(process)
    return fingerprint(directory), time.monotonic() - began


def disturbed(directory, seconds, kills, dice):
    """Kills a run up to `kills` times; returns how often it was, and the fingerprint in the end."""
    done = 0
    while True:
        had_checkpoint = any(directory.glob("checkpoints/step-" + "[0-9]" * 10))
        process = start(directory)
        lines = wait_for_first_step(process)
        if had_checkpoint and "training in" in lines:
            raise AssertionError("started from scratch although there was a checkpoint")
        try:
            if done < kills:
                process.wait(timeout=dice.uniform(0, seconds))
            finish(process, lines)
            return done, fingerprint(directory)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1


def differences(one, other):
    """Names what differs between two fingerprints."""
    return [key for key in one if one[key] != other[key]]


def main():
    """Kills as often as asked, and says how many runs came out equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    kills = runs = equal = 0
    with tempfile.TemporaryDirectory() as folder:
        expected, seconds = undisturbed(Path(folder) / "undisturbed")
        print(f"undisturbed: {seconds:.1f} s after the first step", flush=True)
        while kills < options.kills:
            wanted = min(MOST_KILLS_PER_RUN, options.kills - kills)
            done, found = disturbed(Path(folder) / f"run{runs}", seconds, wanted, dice)
            differing = differences(expected, found)
            kills, runs, equal = kills + done, runs + 1, equal + (not differing)
            print(f"kills {kills}, runs {runs}, bit-equal {equal} {differing or ''}", flush=True)
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
