"""Commands for many runs: report, transfer, resizing."""

import dataclasses
import shlex
from pathlib import Path

from keras_mixer.commands.shared import check_writable, write
from keras_mixer.config.command_line import parse
from keras_mixer.config.options import SEED, as_flags, option
from keras_mixer.config.presets import preset_folder, preset_path
from keras_mixer.config.training import Config
from keras_mixer.console import quiet_tensorflow
from keras_mixer.data.datasets import AVG5
from keras_mixer.errors import InputError, named
from keras_mixer.studies.report import tabulate
from keras_mixer.weights.registry import release_of


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Flags of `report`."""

    output: str | None = option(None, "Write the table to this file instead of printing it.")
    presets: str | None = option(
        None,
        "Folder of flagfiles; runs that use one are listed under its name (default: that of "
        "--preset).",
    )


def report(options, arguments):
    """Tabulates finished runs: mean ± std over runs that differ only in their seed."""
    if not arguments:
        raise InputError("expected at least one RUN")
    if options.output:
        check_writable(options.output)
    _publish("report", options, arguments, tabulate(arguments, _presets(options.presets)))


def _presets(folder):
    """Returns a dict from the flag that names a preset to the set of its flags."""
    presets = {}
    for path in sorted(Path(folder or preset_folder()).glob("*.flags")):
        name = f"--flagfile={path.as_posix()}" if folder else f"--preset={path.stem}"
        try:
            presets[name] = set(as_flags(parse(Config, [f"--flagfile={path}"])[0]))
        except InputError as error:
            raise InputError(f"{path}: {error}; fix it, or give another --presets") from error
    return presets


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """Flags of `transfer`."""

    checkpoint: str | None = option(None, "Pretrained weights to start from, as for train.")
    datasets: tuple[str, ...] = option(
        AVG5,
        "Datasets: NAME means --preset=finetune_NAME; a path ending in .flags is used as given.",
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds; one run each.", **SEED)
    lrs: tuple[float, ...] = option(
        (0.003, 0.01, 0.03, 0.06),
        "Learning rates to choose from, on held-out training images; the default is the paper's.",
        above=0.0,
        high=1000.0,
    )
    scratch: bool = option(
        False, "Also train models of the same sizes from scratch, with the same budget."
    )
    output_dir: str = option(
        "runs/transfer", "Folder for the runs; finished ones are not repeated."
    )
    output: str | None = option(None, "Write the table to this file instead of printing it.")


def transfer(options, arguments):
    """Fine-tunes a checkpoint on several datasets; flags after -- go to every run."""
    if options.checkpoint is None:
        raise InputError("--checkpoint: expected the weights to start from")
    if options.output:
        check_writable(options.output)
    extra = [f"--checkpoint={options.checkpoint}", *arguments]
    presets = {_preset_name(name): _finetuning(name, extra) for name in options.datasets}
    with quiet_tensorflow():
        from keras_mixer.studies.transfer import as_table, study_transfer

    seeds, lrs = (list(dict.fromkeys(values)) for values in (options.seeds, options.lrs))
    results = study_transfer(presets, lrs, seeds, options.output_dir, options.scratch)
    release = release_of(options.checkpoint)
    table = as_table(results, release.finetuned if release else {})
    _publish("transfer", options, [], table, last=["--", *arguments] if arguments else [])


def _preset_name(name):
    return Path(name).stem.removeprefix("finetune_") if name.endswith(".flags") else name


def _finetuning(name, extra):
    if not name.endswith(".flags"):
        with named(f"--datasets={name}"):
            return parse(Config, [f"--flagfile={preset_path(f'finetune_{name}')}", *extra])[0]
    if not Path(name).is_file():
        raise InputError(f"--datasets={name}: no such flagfile")
    return parse(Config, [f"--flagfile={name}", *extra])[0]


@dataclasses.dataclass(frozen=True)
class ResizingOptions:
    """Flags of `resizing`."""

    shapes: tuple[str, ...] = option(
        ("56/4",),
        "Image and patch sizes, as image/patch in pixels: 56/4, or 56x28/4 if not square.",
    )
    num_steps: int = option(
        1, "Epochs of fine-tuning after resizing, and of training from scratch. 0: none.", low=0
    )
    output_dir: str = option(
        "runs/resizing", "Folder for the runs; finished ones are not repeated."
    )
    output: str | None = option(None, "Write the table to this file instead of printing it.")


def resizing(options, arguments):
    """Measures accuracy of runs at other image and patch shapes, before and after training."""
    if not arguments:
        raise InputError("expected at least one RUN")
    if options.output:
        check_writable(options.output)
    with quiet_tensorflow():
        from keras_mixer.studies.resizing import parse_shape, study_resizing

    shapes = list(dict.fromkeys(map(parse_shape, options.shapes)))
    table = study_resizing(arguments, shapes, options.num_steps, options.output_dir)
    _publish("resizing", options, arguments, table)


def _publish(command, options, arguments, table, last=()):
    """Prints a table, or writes it to --output together with the command that made it."""
    if options.output:
        line = shlex.join(["keras-mixer", command, *arguments, *as_flags(options), *last])
        write(options.output, f"{table}\nGenerated by `{line}`.\n")
    else:
        print(table, end="")
