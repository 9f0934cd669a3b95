"""Sweep: searches the best values of some options, with Optuna.

Every setting is trained as ordinary runs, one per seed, and is judged by the validation images
alone. The chosen one is then scored on the test images, once per seed. All that is to be tried is
queued when a study is made, so that several workers share it, and none tries what another does.
"""

import dataclasses
import random
import re
import statistics
import time
from collections.abc import Callable

from keras_mixer.config.training import Config
from keras_mixer.errors import InputError, RunError
from keras_mixer.files import locked_in_turn
from keras_mixer.jobs import JobSequence
from keras_mixer.log import logger
from keras_mixer.studies.pruning import pruning_of
from keras_mixer.studies.space import grid, shown_setting
from keras_mixer.studies.trials import (
    INDEX,
    LEFT,
    Result,
    counts,
    folder_of,
    quiet_optuna,
    text_of,
    tried,
)

SAMPLERS = ("grid", "random", "tpe")
HEARTBEAT = 10  # seconds between the signs of life of a worker
GRACE = 4 * HEARTBEAT  # without one for this long, what it was training is tried again
_MOST_TRIES = 5  # of one setting whose process did not survive, or of opening a database
_SEARCH = "search"  # user attribute of the study


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Attributes:
        space: dict from option to `Choice` or `Range`.
        sampler: One of `SAMPLERS`.
        trials: int. Number of settings, for random and tpe.
        seeds: Seeds that each setting is trained with.
        prune: bool. Stop settings whose best validation accuracy so far is below the median of
            what the finished ones had at the same epoch: Optuna's MedianPruner, by the first seed.
        make: Function from a setting, a dict from option to string, to the `Config` of its runs.
        flags: list of strings that tells what `make` does, for comparing searches.
    """

    space: dict
    sampler: str
    trials: int
    seeds: tuple[int, ...]
    prune: bool
    make: Callable[[dict], Config]
    flags: tuple[str, ...] = ()

    def queue(self):
        """Returns what is to be tried: dicts of parameters, empty where the sampler decides."""
        if self.sampler == "grid":
            return grid(self.space)
        return [{}] * self.trials if self.sampler == "tpe" else self.draw()

    def draw(self):
        """Returns `trials` settings that differ, or all that there are, drawn at random."""
        draws, found = random.Random(self.seeds[0]), {}
        for _ in range(100 * self.trials):
            setting = {name: values.draw(draws) for name, values in self.space.items()}
            found.setdefault(tuple(setting.values()), setting)
            if len(found) == self.trials:
                break
        return list(found.values())

    def describe(self):
        """Returns what must be the same for workers of one study, as a dict of JSON values."""
        return {
            "--space": "; ".join(f"{name}={values}" for name, values in self.space.items()),
            "--sampler": self.sampler,
            "--seeds": list(self.seeds),
            "--prune": self.prune,
            "flags after --": " ".join(self.flags),
        }


# === Running ===


def sweep(search, study, folder, test_seeds=()):
    """Tries all settings of a search that are left, and scores the best one on the test images.

    Args:
        search: `Search`.
        study: Optuna study, from `open_study`.
        folder: `Path` of the run directories.
        test_seeds: Seeds of the runs to score; empty for none.

    Returns:
        A `Result`.

    Raises:
        RunError: If no setting could be trained.
        InputError, Interrupted: See `run_job`.
    """
    work = _Work(search, study, folder)
    with quiet_optuna():
        while not work.over():
            study.optimize(work.try_next, n_trials=1, catch=(InputError, RunError))
    trials = tried(search, study, folder)
    if not trials or trials[0].state != "complete":
        reasons = "; ".join(dict.fromkeys(trial.error for trial in trials if trial.error))
        raise RunError(f"no setting could be trained: {reasons or 'all were stopped early'}")
    return Result(trials, _score(search, trials[0], test_seeds))


class _Work:
    """Trains the settings of a study that wait."""

    def __init__(self, search, study, folder):
        self.search, self.study, self.folder = search, study, folder
        settled, seeds = len(tried(search, study, folder)), len(search.seeds)
        self.jobs = JobSequence(len(search.queue()) * seeds, settled * seeds)
        self._waits = False

    def over(self):
        """Returns whether nothing is left; waits while another worker may leave something."""
        from optuna.storages import fail_stale_trials

        while not self._of_state("WAITING"):
            if not (running := self._of_state("RUNNING")):
                return True
            self._say_once(
                f"waiting for what another worker trains, or left behind when it was killed "
                f"({len(running)}): that is continued {GRACE} s after its last sign of life"
            )
            time.sleep(HEARTBEAT / 2)
            fail_stale_trials(self.study)
        return False

    def _say_once(self, text):
        if not self._waits:
            logger.info(text)
        self._waits = True

    def _of_state(self, *names):
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.name in names]

    def try_next(self, trial):
        """Trains a setting with every seed, and returns its mean validation top-1."""
        from optuna import TrialPruned

        if self._is_surplus(trial):
            trial.set_user_attr(LEFT, True)
            raise RunError("nothing is left to try")
        self.study.sampler = _sampler(self.search, trial.user_attrs[INDEX])
        setting = {name: v.suggest(trial, name) for name, v in self.search.space.items()}
        try:
            return statistics.mean(self._validation_top1(trial, setting))
        except TrialPruned:
            raise
        except (InputError, RunError) as error:
            trial.set_user_attr("error", str(error))
            logger.warning(f"{text_of(setting)}: failed: {error}")
            raise
        except BaseException:  # a signal, or a defect: not the setting's fault
            trial.set_user_attr(LEFT, True)
            attributes = {INDEX: trial.user_attrs[INDEX]}
            self.study.enqueue_trial(trial.params, user_attrs=attributes)
            raise

    def _is_surplus(self, trial):
        """Returns whether workers that began at once took the last one, or queued one twice."""
        index, all_trials = trial.user_attrs.get(INDEX), self.study.get_trials(deepcopy=False)
        earlier = [t for t in all_trials[: trial.number] if t.user_attrs.get(INDEX) == index]
        return index is None or any(counts(t) or t.state.name == "WAITING" for t in earlier)

    def _validation_top1(self, trial, setting):
        for number, seed in enumerate(self.search.seeds):
            config = _config(self.search, setting, seed, self.folder, "validation")
            pruning = (
                pruning_of(trial, config.output_dir) if self.search.prune and not number else None
            )
            callbacks = [pruning] if pruning else []
            run = self.jobs.run(f"{text_of(setting)}, seed {seed}", config, callbacks)
            if pruning:
                pruning.report_history()  # of a run that was finished before
            yield run.scores["validation"]["top1"]


def _config(search, setting, seed, folder, eval_split):
    """Returns the config of a run."""
    return dataclasses.replace(
        search.make(setting),
        seed=seed,
        eval_split=eval_split,
        export=False,
        overwrite=False,
        output_dir=str(folder_of(folder, setting) / f"seed-{seed}"),
    )


def _score(search, best, seeds):
    """Trains the best setting with the seeds it lacks, and scores all on the test images."""
    jobs, folder, name = JobSequence(len(seeds)), best.folder.parent, text_of(best.setting)
    lock = folder / ".score.lock"
    waiting = f"another worker trains the best setting (its lock: {lock}); waiting"
    with locked_in_turn(lock, lambda: logger.info(waiting)):  # by one; the others find it done
        return [
            jobs.run(f"the best, {name}, seed {s}", _config(search, best.setting, s, folder, None))
            for s in seeds
        ]


# === Studies ===


def open_study(search, storage, name):
    """Opens the Optuna study of a search, or makes it and queues what is to be tried.

    Args:
        search: `Search`.
        storage: URL of a database, as SQLAlchemy and Optuna take it.
        name: Name of the study in it.

    Raises:
        InputError: If the database cannot be opened, or holds another search by that name.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with quiet_optuna():
            return _opened(search, _new_storage(storage), name)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--storage: its database needs another package: {reason}") from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(
            f"--storage: the database {make_url_safe(storage)} cannot be opened: {reason:.300}"
        ) from error


def _new_storage(url):
    """Opens a database, again if another worker makes its tables at the same moment."""
    from sqlalchemy.exc import DBAPIError

    for _ in range(_MOST_TRIES - 1):
        try:
            return _storage(url)
        except DBAPIError as error:
            if not re.search("already exists|duplicate key|locked", str(error)):
                raise
            time.sleep(1)
    return _storage(url)


def make_url_safe(url):
    """Returns the URL of a database without its password."""
    return re.sub(r"(?<=:)[^:@/]*(?=@)", "***", url)


def _storage(url):
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    again = RetryHeartbeatStaleTrialCallback(max_retry=_MOST_TRIES - 1)
    return RDBStorage(
        url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=again
    )


def _opened(search, storage, name):
    import optuna

    pruner = optuna.pruners.MedianPruner() if search.prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        storage=storage,
        sampler=_sampler(search, 0),
        pruner=pruner,
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
    known, wanted = study.user_attrs.get(_SEARCH), search.describe()
    if known is None:
        study.set_user_attr(_SEARCH, wanted)
    elif known != wanted:
        differing = [
            f"{flag} was {known.get(flag)}, now {value}"
            for flag, value in wanted.items()
            if known.get(flag) != value
        ]
        raise InputError(
            f"--study={name} holds another search: {'; '.join(differing)}; give another --study or "
            f"another --output_dir"
        )
    _fill_queue(study, search.queue())
    return study


def _sampler(search, index):
    """Returns the sampler of a place in the queue: no two draw alike, and one does so again."""
    from optuna.samplers import RandomSampler, TPESampler

    kind = TPESampler if search.sampler == "tpe" else RandomSampler
    return kind(seed=random.Random(f"{search.seeds[0]}, {index}").randrange(2**32))


def _fill_queue(study, queue):
    """Queues what is not in the study yet: all of it, or the rest of a larger --trials."""
    known = {trial.user_attrs.get(INDEX) for trial in study.get_trials(deepcopy=False)}
    for index, params in enumerate(queue):
        if index not in known:
            study.enqueue_trial(params, user_attrs={INDEX: index})


# === Cost ===


def plan_all(search, plan):
    """Returns the planned `Run` of each setting; of as many drawn ones for tpe.

    Settings that are not valid are left out, with a warning; they will fail.

    Args:
        search: `Search`.
        plan: Function from a `Config` to its planned `Run`.

    Raises:
        InputError: If no setting is valid.
    """
    queue = search.queue() if search.sampler == "grid" else search.draw()
    runs, errors = [], []
    for params in queue:
        try:
            runs.append(_checked(plan(search.make(shown_setting(search.space, params)))))
        except InputError as error:
            errors.append(error)
    if errors and not runs:
        raise errors[0]
    for error in dict.fromkeys(map(str, errors)):
        logger.warning(f"some settings are not valid and will fail: {error}")
    return runs


def _checked(run):
    if run.dataset.validation is None:
        raise InputError(
            "a sweep compares settings by validation images, and there are none: give "
            "--validation_fraction above 0, or --validation_split"
        )
    return run


def estimate(search, runs, test_seeds=()):
    """Returns (steps, seconds) of a search, by the speed of one setting, measured here.

    The others take as long as their multiply-adds tell, and to start as long as that one.

    Args:
        search: `Search`.
        runs: list of `Run`, from `plan_all`.
        test_seeds: Seeds of the runs of the best setting; counted as an average one's.
    """
    from keras_mixer.benchmark.benchmark import measure_training

    def work(run):
        return run.spec.architecture.multiply_adds * run.total_steps * run.config.batch_size

    row, sizes = measure_training(runs[0].config), runs[0].spec.architecture
    times = len(search.seeds) + len(set(test_seeds) - set(search.seeds)) / len(runs)
    steps = times * sum(run.total_steps for run in runs)
    seconds = sum(work(run) / row.rate / sizes.multiply_adds + row.first_call for run in runs)
    return round(steps), times * seconds
