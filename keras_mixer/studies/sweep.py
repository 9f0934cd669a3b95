"""Hyperparameter sweep: searches the best values of some options, with Optuna.

Each setting is trained as ordinary runs, one per seed, and compared by the validation images alone.
The best setting is then scored on the test images, once per seed.

All settings are queued in the study when it is opened. Several workers share the queue: Optuna
hands each setting to one of them, and queues it again when that worker's heartbeat stops.
"""

import re
import statistics
import time
from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.config.resolve import resolve
from keras_mixer.errors import InputError, InUseError, RunError
from keras_mixer.files import locked_in_turn
from keras_mixer.jobs import JobSequence
from keras_mixer.log import logger
from keras_mixer.runs.open_run import check_sizes, plan_run
from keras_mixer.runs.run import HISTORY, Run, read_history
from keras_mixer.studies.space import describe_setting, format_setting, quiet_optuna
from keras_mixer.studies.trials import Result, counts, list_trials

HEARTBEAT = 10  # seconds between two heartbeats of a worker
GRACE = 4 * HEARTBEAT  # without one for this long, its setting is queued again
_MOST_RETRIES = 4  # of a setting whose process was killed
_SEARCH = "search"  # user attribute of the study


# === Training ===


def sweep(search, study, folder, test_seeds=()):
    """Trains all settings of a search that are left, and scores the best one on the test images.

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
    worker = _Worker(search, study, folder)
    with quiet_optuna():
        worker.train_all()
    trials = list_trials(search, study, folder)
    if not trials or trials[0].state != "complete":
        reasons = "; ".join(dict.fromkeys(trial.error for trial in trials if trial.error))
        raise RunError(f"no setting could be trained: {reasons or 'all were stopped early'}")
    best, jobs = trials[0].setting, JobSequence(len(test_seeds))
    runs = [
        worker.run(
            jobs,
            f"the best, {describe_setting(best)}, seed {seed}",
            search.run_config(best, seed, folder, None),
        )
        for seed in test_seeds
    ]
    return Result(trials, runs)


class _Stopped(Exception):
    """Carries what stopped a worker through Optuna, as its cause."""


class _Worker:
    """Trains the settings that wait in the queue of a study."""

    def __init__(self, search, study, folder):
        self.search, self.study, self.folder = search, study, folder
        seeds, done = len(search.seeds), len(list_trials(search, study, folder))
        count = search.trials if search.sampler == "tpe" else len(search.settings)
        self.jobs = JobSequence(count * seeds, done * seeds)
        self._announced = set()

    def train_all(self):
        """Trains settings until none waits, and none is left to another worker."""
        while self._wait_for_setting():
            try:
                self.study.optimize(self._train, n_trials=1, catch=(InputError, RunError))
            except _Stopped as stopped:
                raise stopped.__cause__ from None
            except (ValueError, AssertionError) as error:  # Optuna raises one while the other
                if "Cannot tell" not in f"{error} {error.__context__}":
                    raise
                logger.warning("another worker took over a setting while this one was suspended")

    def _wait_for_setting(self):
        """Waits until a setting is in the queue; returns False if no more can come."""
        from optuna.storages import fail_stale_trials

        while not self._count("WAITING"):
            if not (running := self._count("RUNNING")):
                return False
            self._announce(
                f"waiting for {running} settings of other workers; a setting whose worker was "
                f"killed is continued {GRACE} s after its last heartbeat"
            )
            time.sleep(HEARTBEAT / 2)
            fail_stale_trials(self.study)
        return True

    def _count(self, state):
        return sum(t.state.name == state for t in self.study.get_trials(deepcopy=False))

    def _announce(self, text):
        """Logs a message once."""
        if text not in self._announced:
            logger.info(text)
        self._announced.add(text)

    def _train(self, trial):
        """Trains a setting with every seed, and returns its mean validation top-1."""
        from optuna import TrialPruned
        from optuna.samplers import TPESampler

        if not trial.user_attrs:  # not from the queue: another worker took the last setting
            raise RunError("no setting is left")
        # Workers have samplers of their own; seeded by the trial, no two suggest the same.
        self.study.sampler = TPESampler(seed=self.search.seeds[0] + trial.number)
        for name, values in self.search.space.items():
            values.suggest(trial, name)
        setting = format_setting(self.search.space, trial.params)
        try:
            return statistics.mean(self._validation_top1(trial, setting))
        except TrialPruned:
            raise
        except (InputError, RunError) as error:
            trial.set_user_attr("error", str(error))
            logger.warning(f"{describe_setting(setting)}: failed: {error}")
            raise
        except BaseException as error:  # a signal or a defect: the next call continues the setting
            self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
            raise _Stopped from error

    def _validation_top1(self, trial, setting):
        for seed in self.search.seeds:
            config = self.search.run_config(setting, seed, self.folder, "validation")
            pruned = self.search.prune and seed == self.search.seeds[0]
            callbacks = [pruning_callback(trial, config.output_dir)] if pruned else []
            name = f"{describe_setting(setting)}, seed {seed}"
            run = self.run(self.jobs, name, config, callbacks)
            for callback in callbacks:
                callback.report_history()  # of a run that was finished before
            yield run.scores["validation"]["top1"]

    def run(self, jobs, name, config, callbacks=()):
        """Runs a job; waits while another process trains in its directory."""
        while True:
            try:
                return jobs.run(name, config, callbacks)
            except InUseError as error:
                self._announce(f"{name}: waiting: {error}")
                time.sleep(HEARTBEAT / 2)


def pruning_callback(trial, directory):
    """Returns a Keras callback that reports validation accuracies to an Optuna trial, to prune it.

    Earlier epochs of the run in the directory are reported, too.
    """
    with quiet_tensorflow():
        import keras
    from optuna import TrialPruned

    class Pruning(keras.callbacks.Callback):
        reported = -1

        def report_history(self):
            history = Path(directory) / HISTORY
            for row in read_history(directory) if history.exists() else []:
                self.report(int(row["epoch"]) - 1, row["val_accuracy"])

        def report(self, epoch, accuracy):
            if epoch > self.reported:
                trial.report(float(accuracy), epoch)
                self.reported = epoch

        def on_train_begin(self, logs=None):
            self.report_history()

        def on_epoch_end(self, epoch, logs=None):
            if "val_accuracy" not in (logs or {}):  # stopped within the epoch
                return
            self.report(epoch, logs["val_accuracy"])
            if trial.should_prune():
                logger.info(f"stopped after epoch {epoch + 1}: below the median of other settings")
                raise TrialPruned

    return Pruning()


# === Studies ===


def open_study(search, folder, storage=None, name="sweep"):
    """Opens the Optuna study of a search, new or to be continued, and queues its settings.

    Args:
        search: `Search`.
        folder: `Path` of the run directories, which exists.
        storage: URL of a database, as SQLAlchemy and Optuna take it; None for study.db in `folder`.
        name: Name of the study in it.

    Raises:
        InputError: If the database cannot be opened, or holds another search by that name.
    """
    import optuna
    import sqlalchemy

    if storage is None:
        path = str((folder / "study.db").resolve())
        storage = sqlalchemy.URL.create("sqlite", database=path).render_as_string()
    try:
        # One worker at a time makes the tables and fills the queue.
        with quiet_optuna(), locked_in_turn(folder / ".study.lock", lambda: None):
            study = _load_study(search, storage, name)
            _check_search(study, search, name)
            _fill_queue(study, search)
            return study
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--storage: its database needs another package: {reason}") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        without_password = re.sub(r"(?<=:)[^:@/]*(?=@)", "***", storage)
        raise InputError(
            f"--storage: the database {without_password} cannot be opened: {reason:.300}"
        ) from error


def _load_study(search, storage, name):
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    return optuna.create_study(
        storage=RDBStorage(
            storage,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(_MOST_RETRIES),
        ),
        pruner=optuna.pruners.MedianPruner() if search.prune else optuna.pruners.NopPruner(),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )


def _check_search(study, search, name):
    """Stores the search in the study, or refuses one that differs from what it stores."""
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


def _fill_queue(study, search):
    """Queues the settings that the study does not have: all, or the rest of a larger --trials."""
    trials = study.get_trials(deepcopy=False)
    if search.sampler == "tpe":  # suggests each setting when its turn comes
        queue = [{}] * (search.trials - sum(map(counts, trials)))
    else:
        known = [trial.user_attrs.get("setting", trial.params) for trial in trials]
        queue = [params for params in search.settings if params not in known]
    for params in queue:
        study.enqueue_trial(params, user_attrs={"setting": params})


# === Cost ===


def plan_settings(search):
    """Returns the planned `Run` of each setting; of as many random ones for tpe.

    Settings that are not valid are left out, with a warning; they will fail.

    Raises:
        InputError: If no setting is valid.
    """
    runs, errors = [], []
    for params in search.settings:
        try:
            config = search.config(format_setting(search.space, params))
            runs.append(_planned(config, runs[0].dataset if runs else None))
        except InputError as error:
            errors.append(error)
    if errors and not runs:
        raise errors[0]
    for error in dict.fromkeys(map(str, errors)):
        logger.warning(f"some settings are not valid and will fail: {error}")
    return runs


def _planned(config, dataset):
    """Returns the planned `Run` of a config; a dataset that is open already is not opened again."""
    if dataset is None or config.checkpoint:
        run = plan_run(config)
    else:
        run = Run(None, *resolve(config, dataset), dataset)
    check_sizes(run)
    if run.dataset.validation is None:
        raise InputError(
            "a sweep compares settings by validation images, and there are none: give "
            "--validation_fraction above 0, or --validation_split"
        )
    return run


def estimate(search, runs, test_seeds=()):
    """Returns (steps, seconds) of a search, by the speed of one setting, measured here.

    The time of the others is scaled by their multiply-adds; all take as long to start. The best
    setting, which is trained with the `test_seeds`, too, counts as an average one.
    """
    from keras_mixer.benchmark.measure import measure_training

    def work(run):
        return run.spec.architecture.multiply_adds * run.total_steps * run.config.batch_size

    measured, sizes = measure_training(runs[0].config), runs[0].spec.architecture
    times = len(search.seeds) + len(set(test_seeds) - set(search.seeds)) / len(runs)
    steps = times * sum(run.total_steps for run in runs)
    rate = measured.rate * sizes.multiply_adds
    seconds = sum(work(run) / rate + measured.first_call for run in runs)
    return round(steps), times * seconds
