"""The command line: absl flags from the fields of an options dataclass, and the text of `--help`.

Every command has its own absl `FlagValues`, so it accepts only its own flags.
"""

import dataclasses
import itertools
import os
import re
import textwrap

from absl import flags

from keras_mixer.config.options import (
    check,
    complaint,
    flags_of,
    format_value,
    hint_at_own_name,
    kind_of,
    option,
)
from keras_mixer.config.presets import (
    left_out_of_presets,
    preset_names,
    preset_of,
    preset_path,
    shortened_warmup,
)
from keras_mixer.errors import InputError
from keras_mixer.log import VERBOSITIES, show_messages


@dataclasses.dataclass(frozen=True)
class CommonOptions:
    """Flags of all commands, besides --flagfile, which absl defines."""

    verbosity: str = option(
        "info",
        "Least severe messages to print. Results are always printed; debug also prints "
        "TensorFlow's messages.",
        choices=tuple(VERBOSITIES),
    )


def parse(options_class, arguments, positional=None):
    """Parses a command's arguments.

    Args:
        options_class: A dataclass whose fields are made by `option`.
        arguments: list of strings, without the command's name.
        positional: string. Name of the positional arguments, such as `"RUN"`; None if the command
            takes none.

    Returns:
        (options, given, rest): an instance of the class, checked; a dict from the names of the
        fields given to their values; and the positional arguments.

    Raises:
        InputError: One line that names the flag, and the nearest name for an unknown one.
    """
    arguments, preset = _expand_presets(options_class, _with_underscores(arguments))
    if "--flagfile=" in arguments:  # absl would ignore it, as from an unset variable of the shell
        raise InputError("--flagfile: expected the path of a file, received nothing")
    values = _flag_values(options_class)
    values.set_gnu_getopt(True)  # flags may follow positional arguments
    try:
        rest = values(["command", *arguments])[1:]
    except UnicodeDecodeError as error:
        raise InputError(f"--flagfile: not a text file ({error})") from error
    except (flags.Error, ValueError) as error:  # the latter for --noflag=value
        raise InputError(_one_line(error, options_class)) from error
    if rest and positional is None:
        raise InputError(
            f"unexpected argument {rest[0]!r}: options are written --name=value, "
            f"and {_recipe(options_class, rest[0])}"
        )
    common = CommonOptions(**_given(CommonOptions, values)[0])
    check(common)
    if values["verbosity"].present:
        show_messages(VERBOSITIES[common.verbosity])
    given, spelled = _given(options_class, values)
    options = options_class(**given, **({"preset_name": preset} if preset else {}))
    check(options)
    if hasattr(options, "check_spelling"):
        options.check_spelling(spelled)
    return options, given, rest


def _recipe(options_class, argument):
    """Returns the flags that an argument without a name may have meant."""
    if os.path.isdir(argument) and hasattr(options_class, "preset_name"):
        return f"a folder of photos --preset=photos --data_dir={argument}"
    return f"presets --{f'flagfile={argument}' if argument.endswith('.flags') else 'preset=NAME'}"


def _with_underscores(arguments):
    """Returns the arguments with underscores in the names of flags: `--batch-size` is accepted."""

    def spelled(argument):
        name, equals, value = argument.partition("=")
        return f"--{name[2:].replace('-', '_')}{equals}{value}"

    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [spelled(a) if a.startswith("--") else a for a in arguments[:end]]
    return [*flags, *arguments[end:]]


def _expand_presets(options_class, arguments):
    """Replaces `--preset=NAME` by its flags.

    Explicit flags override them in any order, so presets come first.

    Returns:
        (arguments, name): name is that of the last preset or flagfile of a preset, or None.
    """
    if not hasattr(options_class, "preset_name"):
        return arguments, None
    name, presets, others, words = None, [], [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--preset":
            name = value if equals else next(words, "")
            presets.append(f"--flagfile={preset_path(name)}")
        else:
            name = preset_of(word.removeprefix("--flagfile=")) or name
            others.append(word)
    given = flags.FlagValues().read_flags_from_files(presets)
    if left_out := left_out_of_presets(others) | shortened_warmup(given, others):
        presets = [flag for flag in given if flag[2:].partition("=")[0] not in left_out]
    return [*presets, *others], name


def _given(options_class, values):
    """Returns two dicts by field name: the values given, and the flag or alias used for each."""
    spelled = {
        field.name: name
        for field in flags_of(options_class)
        for name in (field.name, *field.metadata["aliases"])
        if values[name].present
    }
    return {name: values[name].value for name in spelled}, spelled


def _flag_values(options_class):
    values = flags.FlagValues()
    for field in (*flags_of(options_class), *flags_of(CommonOptions)):
        kind = kind_of(field)
        if kind.noun == "true or false":
            flags.DEFINE_boolean(field.name, field.default, field.metadata["help"], values)
        else:
            serializer = flags.ArgumentSerializer()
            flags.DEFINE(kind.parser, field.name, field.default, "", values, serializer)
        for alias in field.metadata["aliases"]:
            flags.DEFINE_alias(alias, field.name, values)
    return values


def _one_line(error, options_class):
    """Returns absl's message as one line, with the wording of `complaint` for a wrong type."""
    illegal = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if illegal:
        name, value = illegal.groups()
        fields = flags_of(options_class)
        field = next(f for f in fields if name in (f.name, *f.metadata["aliases"]))
        return str(complaint(field, kind_of(field).noun, value or "nothing"))
    if "'resume'" in str(error):
        return "unknown flag --resume: the same command continues its run, without a flag"
    unknown = re.match(r"Unknown command line flag '(\w+)'", str(error))
    names = [field.name for field in flags_of(options_class)]
    if unknown and (hint := hint_at_own_name(unknown[1], names)):
        return f"unknown flag --{unknown[1]}{hint.replace('called ', 'called --')}"
    text = " ".join(str(error).split()).removeprefix("ERROR:: ")
    if "flags/" in text and "flagfile" in text.lower():
        text += "; --preset=NAME finds the presets from any folder"
    return text[0].lower() + text[1:]


# === Help ===


def describe(options_class, title, examples=()):
    """Returns the text of `--help`.

    Args:
        options_class: A dataclass whose fields are made by `option`.
        title: string. Usage and a description of the command.
        examples: Command lines.
    """
    fields = flags_of(options_class)
    basic = [field for field in fields if field.metadata["basic"]]
    lines = [title.strip()]
    if examples:
        lines += ["", "Examples:", *(f"  {example}" for example in examples)]
    if basic:
        lines += ["", "Flags to start with:", *_described_preset(options_class)]
        lines += itertools.chain(*map(_described, basic))
    if not fields[0].metadata["heading"]:
        lines += ["", "Flags:"]
    for field in fields:
        if heading := field.metadata["heading"]:
            lines += ["", f"{heading}:"]
        if field not in basic:
            lines += _described(field)
    lines += ["", "Flags of all commands:"]
    lines += ["  --flagfile", *_wrapped("Read flags from this file, one --name=value per line.")]
    lines += itertools.chain(*map(_described, flags_of(CommonOptions)))
    return "\n".join(lines)


def _described_preset(options_class):
    if not hasattr(options_class, "preset_name"):
        return []
    names = ", ".join(preset_names())
    help = f"Load a named recipe; explicit flags override it. One of {names}."
    return ["  --preset", *_wrapped(help)]


def _described(field):
    names = [field.name, *field.metadata["aliases"]]
    names.sort(key=lambda name: name != field.metadata["title"])  # the title first, if any
    names = ", ".join(f"--{name}" for name in names)
    return [f"  {names}", *_wrapped(_help_sentence(field))]


def _help_sentence(field):
    help, choices = field.metadata["help"], field.metadata["choices"]
    choices = f" One of {', '.join(choices)}." if choices else ""
    default = "" if field.default is None else f" (default: {format_value(field.default)})"
    return f"{help}{choices}{default}"


def _wrapped(text):
    return textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
