"""The commands `report`, `transfer`, `resizing` and `benchmark`."""

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

from keras_mixer.backend import check_installed, quiet_tensorflow
from keras_mixer.benchmark import measure as speed
from keras_mixer.benchmark import scaling
from keras_mixer.commands.shared import (
    check_outputs,
    check_writable,
    command_line,
    presets_in,
    publish_table,
    refuse_options,
    write,
)
from keras_mixer.config.command_line import parse
from keras_mixer.config.options import COUNT, SEED, option, options_of
from keras_mixer.config.presets import preset_names, preset_path
from keras_mixer.config.training import Config
from keras_mixer.data.datasets import AVG5, dataset_row
from keras_mixer.errors import InputError, errors_about
from keras_mixer.log import logger
from keras_mixer.reports.curves import draw_curves
from keras_mixer.reports.page_folder import INDEX, check_page_folder
from keras_mixer.reports.report import as_table, read_experiments
from keras_mixer.runs.open_run import plan_run
from keras_mixer.studies.space import SET_BY_STUDIES
from keras_mixer.weights.registry import release_of

PICTURES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Flags of `report`."""

    output: str | None = option(None, "Write the table to this file instead of printing it.")
    html: str | None = option(
        None,
        "Folder for a page, too: curves, intervals, confusion, calibration, mistakes and weights.",
    )
    plot: str | None = option(
        None, "Draw loss, accuracy and learning rate by epoch to this file (.png, .svg, .pdf)."
    )
    presets: str | None = option(
        None,
        "Folder of flagfiles; runs that use one are listed under its name (default: that of "
        "--preset).",
    )


def report(options, arguments):
    """Tabulates finished runs: mean ± std over runs that differ only in their seed.

    The folder of a sweep stands for its runs. With --html, a page with figures is written as well.
    """
    if not arguments:
        raise InputError("expected at least one RUN")
    check_outputs(options, "output", "plot")
    if options.plot and Path(options.plot).suffix not in PICTURES:
        raise InputError(f"--plot={options.plot}: expected a name in {', '.join(PICTURES)}")
    if options.html:
        check_page_folder(options.html)
    experiments = read_experiments(arguments, presets_in(options.presets))
    publish_table("report", options, arguments, as_table(experiments))
    if options.plot:
        draw_curves(options.plot, experiments)
    if options.html:
        _write_page(options, arguments, experiments)


def _write_page(options, arguments, experiments):
    with quiet_tensorflow():
        from keras_mixer.reports.page import write_page
        from keras_mixer.studies.trials import drawn_plots

    drawn = {folder: drawn_plots(folder) for folder in arguments}
    several = sum(map(bool, drawn.values())) > 1
    plots = [
        (picture, f"{folder}: {text}" if several else text)
        for folder, pictures in drawn.items()
        for picture, text in pictures
    ]
    write_page(options.html, experiments, command_line("report", options, arguments), plots)
    logger.info(f"page: {Path(options.html) / INDEX}")


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """Flags of `transfer`."""

    checkpoint: tuple[str, ...] | None = option(
        None, "Pretrained weights to start from, as for train; several are compared in one table."
    )
    datasets: tuple[str, ...] = option(
        AVG5,
        "Datasets: NAME means --preset=finetune_NAME, or --preset=NAME where there is none; a path "
        "ending in .flags is used as given. --data_dir after -- is for datasets whose flagfile has "
        "none.",
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
    """Fine-tunes checkpoints on several datasets; flags after -- go to every run."""
    if options.checkpoint is None:
        raise InputError("--checkpoint: expected the weights to start from")
    if options.output:
        check_writable(options.output)
    set_here = dict.fromkeys(("checkpoint", *SET_BY_STUDIES), "is set by transfer for every run")
    refuse_options(arguments, set_here | {"lr": "is one of --lrs"})
    with quiet_tensorflow():
        from keras_mixer.studies.transfer import FINE_TUNED, as_table, study_transfer

    checkpoints = list(dict.fromkeys(map(_normalize, options.checkpoint)))
    starts = checkpoints if len(checkpoints) > 1 else [FINE_TUNED]
    arms = {
        (_dataset_name(name), start): _finetuning(name, [f"--checkpoint={checkpoint}", *arguments])
        for name in options.datasets
        for start, checkpoint in zip(starts, checkpoints, strict=True)
    }
    seeds, lrs = (list(dict.fromkeys(values)) for values in (options.seeds, options.lrs))
    results = study_transfer(arms, lrs, seeds, options.output_dir, options.scratch)
    releases = {start: release_of(path) for start, path in zip(starts, checkpoints, strict=True)}
    table = as_table(results, {start: r.finetuned for start, r in releases.items() if r})
    publish_table("transfer", options, [], table, last=["--", *arguments] if arguments else [])


def _normalize(path):
    """Normalizes a path; names with a colon, such as hf:, stay as they are."""
    return path if ":" in path else os.path.normpath(path)


def _dataset_name(name):
    return Path(name).stem.removeprefix("finetune_") if name.endswith(".flags") else name


def _finetuning(name, extra):
    """Returns the `Config` of a dataset: its flagfile, changed by flags after --.

    --data_dir and --labels after -- are for datasets in files whose flagfile has none.
    """
    with errors_about(f"--datasets={name}"):
        path = name if name.endswith(".flags") else _preset_of(name)
        if not Path(path).is_file():
            raise InputError("no such flagfile")
        flagfile = parse(Config, [f"--flagfile={path}"])[0]
        config = parse(Config, [f"--flagfile={path}", *extra])[0]
    if flagfile.data_dir or dataset_row(config.dataset).origin == "embedded":
        return dataclasses.replace(config, data_dir=flagfile.data_dir, labels=flagfile.labels)
    return config


def _preset_of(name):
    """Returns the path of the flagfile that fine-tunes on a dataset."""
    names = preset_names()
    for preset in (f"finetune_{name}", name):
        if preset in names:
            return preset_path(preset)
    known = dict.fromkeys(preset.removeprefix("finetune_") for preset in names)
    raise InputError(f"expected a path that ends in .flags, or one of {', '.join(known)}")


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
    publish_table("resizing", options, arguments, table)


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions(Config):
    """Flags of `benchmark`: those of `train`, and these."""

    measure: tuple[str, ...] = option(
        ("training", "inference", "input"),
        "What to measure: training (a step on random images), inference (a batch), latency (one "
        "image), exported (the SavedModel), input (the pipeline alone), fit (both together).",
        choices=speed.MEASURES,
        heading="Benchmark",
        basic=True,
    )
    compare: tuple[str, ...] | None = option(
        None,
        "What to measure beside it. timm: timm's Mixer of the same sizes, eager and compiled; jax: "
        "training on Keras's JAX backend, which needs jax.",
        choices=speed.OTHERS,
        basic=True,
    )
    timm_python: str = option(
        sys.executable, "Python of an environment with torch and timm.", result=False
    )
    vary: tuple[str, ...] | None = option(
        None,
        "Sizes to measure training at half, one, two and four times of.",
        choices=tuple(speed.VARIED),
    )
    processes: tuple[int, ...] | None = option(
        None,
        "Measure how training scales with these numbers of processes instead, on Keras's JAX "
        "backend, each on a core of its own; and calculate it for up to 64 GPUs.",
        low=1,
        high=64,
    )
    channels: int | None = option(
        None, "Color channels of random images (default: those of the data).", low=1, high=4
    )
    repeats: int = option(5, "Number of times that everything is measured, by turns.", **COUNT)
    seconds: float = option(1.0, "Duration of each measurement.", above=0.0, high=3600.0)
    output: str | None = option(None, "Write the table to this file, too (.md).")
    json: str | None = option(None, "Write all that was measured to this file.")
    plot: str | None = option(None, "Draw time and memory by size, for --vary (.png).")


def benchmark(options, arguments):
    """Measures the speed and memory of training, inference and input, beside timm's if asked."""
    for flag in ("output", "json", "plot"):
        if path := getattr(options, flag):
            check_writable(path, flag)
    if options.plot and not options.vary:
        raise InputError("--plot: there is nothing to draw without --vary")
    config = Config(**options_of(options, Config))
    run = plan_run(config)
    table, found, picture = (_scaling if options.processes else _measured)(options, config, run)
    print(table, end="")
    if options.output:
        publish_table("benchmark", options, [], table)
    if options.json:
        write(options.json, json.dumps(found, indent=2))
    if options.plot:
        write(options.plot, picture)


def _measured(options, config, run):
    """Returns the table, the JSON values and the plot of --vary, as bytes."""
    compare = options.compare or ()
    if "jax" in compare:
        with errors_about("--compare=jax"):
            check_installed("jax")
    if "timm" in compare and not shutil.which(options.timm_python):
        raise InputError(f"--timm_python={options.timm_python}: expected a program, found none")
    sizes = run.spec.architecture
    sizes = sizes.replace(channels=options.channels or sizes.channels)
    how = options.repeats, options.seconds, options.channels
    found = speed.measure(config, options.measure, compare, options.timm_python, *how)
    varied = speed.vary(config, options.vary or (), *how)
    table = speed.as_table(found, sizes, config.precision)
    table += "\n" + speed.varied_table(varied) if varied else ""
    picture = io.BytesIO()
    if options.plot:
        speed.plot(varied).savefig(picture, format="png", dpi=150)
    return table, speed.as_json(found, varied, sizes), picture.getvalue()


def _scaling(options, config, run):
    """Returns the table and the JSON values of --processes, and no plot."""
    check_installed("jax")
    counts = sorted(set(options.processes))
    if uneven := [count for count in counts if run.config.batch_size % count]:
        raise InputError(
            f"--batch_size={run.config.batch_size}: expected a multiple of --processes, received "
            f"{uneven[0]}"
        )
    results = scaling.measure(config, counts, options.repeats)
    table = scaling.as_table(results, run.spec.architecture, run.config.batch_size)
    return table, results, b""
