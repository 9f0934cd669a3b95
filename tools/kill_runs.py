"""Kills training runs with SIGKILL at random moments and compares what they become in the end.

    python tools/kill_runs.py --kills=100 --output=results/kills.md

A run is killed up to five times and started again with the same command until it is done: three
kills in four after its first step, while it trains, validates, saves, scores or exports, the others
before, while Python imports, the data are read, the state is restored and XLA compiles. One run in
four is also stopped for two seconds (SIGSTOP). In the end it must equal an undisturbed run, bit for
bit: weights, optimizer, moving average, seed states, metrics, history, best weights; and it must
have exported once. Every random augmentation is on, and bfloat16 and gradient accumulation, too.

With --processes=2 every run has several processes, of which one is killed; the others must end
within a minute, each with one line that names it.
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

from documents import add_output, this_machine, write_document

from keras_mixer.compute.rank import free_port, variables_of
from keras_mixer.log import progress_bar
from keras_mixer.reports.markdown import table
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.run import read_metrics
from keras_mixer.weights import model_folder

TRAIN = Path(__file__).parents[1] / "train.py"
MOST_KILLS_PER_RUN = 5
MOST_SECONDS = 60  # in which the other processes of a run have to end
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


class Started:
    """The processes of a run; the first one reports its progress on standard error."""

    def __init__(self, directory, count, more=()):
        exports = directory.with_name(f"{directory.name}-exports")
        flags = [*FLAGS, f"--output_dir={directory}", f"--export_dir={exports}", *more]
        command = [sys.executable, str(TRAIN), *flags]
        port = free_port()
        self.messages = [""] * count
        self.processes = [
            subprocess.Popen(
                command, env=variables_of(port, count, index), cwd=directory.parent, text=True,
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            )
            for index in range(count)
        ]  # fmt: skip

    def wait_for_first_step(self):
        """Reads standard error up to the first step, or the end if all steps were taken."""
        for line in self.processes[0].stderr:
            self.messages[0] += line
            if "first step done" in line:
                break
        return self.messages[0]

    def pause(self, dice, seconds=2):
        """Stops a process for some seconds."""
        process = dice.choice(self.processes)
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    def wait(self, seconds):
        """Waits until all have ended; returns whether they have."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def finish(self):
        """Lets the run end well."""
        self._read(None)
        if statuses := [p.returncode for p in self.processes if p.returncode]:
            raise AssertionError(f"exit status {statuses[0]}:\n{self.messages}")

    def kill(self, dice):
        """Kills one process, and lets the others end."""
        alive = [n for n, process in enumerate(self.processes) if process.poll() is None]
        victim = dice.choice(alive)
        self.processes[victim].send_signal(signal.SIGKILL)
        self._read(MOST_SECONDS)
        for index in set(alive) - {victim}:
            process = self.processes[index]
            last = (self.messages[index].splitlines() or [""])[-1]
            named = last.startswith(f"error: process {victim}") or process.returncode == 0
            if not named or "Traceback" in self.messages[index]:
                raise AssertionError(
                    f"process {index}, status {process.returncode}, after {victim} was killed:\n"
                    f"{self.messages[index]}"
                )

    def _read(self, seconds):
        for index, process in enumerate(self.processes):
            try:
                self.messages[index] += process.communicate(timeout=seconds)[1]
            except subprocess.TimeoutExpired as error:
                self.stop()
                raise AssertionError(f"process {index} did not end in {seconds} s") from error

    def stop(self):
        """Kills what is left."""
        for process in self.processes:
            process.kill()


def fingerprint(directory):
    """Everything a finished run holds that must not depend on interruptions."""
    checkpoint = newest_checkpoint(directory / "checkpoints")
    with open(directory / "history.csv") as file:
        rows = list(csv.DictReader(file))
    weights, metadata = model_folder.read_weights(directory / "best")
    for row in [*rows, checkpoint.progress["best"]]:
        del row["seconds"], row["images_per_second"]
    exports = directory.with_name(f"{directory.name}-exports") / "killed"
    scores, other_metrics = read_metrics(directory)
    exported = Path(other_metrics.pop("saved_model", "none"))
    return {
        "arrays": {name: array.tobytes() for name, array in checkpoint.arrays.items()},
        "best": {name: array.tobytes() for name, array in weights.items()},
        "metadata": [metadata, checkpoint.progress["best"], checkpoint.step],
        "history": rows,
        "metrics": [scores, other_metrics],
        "exports": [exported.name, sorted(path.name for path in exports.glob("*"))],
    }


def undisturbed(directory, count, more):
    """Runs without interruption; returns the fingerprint, and seconds before and after step 1."""
    began = time.monotonic()
    started = Started(directory, count, more)
    started.wait_for_first_step()
    first_step = time.monotonic()
    started.finish()
    return fingerprint(directory), first_step - began, time.monotonic() - first_step


def disturbed(directory, count, more, before, after, kills, dice):
    """Kills a run up to `kills` times; returns how often it was, and the fingerprint in the end."""
    done = 0
    while True:
        had_checkpoint = any(directory.glob("checkpoints/step-" + "[0-9]" * 10))
        started = Started(directory, count, more)
        early = done < kills and dice.random() < EARLY
        if early and not started.wait(dice.uniform(0, before)):
            started.kill(dice)
            done += 1
            continue
        lines = started.wait_for_first_step()
        if had_checkpoint and "training in" in lines:
            raise AssertionError("started from scratch although there was a checkpoint")
        if done < kills:
            if dice.random() < STOPPED:
                started.pause(dice)
            if not started.wait(dice.uniform(0, after)):
                started.kill(dice)
                done += 1
                continue
        started.finish()
        return done, fingerprint(directory)


def differences(one, other):
    """Names what differs between two fingerprints."""
    return [key for key in one if one[key] != other[key]]


def main():
    """Kills as often as asked, and says how many runs came out equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="processes of a run, on JAX")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    parser.add_argument("more", nargs="*", help="after --: more flags of the runs")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    kills = runs = equal = 0
    with tempfile.TemporaryDirectory() as folder, progress_bar() as bar:
        count = options.processes
        expected, *seconds = undisturbed(Path(folder) / "undisturbed", count, options.more)
        task = bar.add_task("kills", total=options.kills, status="")
        while kills < options.kills:
            wanted = min(MOST_KILLS_PER_RUN, options.kills - kills)
            done, found = disturbed(
                Path(folder) / f"run{runs}", count, options.more, *seconds, wanted, dice
            )
            differing = differences(expected, found)
            kills, runs, equal = kills + done, runs + 1, equal + (not differing)
            if differing:
                print(f"run {runs - 1} differs in {', '.join(differing)}", file=sys.stderr)
            bar.update(task, completed=kills)
    columns = "kills", "runs that were killed", "bit-equal in the end"
    write_document(
        options.output,
        "\n".join(table(columns, [(kills, runs, equal)])),
        f"The runs: `{shlex.join([*FLAGS, *options.more])}`.",
        this_machine(),
    )
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
