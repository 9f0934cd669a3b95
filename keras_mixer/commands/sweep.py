"""The command `sweep`."""

import dataclasses
from pathlib import Path
from shlex import quote

from keras_mixer.commands.shared import check_outputs, publish_table, refuse_options, write
from keras_mixer.config.options import COUNT, SEED, option
from keras_mixer.errors import InputError, path_errors
from keras_mixer.log import duration, logger
from keras_mixer.studies import sweep as study_sweep
from keras_mixer.studies import trials as study_trials
from keras_mixer.studies.space import SAMPLERS, SET_BY_STUDIES, Search, parse_space


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Flags of `sweep`."""

    space: str | None = option(
        None,
        "What to vary: OPTION=VALUES, separated by semicolons. Values are separated by commas; "
        "low..high is a range, low..high:log one that is sampled uniformly in the logarithm. "
        "Options joined by + have the same value; shapes are written 8x8. Ranges are for random "
        "and tpe. Example: 'lr=1e-3..1e-2:log; dropout=0,0.1; dim+tokens_mlp_dim=64,128'.",
        basic=True,
    )
    sampler: str = option(
        "grid",
        "How settings are chosen. grid: all combinations; random: --trials at random; tpe: near "
        "the best so far (tree-structured Parzen estimator).",
        choices=SAMPLERS,
        basic=True,
    )
    trials: int = option(
        20,
        "Number of settings, with those of earlier calls; only for random and tpe.",
        basic=True,
        **COUNT,
    )
    seeds: tuple[int, ...] = option(
        (0,), "Seeds that each setting is trained with; settings are compared by the mean.", **SEED
    )
    prune: bool = option(
        False,
        "Stop settings whose best validation accuracy so far, by the first seed, is below the "
        "median of what finished settings had at that epoch (Optuna's median pruner); from the "
        "sixth setting on.",
    )
    score: bool = option(
        True,
        "Train the best setting with those of --test_seeds that it lacks, and score these runs on "
        "the test images, once each.",
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
        "runs/sweep",
        "Folder for the runs. The same command continues with the settings that are left; one that "
        "failed is tried again only in another --study.",
    )
    estimate: bool = option(
        False,
        "Print the number of steps and the expected time of the whole search, including what is "
        "done already, and train nothing.",
    )
    output: str | None = option(None, "Write the table to this file instead of printing it.")
    csv: str | None = option(None, "Write a row for each epoch of each run to this file.")


def sweep(options, arguments):
    """Searches the best values of options of train, by validation accuracy.

    Flags of train (see `keras-mixer train --help`) go after -- and apply to every run.
    """
    space = parse_space(options.space or "")
    _check(options, arguments, space)
    search = Search(
        space,
        options.sampler,
        options.trials,
        tuple(dict.fromkeys(options.seeds)),
        options.prune,
        tuple(arguments),
    )
    test_seeds = tuple(dict.fromkeys(options.test_seeds)) if options.score else ()
    runs = study_sweep.plan_settings(search)
    if options.estimate:
        _log_cost(search, runs, test_seeds)
        return
    folder = Path(options.output_dir)
    with path_errors(f"--output_dir={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    study = study_sweep.open_study(search, folder, options.storage, options.study)
    if not study_trials.list_trials(search, study, folder):
        _log_cost(search, runs, test_seeds)
    result = study_sweep.sweep(search, study, folder, test_seeds)
    last = ["--", *arguments] if arguments else []
    publish_table("sweep", options, [], study_trials.as_table(result, search), last)
    if options.csv:
        write(options.csv, study_trials.as_csv(result, search))
    study_trials.draw_plots(study, folder)
    logger.info(f"a page with plots: keras-mixer report {quote(str(folder))} --html=DIR")


def _check(options, arguments, space):
    """Refuses what would fail late, or would be ignored."""
    check_outputs(options, "output", "csv")
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir={folder}: a file is in the way; give a folder")
    if options.sampler == "grid" and options.trials != SweepOptions.trials:
        raise InputError(
            f"--trials={options.trials} is for --sampler=random or tpe; a grid has all combinations"
        )
    varied = {name for names in space for name in names.split("+")}
    set_here = {name: "is set by the sweep for every run" for name in SET_BY_STUDIES}
    refuse_options(arguments, set_here | dict.fromkeys(varied, "is in --space"))


def _log_cost(search, runs, test_seeds):
    logger.info("measuring the speed of one setting, to estimate the time")
    steps, seconds = study_sweep.estimate(search, runs, test_seeds)
    scored = ", with those of the runs that are scored" * bool(test_seeds)
    logger.info(
        f"settings: {len(runs)}, seeds of each: {len(search.seeds)}; {steps:,} steps{scored}: "
        f"about {duration(seconds)}, by the speed of one setting here"
        f"{', less what is stopped early' * search.prune}"
    )
