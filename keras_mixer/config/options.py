"""Options: dataclass fields that are also command-line flags, so that each is defined once.

A command's flags are the fields of a dataclass, declared by `option`. `check` compares values with
their types and bounds; command_line.py defines absl flags from the fields.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import typing

from absl import flags

from keras_mixer.errors import InputError


def option(
    default,
    help,
    *,
    choices=None,
    low=None,
    high=None,
    above=None,
    below=None,
    heading=None,
    noun=None,
    plain_name=False,
    aliases=(),
    title=None,
    basic=False,
    result=True,
    flag=True,
):
    """Declares a dataclass field that is also a command-line flag of the same name.

    Args:
        default: The default value; where it is None, `help` describes the default.
        help: Help text, without the choices and a default that is not None.
        choices: The values allowed, if there are only a few. On the command line, case is ignored.
        low, high: Smallest and largest value allowed.
        above, below: Exclusive bounds.
        heading: Heading of the group in `--help` whose first field this is.
        noun: Name in messages for a pair of numbers that is not height,width.
        plain_name: bool. The value is one part of a path, without slashes.
        aliases: Other names of the flag.
        title: The alias that messages and `--help` use; by default they use the field's name.
        basic: bool. Whether `--help` lists the flag first, among those to start with.
        result: bool. Whether another value may change the result of a run.
        flag: bool. Whether the field is a flag at all.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    metadata = {
        "help": help,
        "choices": choices,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "heading": heading,
        "noun": noun,
        "plain_name": plain_name,
        "aliases": aliases,
        "title": title,
        "basic": basic,
        "result": result,
        "flag": flag,
    }
    return dataclasses.field(default=default, metadata=metadata)


# Bounds that several options share.
PIXELS = {"low": 1, "high": 65536}
COUNT = {"low": 1, "high": 1048576}
STEPS = {"low": 1, "high": 10**9}
RATE = {"low": 0.0, "below": 1.0}
FRACTION = {"low": 0.0, "high": 1.0}
SEED = {"low": 0, "high": 2**31 - 1}


def flags_of(options_class):
    """Returns the fields of an options dataclass that are flags."""
    return [field for field in dataclasses.fields(options_class) if field.metadata["flag"]]


# === From Python ===


def resolve_aliases(options_class, values):
    """Returns a dict of values with the names of fields in place of aliases.

    Raises:
        InputError: If a name is unknown, or an option is given twice.
    """
    fields = dataclasses.fields(options_class)
    field_of = {name: f.name for f in fields for name in (f.name, *f.metadata["aliases"])}
    for name in values:
        if name not in field_of:
            near = hint_at_own_name(name, field_of) or nearest(name, field_of)
            raise InputError(f"{options_class.__name__} has no option {name}{near}")
    if len({field_of[name] for name in values}) < len(values):
        raise InputError(f"an option is given twice: {', '.join(values)}")
    return {field_of[name]: value for name, value in values.items()}


def accept_aliases(options_class):
    """Class decorator: the constructor also takes aliases, and refuses unknown names."""
    construct = options_class.__init__

    @functools.wraps(construct)
    def __init__(self, **values):
        construct(self, **resolve_aliases(options_class, values))

    options_class.__init__ = __init__
    return options_class


def convert(options):
    """Converts values of Python programs: 64 to (64, 64), lists, paths, NumPy scalars."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        object.__setattr__(options, field.name, _converted(field, value))


def _converted(field, value):
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list):
        return tuple(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    parser = kind_of(field).parser
    if isinstance(parser, _ShapeParser) and parser.square and _is_integer(value):
        return value, value
    if isinstance(parser, _ChoiceParser | _TextParser) and isinstance(value, str):
        return parser.parse(value)
    return value


# Options by their names in timm, Keras and PyTorch.
OTHER_NAMES = {
    **dict.fromkeys(("img_size", "input_size", "input_shape", "resolution"), "image_shape"),
    **dict.fromkeys(("patch_size", "patches"), "patch_shape"),
    **dict.fromkeys(("num_layers", "num_blocks", "layers"), "depth"),
    **dict.fromkeys(("embed_dim", "hidden_dim", "hidden_size"), "dim"),
    **dict.fromkeys(("drop", "drop_rate", "dropout_rate"), "dropout"),
    **dict.fromkeys(("drop_path", "drop_path_rate"), "stochastic_depth"),
    **dict.fromkeys(("pretrained", "finetune", "weights", "initial_checkpoint"), "checkpoint"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("sched", "lr_scheduler", "schedule"), "scheduler"),
    **dict.fromkeys(("bs", "batch"), "batch_size"),
    **dict.fromkeys(("wd", "weight_decay"), "decay"),
    **dict.fromkeys(("clip_grad", "clipnorm", "global_clipnorm", "max_norm"), "clip_norm"),
    **dict.fromkeys(("model_ema", "model_ema_decay", "use_ema", "ema_momentum"), "ema"),
    **dict.fromkeys(("amp", "amp_dtype", "dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("grad_accum_steps", "gradient_accumulation_steps"), "accumulation"),
    **dict.fromkeys(("grad_checkpointing", "gradient_checkpointing"), "remat"),
    **dict.fromkeys(("jit_compile", "torchcompile"), "jit"),
    **dict.fromkeys(("hflip", "horizontal_flip"), "flip"),
    **dict.fromkeys(("scale", "random_resized_crop"), "inception_crop"),
    **dict.fromkeys(("aa", "auto_augment", "rand_augment"), "randaugment"),
    **dict.fromkeys(("reprob", "re_prob", "random_erase"), "random_erasing"),
    **dict.fromkeys(("mixup_alpha",), "mixup"),
    **dict.fromkeys(("cutmix_alpha",), "cutmix"),
    **dict.fromkeys(("smoothing", "label_smooth"), "label_smoothing"),
    **dict.fromkeys(("patience",), "early_stopping"),
    **dict.fromkeys(("crop_pct", "crop_ratio"), "eval_crop"),
    **dict.fromkeys(("val_split",), "validation_split"),
    **dict.fromkeys(("gpu", "gpus", "device"), "devices"),
    **dict.fromkeys(("output", "experiment", "save_dir", "logdir"), "output_dir"),
    **dict.fromkeys(("data", "data_path", "root"), "data_dir"),
}
NOT_NEEDED = ("workers", "num_workers")


def hint_at_own_name(name, names):
    """Returns `; it is called NAME here` for a name of `OTHER_NAMES`, or an empty string."""
    if name in NOT_NEEDED:
        return "; leave it out: images are read by all cores"
    own = OTHER_NAMES.get(name)
    return f"; it is called {own} here" if own in names else ""


# === Checking ===

_BOUNDS = {
    "low": (lambda value, bound: value >= bound, "at least"),
    "high": (lambda value, bound: value <= bound, "at most"),
    "above": (lambda value, bound: value > bound, "above"),
    "below": (lambda value, bound: value < bound, "below"),
}


def check(options):
    """Raises an `InputError` if a field of an options dataclass has a value that is not allowed."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is not None:
            _check_value(field, value)
        elif type(None) not in typing.get_args(field.type):
            raise complaint(field, kind_of(field).noun, "None")


def _check_value(field, value):
    kind = kind_of(field)
    if not kind.holds(value):
        raise complaint(field, kind.noun, repr(value) if isinstance(value, str) else value)
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise complaint(field, f"one of {', '.join(choices)}", item, nearest(item, choices))
        if item == "":
            raise complaint(field, "a value", "nothing")
        if isinstance(item, str) and "\0" in item:
            raise complaint(field, "a value without NUL characters", repr(item))
        if field.metadata["plain_name"] and ("/" in item or item.startswith(".")):
            raise complaint(field, "a plain folder name", item)
        if isinstance(item, float) and not math.isfinite(item):
            raise complaint(field, "a finite number", value)
        if not all(_BOUNDS[name][0](item, bound) for name, bound in bounds.items()):
            wanted = " and ".join(f"{_BOUNDS[name][1]} {bound}" for name, bound in bounds.items())
            raise complaint(field, f"{kind.noun} {wanted}", value)


def complaint(field, expected, received, hint=""):
    """Returns an `InputError` about the value of a field."""
    name = field.metadata["title"] or field.name
    return InputError(f"--{name}: expected {expected}, received {format_value(received)}{hint}")


def nearest(value, names):
    """Returns `; did you mean NAME?` for the most similar name, or an empty string."""
    near = difflib.get_close_matches(str(value).lower(), [name.lower() for name in names], n=1)
    found = next((name for name in names if [name.lower()] == near), None)
    return f"; did you mean {found}?" if found else ""


def options_of(options, group):
    """Returns the fields that an options dataclass inherits from its base `group`, as a dict."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(group)}


@contextlib.contextmanager
def named_as_flags(options_class):
    """Turns names of arguments in the messages of InputErrors into flags: `lr=` into `--lr=`."""
    try:
        yield
    except InputError as error:
        names = "|".join(field.name for field in dataclasses.fields(options_class))
        text = re.sub(rf"(?<![-\w])({names})(?=[=:])", r"--\1", str(error))
        raise InputError(text) from error


def as_flags(options):
    """Returns a list of `--name=value` for every option that is not at its default."""
    return [
        f"--{field.name}={format_value(getattr(options, field.name))}"
        for field in flags_of(options)
        if getattr(options, field.name) != field.default
    ]


def format_value(value):
    """Returns a value as text for the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# === Kinds of values ===


class _ShapeParser(flags.ArgumentParser):
    """Parses `height,width`; also `(height, width)`, and one number for a square, if allowed."""

    def __init__(self, square=True):
        self.square = square

    def parse(self, argument):
        if isinstance(argument, tuple):
            return argument
        text = re.sub(r"[()\[\]]", " ", str(argument)).strip().rstrip(", ")
        numbers = tuple(int(part) for part in re.split(r"\s*[,x]\s*|\s+", text))
        if len(numbers) > 2 or (len(numbers) == 1 and not self.square):
            raise ValueError("expected height,width")
        return numbers if len(numbers) == 2 else numbers * 2


class _TextParser(flags.ArgumentParser):
    """Parses text; `~` at the start is the home folder, as text that is no path has none."""

    def parse(self, argument):
        return os.path.expanduser(argument)


class _ChoiceParser(flags.ArgumentParser):
    """Parses one of a few names, ignoring case."""

    def __init__(self, choices):
        self.names = {choice.lower(): choice for choice in choices}

    def parse(self, argument):
        return self.names.get(str(argument).lower(), argument)


class _ListParser(flags.ArgumentParser):
    """Parses values of one kind, separated by commas."""

    def __init__(self, item):
        self.item = item

    def parse(self, argument):
        if isinstance(argument, tuple):
            return argument
        return tuple(self.item.parse(part.strip()) for part in str(argument).split(","))


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return _is_integer(value) or isinstance(value, float)


def _is_shape(value):
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_integer, value))


class _Kind(typing.NamedTuple):
    noun: str
    parser: flags.ArgumentParser
    holds: typing.Callable


_KINDS = {
    int: _Kind("an integer", flags.IntegerParser(), _is_integer),
    float: _Kind("a number", flags.FloatParser(), _is_number),
    bool: _Kind("true or false", flags.BooleanParser(), lambda value: isinstance(value, bool)),
    str: _Kind("text", _TextParser(), lambda value: isinstance(value, str)),
    tuple: _Kind("height,width as positive integers", _ShapeParser(), _is_shape),
}


def kind_of(field):
    """Returns the `_Kind` of a field from its type, such as `int | None` or `tuple[str, ...]`."""
    types = [t for t in typing.get_args(field.type) if t is not type(None)] or [field.type]
    plain = field.type if typing.get_origin(field.type) is tuple else types[0]
    if typing.get_args(plain)[1:] == (...,):
        return _list_of(_KINDS[typing.get_args(plain)[0]])
    kind = _KINDS[typing.get_origin(plain) or plain]
    if noun := field.metadata["noun"]:  # a pair of numbers, but not a shape
        return kind._replace(noun=noun, parser=_ShapeParser(square=False))
    choices = field.metadata["choices"]
    return kind._replace(parser=_ChoiceParser(choices)) if choices else kind


def _list_of(kind):
    def holds(values):
        return isinstance(values, tuple) and bool(values) and all(map(kind.holds, values))

    noun = f"{kind.noun.split()[-1]} values, separated by commas"
    return _Kind(f"one or more {noun}", _ListParser(kind.parser), holds)
