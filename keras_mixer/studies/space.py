"""What a sweep searches: the options that it varies, their values, and the settings to try."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import warnings

from keras_mixer.config.command_line import parse
from keras_mixer.config.data import DatasetOptions
from keras_mixer.config.options import kind_of, nearest
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError

SET_BY_STUDIES = ("seed", "output_dir", "eval_split", "export", "overwrite")
_OF_DATA = {field.name for field in dataclasses.fields(DatasetOptions)}  # settings share the images
SEARCHABLE = {
    field.name: field
    for field in dataclasses.fields(Config)
    if field.metadata["result"] and field.name not in {*SET_BY_STUDIES, *_OF_DATA}
}
_ALIASES = {a: name for name, field in SEARCHABLE.items() for a in field.metadata["aliases"]}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values of an option, as strings."""

    values: tuple[str, ...]

    def __str__(self):
        return ("|" if "," in "".join(self.values) else ",").join(self.values)

    def suggest(self, trial, name):
        """Returns one of the values, sampled by an Optuna trial."""
        return trial.suggest_categorical(name, self.values)

    def format_value(self, value):
        """Returns a value as it is written on the command line."""
        return value


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, sampled uniformly, or uniformly in the logarithm."""

    low: float
    high: float
    log: bool
    whole: bool

    def __str__(self):
        return f"{self.low:g}..{self.high:g}{':log' * self.log}"

    def suggest(self, trial, name):
        """Returns a number, sampled by an Optuna trial."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def format_value(self, value):
        """Returns a number as it is written on the command line, with four digits."""
        return str(value) if self.whole else f"{value:.4g}"


def parse_space(text):
    """Reads a search space such as `lr=1e-3..1e-2:log; dropout=0,0.1; optimizer=sgd,adamw`.

    Values are separated by commas, or by | where they have commas: `randaugment=2,9|2,15`. Two
    numbers with .. between them are a range; `:log` samples it uniformly in the logarithm. Options
    joined by + have the same value: `dim+tokens_mlp_dim=64,128`.

    Args:
        text: string.

    Returns:
        dict from option, or options joined by +, to `Choice` or `Range`, in the order given.

    Raises:
        InputError: If it is empty, or an option or a range is not valid.
    """
    space, seen = {}, set()
    for part in filter(None, map(str.strip, text.split(";"))):
        names, _, values = map(str.strip, part.partition("="))
        options = [_option(part, name.strip()) for name in names.split("+")]
        if twice := seen & set(options):
            raise InputError(f"--space: {', '.join(sorted(twice))} is given twice")
        seen |= set(options)
        space["+".join(options)] = _parse_values(options[0], values)
    if not space:
        raise InputError(
            "--space: expected what to vary, such as --space='lr=1e-3..1e-2:log; dropout=0,0.1'"
        )
    return space


def resolve_alias(name):
    """Returns the name of the option that has an alias, or is written with hyphens."""
    name = name.replace("-", "_")
    return _ALIASES.get(name, name)


def _option(part, name):
    name = resolve_alias(name)
    if name in SEARCHABLE:
        return name
    raise InputError(
        f"--space: {part!r:.80}: expected OPTION=VALUES with an option of train.py that changes "
        f"the result of a run, but no seed and nothing of the dataset; received {name!r:.60}"
        f"{nearest(name, SEARCHABLE)}"
    )


def _parse_values(name, text):
    if ".." in text:
        return _parse_range(name, text)
    values = [value.strip() for value in text.split("|" if "|" in text else ",")]
    if not all(values) or len(set(values)) < len(values):
        problem = "one is given twice" if all(values) else "one is empty"
        raise InputError(
            f"--space: {name}: expected values that differ, separated by commas, or a range such "
            f"as 0.1..0.5 or 1e-4..1e-2:log; received {text!r:.60}, where {problem}"
        )
    return Choice(tuple(values))


_NUMBERS = {"an integer": "integers", "a number": "numbers"}  # by the noun of a kind of value


def _parse_range(name, text):
    numbers = _NUMBERS.get(kind_of(SEARCHABLE[name]).noun)
    if not numbers:
        raise InputError(f"--space: {name} is no number, so it has no range; list its values")
    low, high, log = re.fullmatch(r"(?s)(.*?)\.\.(.*?)(:log)?", text).groups()
    try:
        low, high, whole = float(low), float(high), numbers == "integers"
        fits = math.isfinite(high - low) and low < high and (low > 0 or not log)
        fits = fits and not (whole and (low % 1 or high % 1))
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"--space: {name}: expected a range of two {numbers}, the smaller one first, both "
            f"positive with :log, such as 1..4 or 1..4:log; received {text!r:.60}"
        )
    return Range(low, high, log is not None, whole)


def grid(space):
    """Returns all settings of a space, dicts from option to value; the last option varies fastest.

    Raises:
        InputError: If it has a range.
    """
    if ranges := [name for name, values in space.items() if isinstance(values, Range)]:
        raise InputError(
            f"--sampler=grid: {', '.join(ranges)} is a range, which has no grid; list its values, "
            f"or give --sampler=random or tpe"
        )
    combinations = itertools.product(*(values.values for values in space.values()))
    return [dict(zip(space, values, strict=True)) for values in combinations]


def format_setting(space, params):
    """Returns the parameters of an Optuna trial as they are written on the command line."""
    return {name: values.format_value(params[name]) for name, values in space.items()}


def setting_folder(folder, setting):
    """Returns the folder of the runs of a setting."""
    name = ",".join(f"{name}={value}" for name, value in setting.items())
    return folder / re.sub(r"[^\w.,=+-]", "_", name)


def describe_setting(setting):
    """Returns a setting in words, for the terminal."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


# === Searches ===

SAMPLERS = ("grid", "random", "tpe")


@dataclasses.dataclass(frozen=True)
class Search:
    """What a sweep searches, and how.

    Attributes:
        space: dict from option to `Choice` or `Range`.
        sampler: One of `SAMPLERS`.
        trials: int. Number of settings, for random and tpe.
        seeds: Seeds that each setting is trained with.
        prune: bool. Stop settings whose best validation accuracy so far is below the median of
            what the finished ones had at the same epoch: Optuna's MedianPruner, by the first seed.
        flags: Flags of train that apply to all settings.
    """

    space: dict
    sampler: str
    trials: int
    seeds: tuple[int, ...]
    prune: bool
    flags: tuple[str, ...] = ()

    @functools.cached_property
    def settings(self):
        """The parameters of all settings in the order of the search; random ones for tpe.

        Of random settings, no two are equal, and a larger number of trials begins with the same.
        """
        return grid(self.space) if self.sampler == "grid" else self._random_settings()

    def _random_settings(self):
        import optuna

        found = {}
        with quiet_optuna():
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.seeds[0]))
            for _ in range(100 * self.trials):  # a small space may have fewer settings
                trial = study.ask()
                for name, values in self.space.items():
                    values.suggest(trial, name)
                found.setdefault(tuple(trial.params.values()), trial.params)
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

    def config(self, setting):
        """Returns the `Config` of a setting, a dict from options, joined by +, to string."""
        pairs = ((name, value) for names, value in setting.items() for name in names.split("+"))
        return parse(Config, [*self.flags, *(f"--{name}={value}" for name, value in pairs)])[0]

    def run_config(self, setting, seed, folder, eval_split):
        """Returns the `Config` of a run of a setting; an `eval_split` of None is the test split."""
        directory = str(setting_folder(folder, setting) / f"seed-{seed}")
        own = {"seed": seed, "eval_split": eval_split, "output_dir": directory}
        return dataclasses.replace(self.config(setting), **own, export=False, overwrite=False)


@contextlib.contextmanager
def quiet_optuna():
    """Hides Optuna's own messages and its warnings that heartbeats are experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
