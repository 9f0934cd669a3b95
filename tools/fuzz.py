"""Damages files at random and checks that each is read as it is or refused in one line.

    python tools/fuzz.py --inputs=2000 --output=results/reliability.md

Every input is an honest file with one to eight random changes. It must be refused with an
`InputError` or `RunError` of one line, or be read; files with checksums must be read as if nothing
had happened. Anything else is a failure: another exception, a crash, more than two seconds of CPU
time, 200 MB more memory. An input depends on its number and the seed alone.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from documents import add_output, this_machine, write_document
from fuzz_subjects import SUBJECTS

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.commands.table import COMMANDS
from keras_mixer.compute.environment import module_command
from keras_mixer.errors import InputError, RunError
from keras_mixer.log import logger, track
from keras_mixer.reports.markdown import table

MOST_SECONDS, MOST_MEGABYTES, PATIENCE = 2.0, 200.0, 60

# === Changes ===


def _flip(content, dice):
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _overwrite(content, dice):
    at, count = dice.randrange(len(content)), dice.randint(1, 16)
    content[at : at + count] = dice.randbytes(count)


def _set_number(content, dice):
    """Puts an extreme number where there may be a length, an offset or a count."""
    width, order = dice.choice((1, 2, 4, 8)), dice.choice(("little", "big"))
    number = dice.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (4 * width)))
    at = dice.randrange(len(content))
    content[at : at + width] = number.to_bytes(width, order)


def _remove(content, dice):
    at = dice.randrange(len(content))
    del content[at : at + dice.choice((1, 2, 4, 64, len(content)))]


def _repeat(content, dice):
    at = dice.randrange(len(content))
    piece = content[at : at + dice.choice((1, 4, 64, 1024))]
    content[at:at] = piece * dice.choice((1, 2, 100))


def _move(content, dice):
    at, to = dice.randrange(len(content)), dice.randrange(len(content))
    piece = content[at : at + dice.choice((4, 64, 1024))]
    content[to : to + len(piece)] = piece


CHANGES = (_flip, _overwrite, _set_number, _remove, _repeat, _move)


def mutate(content, dice):
    """Returns bytes with one to eight random changes, half of them near the beginning."""
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 8))):
        if not content:
            break
        if dice.random() < 0.5:  # headers decide most
            head = content[:128]
            dice.choice(CHANGES)(head, dice)
            content[:128] = head
        else:
            dice.choice(CHANGES)(content, dice)
    return bytes(content)


# === One input ===


class Trial:
    """The honest files of a subject in a folder, and what they are read as.

    Args:
        name: Key of `SUBJECTS`.
        folder: Empty folder.
        seed: int.
    """

    def __init__(self, name, folder, seed):
        self._name, self._folder, self._seed = name, Path(folder), seed
        self._subject = SUBJECTS[name]
        self._paths = self._subject.make(self._folder)
        self._honest = {path: path.read_bytes() for path in self._paths}
        self._expected = self._subject.read(self._folder, self._paths[0])

    def input(self, number):
        """Returns the path that is damaged in the input of a number, and the damaged bytes."""
        dice = random.Random(f"{self._seed} {self._name} {number}")
        path = dice.choice(self._paths)
        return path, mutate(self._honest[path], dice)

    def outcome(self, number):
        """Returns (outcome, CPU seconds, megabytes) of reading the input of a number."""
        path, content = self.input(number)
        path.write_bytes(content)
        before, began = _reset_peak(), time.process_time()
        try:
            outcome = self._read(path)
        finally:
            path.write_bytes(self._honest[path])
        return outcome, time.process_time() - began, _peak() - before

    def _read(self, path):
        try:
            found = self._subject.read(self._folder, path)
        except (InputError, RunError) as error:
            return "refused" if "\n" not in str(error) else f"of several lines: {error}"
        except Exception as error:  # what is looked for
            return f"{type(error).__name__}: {error}"
        return "read" if found == self._expected else "damage unnoticed"


def _reset_peak():
    """Returns the memory in use, in MB, from which the peak is measured; 0 where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except OSError:
        return 0.0


def _peak():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    [line] = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1000


# === Many inputs, in a process of their own ===


def _serve(connection, name, seed):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KERAS_MIXER_CACHE"] = f"{folder}/cache"
        with quiet_tensorflow():
            importlib.import_module("tensorflow")
        inner = Path(folder) / "files"
        inner.mkdir()
        trial = Trial(name, inner, seed)
        connection.send("ready")
        while (number := connection.recv()) is not None:
            connection.send(trial.outcome(number))


class Worker:
    """A process that tries inputs; it is started again after a crash."""

    def __init__(self, name, seed):
        self._arguments = name, seed
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()
        if self._connection.recv() != "ready":
            raise AssertionError("expected a start")

    def outcome(self, number):
        """Returns (outcome, CPU seconds, megabytes) of an input."""
        try:
            self._connection.send(number)
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
            self._process.kill()
            failure = f"no answer in {PATIENCE} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            failure = f"crash, exit status {self._process.exitcode}"
        self._start()
        return failure, 0.0, 0.0

    def close(self):
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def try_subject(name, inputs, seed):
    """Returns a row of the table, and the failures as (number, what happened)."""
    worker = Worker(name, seed)
    numbers = track(range(inputs), name)
    outcomes = [(number, *worker.outcome(number)) for number in numbers]
    worker.close()
    return _row(name, outcomes), _failures(outcomes)


def _failures(outcomes):
    failures = []
    for number, outcome, seconds, megabytes in outcomes:
        if outcome not in ("read", "refused"):
            failures.append((number, outcome))
        elif seconds > MOST_SECONDS or megabytes > MOST_MEGABYTES:
            failures.append((number, f"{outcome}, {seconds:.1f} s, {megabytes:.0f} MB"))
    return failures


COLUMNS = ("file", "inputs", "read", "refused", "failures", "most CPU s", "most MB")


def _row(name, outcomes):
    counts = Counter(outcome for _, outcome, _, _ in outcomes)
    most = [max(column) for column in list(zip(*outcomes, strict=True))[2:]]
    figures = f"{most[0]:.2f}", f"{most[1]:.0f}"
    failures = len(_failures(outcomes))
    return name, len(outcomes), counts["read"], counts["refused"], failures, *figures


# === Flags ===

_WRONG = ("nan", "x", "1e999", "-1e30", "9" * 30, "", "1,2,3,4,5", "½", "--")


def try_flags(inputs, seed):
    """Starts commands with wrong values of random flags; as `try_subject`."""
    flags = [
        (command, field.name)
        for command, row in COMMANDS.items()
        for field in dataclasses.fields(row.options)
        if field.metadata["choices"] or field.metadata["bounds"]
    ]
    dice = random.Random(f"{seed} flags")
    outcomes = []
    for number in track(range(inputs), "flags"):
        command, name = dice.choice(flags)
        outcomes.append((number, *_start(command, f"--{name}={dice.choice(_WRONG)}")))
    return _row("flags", outcomes), _failures(outcomes)


def _start(*words):
    before = os.times()
    command = module_command("keras_mixer", *words)
    options = {"capture_output": True, "text": True, "check": False, "timeout": PATIENCE}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return f"{shlex.join(words)}: no end in {PATIENCE} s", 0.0, 0.0
    now = os.times()
    seconds = sum(now[2:4]) - sum(before[2:4])
    is_line = done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    if done.returncode == 2 and is_line and not done.stdout:
        return "refused", seconds, 0.0
    return f"{shlex.join(words)}: status {done.returncode}, {done.stderr!r}", seconds, 0.0


def main():
    """Tries every subject, prints the table and the failures; status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200, help="inputs of each kind")
    parser.add_argument("--flags", type=int, default=200, help="wrong values of flags")
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    options = parser.parse_args()
    subjects = _possible(options.subjects)
    results = [try_subject(name, options.inputs, options.seed) for name in subjects]
    results += [try_flags(options.flags, options.seed)] if options.flags else []
    rows, failures = zip(*results, strict=True)
    write_document(
        options.output,
        "\n".join(table(COLUMNS, rows)),
        "Read: as the honest file, or, where the format has no checksums, as what it says.",
        this_machine(),
    )
    for row, failed in zip(rows, failures, strict=True):
        for number, what in failed:
            print(f"{row[0]}, input {number}: {what}", file=sys.stderr)
    return 1 if any(failures) else 0


def _possible(names):
    """Returns the subjects that the installed packages can make."""
    without_torch = [name for name in names if not name.endswith(".pth")]
    if without_torch == names or importlib.util.find_spec("torch"):
        return names
    logger.warning("files of torch are left out: pip install 'keras_mixer[torch]'")
    return without_torch


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
