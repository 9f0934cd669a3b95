"""Kills training runs with SIGKILL at random moments and compares what they become in the end.

    python tools/kill_runs.py --kills=100 --output=results/kills.md

A run is killed up to five times and started again with the same command until it is done: three
kills in four after its first step, while it trains, validates, saves, scores or exports, the others
before, while Python imports, the data are read, the state is restored and XLA compiles. One run in
four is also stopped for two seconds (SIGSTOP). In the end it must equal a run that nothing
disturbed, bit for bit: weights, optimizer, moving average, seed states, metrics, history, best
weights; and it must have exported once. All that draws random numbers is on, bfloat16 and gradient
accumulation too.
"""

import argparse
import csv
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from keras_mixer import console
from keras_mixer.commands.shared import check_writable, write
from keras_mixer.reports.markdown import table
from keras_mixer.reports.report import describe_machine
from keras_mixer.training.checkpoints import newest_checkpoint
from keras_mixer.training.environment import environment
from keras_mixer.training.run import read_metrics
from keras_mixer.weights import model_folder

TRAIN = Path(__file__).parents[1] / "train.py"
MOST_KILLS_PER_RUN = 5
EARLY, STOPPED = 0.25, 0.25  # of all kills
FLAGS = [
    "--dataset=digits", "--image_shape=16", "--depth=2", "--dim=16", "--batch_size=32",
    "--num_steps=8", "--warmup_step=2", "--optimizer=adamw", "--lr=0.01", "--decay=0.1",
    "--clip_norm=1", "--label_smoothing=0.1", "--dropout=0.1", "--stochastic_depth=0.2", "--flip",
    "--inception_crop=0.5", "--crop_padding=1", "--randaugment=2,5", "--color_jitter=0.2",
    "--random_erasing=0.2", "--mixup=0.2", "--cutmix=1", "--class_weights=balanced", "--ema=0.9",
    "--accumulation=2", "--precision=bfloat16", "--layer_decay=0.9", "--seed=3", "--name=killed",
    "--save_every=5", "--save_unit=step",
]  # fmt: skip


def start(directory, more=()):
    """Starts a run and returns its process; its standard error can be read line by line."""
    exports = directory.with_name(f"{directory.name}-exports")
    flags = [*FLAGS, f"--output_dir={directory}", f"--export_dir={exports}", *more]
    command = [sys.executable, str(TRAIN), *flags]
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


def pause(process, seconds=2):
    """Stops a process for some seconds."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


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
    exports = directory.with_name(f"{directory.name}-exports") / "killed"
    scores, run_facts = read_metrics(directory)
    exported = Path(run_facts.pop("saved_model", "none"))
    return {
        "arrays": {name: array.tobytes() for name, array in checkpoint.arrays.items()},
        "best": {name: array.tobytes() for name, array in weights.items()},
        "facts": [facts, checkpoint.progress["best"], checkpoint.step],
        "history": rows,
        "metrics": [scores, run_facts],
        "exports": [exported.name, sorted(path.name for path in exports.glob("*"))],
    }


def undisturbed(directory, more):
    """Runs without interruption; returns the fingerprint, and seconds before and after step 1."""
    began = time.monotonic()
    process = start(directory, more)
    wait_for_first_step(process)
    first_step = time.monotonic()
    finish(process)
    return fingerprint(directory), first_step - began, time.monotonic() - first_step


def disturbed(directory, more, before, after, kills, dice):
    """Kills a run up to `kills` times; returns how often it was, and the fingerprint in the end."""
    done = 0
    while True:
        had_checkpoint = any(directory.glob("checkpoints/step-" + "[0-9]" * 10))
        process = start(directory, more)
        try:
            if done < kills and dice.random() < EARLY:
                process.wait(timeout=dice.uniform(0, before))
            lines = wait_for_first_step(process)
            if had_checkpoint and "training in" in lines:
                raise AssertionError("started from scratch although there was a checkpoint")
            if done < kills:
                if dice.random() < STOPPED:
                    pause(process)
                process.wait(timeout=dice.uniform(0, after))
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
    parser.add_argument("--output", default="-", help="write the table to this file")
    parser.add_argument("more", nargs="*", help="after --: more flags of the runs")
    options = parser.parse_args()
    check_writable(options.output)
    dice = random.Random(options.seed)
    kills = runs = equal = 0
    with tempfile.TemporaryDirectory() as folder, console.progress_bar() as bar:
        expected, *seconds = undisturbed(Path(folder) / "undisturbed", options.more)
        task = bar.add_task("kills", total=options.kills, status="")
        while kills < options.kills:
            wanted = min(MOST_KILLS_PER_RUN, options.kills - kills)
            done, found = disturbed(
                Path(folder) / f"run{runs}", options.more, *seconds, wanted, dice
            )
            differing = differences(expected, found)
            kills, runs, equal = kills + done, runs + 1, equal + (not differing)
            if differing:
                print(f"run {runs - 1} differs in {', '.join(differing)}", file=sys.stderr)
            bar.update(task, completed=kills)
    write(options.output, _as_text(kills, runs, equal, options.more))
    return 0 if equal == runs else 1


def _as_text(kills, runs, equal, more):
    columns = "kills", "runs that were killed", "bit-equal in the end"
    return "\n\n".join(
        [
            "\n".join(table(columns, [(kills, runs, equal)])),
            f"The runs: `{shlex.join([*FLAGS, *more])}`.",
            describe_machine(environment()),
            f"Generated by `{shlex.join(['python', *sys.argv])}`.\n",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
