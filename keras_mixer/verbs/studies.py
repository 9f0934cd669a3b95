"""The verbs that make or look at many runs: report, transfer, resizing."""

import dataclasses
import shlex
from pathlib import Path

from keras_mixer.commandline import as_flags, option, parse
from keras_mixer.config import Config
from keras_mixer.data.datasets import AVG5
from keras_mixer.errors import InputError
from keras_mixer.verbs.shared import check_writable, quiet_tensorflow, write

# === report ===


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Flags of `report`."""

    output: str | None = option(None, "Write the table to this file instead of printing it.")
    presets: str = option("flags", "Folder of flagfiles; a run that follows one is called by it.")


def report(options, arguments):
    """Tabulates finished runs, those that differ only in their seed as mean ± std."""
    from keras_mixer.studies.report import tabulate

    if not arguments:
        raise InputError("expected at least one RUN")
    _publish("report", options, arguments, tabulate(arguments, _presets(Path(options.presets))))


def _presets(folder):
    presets = {}
    for path in sorted(folder.glob("*.flags")):
        try:
            presets[path.as_posix()] = set(as_flags(parse(Config, [f"--flagfile={path}"])[0]))
        except InputError as error:
            raise InputError(f"{path}: {error}; mend it, or give another --presets") from error
    return presets


# === transfer ===


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """Flags of `transfer`."""

    checkpoint: str | None = option(None, "Weights to start from, as train.py takes them.")
    datasets: tuple[str, ...] = option(
        AVG5,
        "What to fine-tune on: NAME stands for the flagfile flags/finetune_NAME.flags; a path that "
        "ends in .flags is one of yours.",
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "A run for each.", low=0, high=2**31 - 1)
    lrs: tuple[float, ...] = option(
        (0.003, 0.01, 0.03, 0.06),
        "Learning rates, of which the best on held-out training images is taken (default: those "
        "of the paper).",
        above=0.0,
        high=1000.0,
    )
    scratch: bool = option(
        False, "Train models of the same sizes from scratch, too, under the same budget."
    )
    output_dir: str = option(
        "runs/transfer", "Where the runs go; what is finished there is not done again."
    )
    output: str | None = option(None, "Write the table to this file instead of printing it.")


def transfer(options, arguments):
    """Fine-tunes a checkpoint on several data sets; flags after -- go to every run."""
    if options.checkpoint is None:
        raise InputError("--checkpoint: expected the weights to start from")
    if options.output:
        check_writable(options.output)
    extra = [f"--checkpoint={options.checkpoint}", *arguments]
    presets = {_preset_name(name): _finetuning(name, extra) for name in options.datasets}
    with quiet_tensorflow():
        from keras_mixer.studies.transfer import as_table, study_transfer
        from keras_mixer.weights.registry import release_of

    seeds, lrs = (list(dict.fromkeys(values)) for values in (options.seeds, options.lrs))
    results = study_transfer(presets, lrs, seeds, options.output_dir, options.scratch)
    release = release_of(options.checkpoint)
    table = as_table(results, release.finetuned if release else {})
    _publish("transfer", options, [], table, last=["--", *arguments] if arguments else [])


def _preset_name(name):
    return Path(name).stem.removeprefix("finetune_") if name.endswith(".flags") else name


def _finetuning(name, extra):
    path = Path(name) if name.endswith(".flags") else Path("flags") / f"finetune_{name}.flags"
    if not path.is_file():
        raise InputError(f"--datasets={name}: no such flagfile: {path}")
    return parse(Config, [f"--flagfile={path}", *extra])[0]


# === resizing ===


@dataclasses.dataclass(frozen=True)
class ResizingOptions:
    """Flags of `resizing`."""

    shapes: tuple[str, ...] = option(
        ("56/4",),
        "Images and patches to resize to, as image/patch in pixels: 56/4, or 56x28/4 where they "
        "are no squares.",
    )
    num_steps: int = option(1, "Epochs of training after resizing, and from scratch.", low=1)
    output_dir: str = option(
        "runs/resizing", "Where the trained models go; what is there already is not done again."
    )
    output: str | None = option(None, "Write the table to this file instead of printing it.")


def resizing(options, arguments):
    """Measures what resizing costs trained runs, before and after training, and saves."""
    if not arguments:
        raise InputError("expected at least one RUN")
    if options.output:
        check_writable(options.output)
    with quiet_tensorflow():
        from keras_mixer.studies.resizing import parse_shape, study_resizing

    shapes = list(dict.fromkeys(map(parse_shape, options.shapes)))
    table = study_resizing(arguments, shapes, options.num_steps, options.output_dir)
    _publish("resizing", options, arguments, table)


# === What they share ===


def _publish(verb, options, arguments, table, last=()):
    """Prints a table, or writes it with the command that made it."""
    if options.output:
        command = shlex.join(["keras-mixer", verb, *arguments, *as_flags(options), *last])
        write(options.output, f"{table}\nGenerated by `{command}`.\n")
    else:
        print(table, end="")
