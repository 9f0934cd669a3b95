"""The command `sweep`."""

import dataclasses
import functools
import shlex
from pathlib import Path

from keras_mixer import console
from keras_mixer.commands.shared import check_writable, write
from keras_mixer.config.command_line import parse
from keras_mixer.config.options import COUNT, SEED, as_flags, option
from keras_mixer.config.resolve import resolve
from keras_mixer.config.training import Config
from keras_mixer.errors import path_errors
from keras_mixer.studies import sweep as study_sweep
from keras_mixer.studies import trials as study_trials
from keras_mixer.studies.space import parse_space
from keras_mixer.training.open_run import check_sizes, plan_run
from keras_mixer.training.run import Run


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Flags of `sweep`."""

    space: str | None = option(
        None,
        "What to vary: OPTION=VALUES, separated by semicolons. Values are separated by commas; "
        "low..high is a range, low..high:log one that is drawn evenly in the logarithm. Options "
        "joined by + have the same value. Example: "
        "'lr=1e-3..1e-2:log; dropout=0,0.1; dim+tokens_mlp_dim=64,128'.",
        basic=True,
    )
    sampler: str = option(
        "grid",
        "How settings are chosen. grid: all combinations; random: --trials drawn ones; tpe: drawn "
        "near the best so far (tree-structured Parzen estimator).",
        choices=study_sweep.SAMPLERS,
        basic=True,
    )
    trials: int = option(20, "Number of settings, for random and tpe.", basic=True, **COUNT)
    seeds: tuple[int, ...] = option(
        (0,), "Seeds that each setting is trained with; settings are compared by the mean.", **SEED
    )
    prune: bool = option(
        False,
        "Stop settings whose validation accuracy is below the median of the others at that epoch, "
        "once there are five.",
    )
    score: bool = option(
        True, "Score the best setting on the test images, once for each of --test_seeds."
    )
    test_seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of the runs that are scored.", **SEED)
    storage: str | None = option(
        None,
        "URL of the database that workers share, such as postgresql+psycopg://user@host/name "
        "(default: study.db in --output_dir, by SQLite).",
        result=False,
    )
    study: str = option("sweep", "Name of the study in the database.")
    output_dir: str = option(
        "runs/sweep", "Folder for the runs; the same command goes on with what is left."
    )
    estimate: bool = option(
        False, "Print the number of steps and the expected time, and train nothing."
    )
    output: str | None = option(None, "Write the table to this file instead of printing it.")
    csv: str | None = option(None, "Write a row for each epoch of each run to this file.")
    plots: str | None = option(
        None, "Folder for plots of the search, as SVG (default: plots in --output_dir)."
    )


def sweep(options, arguments):
    """Searches the best values of some options on validation images; flags after -- go to all."""
    for path in filter(None, (options.output, options.csv)):
        check_writable(path)
    space = parse_space(options.space or "")
    search = study_sweep.Search(
        space,
        options.sampler,
        options.trials,
        tuple(dict.fromkeys(options.seeds)),
        options.prune,
        functools.partial(_config, tuple(arguments)),
        tuple(arguments),
    )
    runs = study_sweep.plan_all(search, _planner())
    if options.estimate:
        _announce(search, runs)
        return
    folder = Path(options.output_dir)
    with path_errors(f"--output_dir={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    storage = options.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
    study = study_sweep.open_study(search, storage, options.study)
    if not study_trials.tried(search, study, folder):
        _announce(search, runs)
    test_seeds = tuple(dict.fromkeys(options.test_seeds)) if options.score else ()
    result = study_sweep.sweep(search, study, folder, test_seeds)
    _publish(result, search, options, arguments)
    study_trials.draw(study, Path(options.plots) if options.plots else folder / "plots")


def _config(flags, setting):
    """Returns the config of a setting, beside the flags after --."""
    given = [f"--{name}={value}" for names, value in setting.items() for name in names.split("+")]
    return parse(Config, [*flags, *given])[0]


def _planner():
    """Returns `plan_run`, which opens the same data only once."""
    opened = {}

    def plan(config):
        key = config.checkpoint, *config.dataset_options().items()
        if config.checkpoint or key not in opened:
            opened[key] = plan_run(config)
        dataset = opened[key].dataset
        run = opened[key] if config.checkpoint else Run(None, *resolve(config, dataset), dataset)
        check_sizes(run)
        return run

    return plan


def _announce(search, runs):
    """Says what the whole search will cost."""
    steps, seconds = study_sweep.estimate(search, runs)
    count, seeds = len(search.queue()), len(search.seeds)
    console.say(
        f"{count} settings, {seeds} seed{'s' * (seeds > 1)} each, {steps:,} steps: about "
        f"{console.duration(seconds)} in all, by the speed of one setting here"
        f"{', less what is stopped early' * search.prune}"
    )


def _publish(result, search, options, arguments):
    table = study_trials.as_table(result, search)
    if options.output:
        last = ["--", *arguments] if arguments else []
        line = shlex.join(["keras-mixer", "sweep", *as_flags(options), *last])
        write(options.output, f"{table}\nGenerated by `{line}`.\n")
    else:
        print(table, end="")
    if options.csv:
        write(options.csv, study_trials.as_csv(result, search))
