"""Helpers of several commands: checks of arguments, standard input, --output."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import sys

from keras_mixer.config.options import as_flags
from keras_mixer.config.training import Config
from keras_mixer.data.image_checks import starts_like_image
from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import write_output
from keras_mixer.studies.space import resolve_alias


def single_argument(arguments, what):
    """Returns the only argument of a command, called `what` in messages.

    Raises:
        InputError: If there is none, or more than one.
    """
    if len(arguments) != 1:
        raise InputError(f"expected exactly one {what}, received {len(arguments)}")
    return arguments[0]


def hint_at_separator(error, name):
    """Returns an error about an unknown flag; for a flag of train, one that says where it goes.

    Args:
        error: `InputError`.
        name: Name of a command that takes flags of train after `--`.
    """
    unknown = re.match(r"unknown command line flag '(\w+)'", str(error))
    if unknown and (unknown[1] == "preset" or resolve_alias(unknown[1]) in _TRAIN):
        return InputError(
            f"--{unknown[1]} is a flag of train: put it after --, as in "
            f"keras-mixer {name} ... -- --{unknown[1]}=..."
        )
    return error


_TRAIN = {field.name for field in dataclasses.fields(Config)}


def refuse_options(arguments, taken):
    """Raises an `InputError` for options after `--` that the command sets itself.

    Args:
        arguments: list of strings: flags of train.
        taken: dict from the name of an option to the reason for the message.
    """
    given = {resolve_alias(re.split("[= ]", word.lstrip("-"))[0]) for word in arguments}
    for name in sorted(given & taken.keys()):
        raise InputError(
            f"--{name} after --: {taken[name]}; leave it out there{_INSTEAD.get(name, '')}"
        )


_INSTEAD = {
    "checkpoint": ", and give --checkpoint before --",
    "output_dir": ", and give --output_dir before --",
    "seed": ", and give --seeds before --",
}


# === Standard input ===


def read_standard_input():
    """Reads an image, or names of images, from standard input.

    Returns:
        list of an `io.BytesIO`, the image, or of names, separated by NUL or else by newlines.

    Raises:
        InputError: If there is nothing to read.
    """
    content = sys.stdin.buffer.read() if sys.stdin else b""
    if starts_like_image(content):
        return [io.BytesIO(content)]
    separator = rb"\0" if b"\0" in content else rb"\r?\n"
    names = [os.fsdecode(name) for name in re.split(separator, content) if name.strip()]
    if not names:
        raise InputError(
            "-: expected an image, or names of images, one per line, on standard input; received "
            "nothing"
        )
    return names


# === --output ===


def check_writable(path, flag="output"):
    """Raises an `InputError` if an `--output` cannot be written, before the work for it is done.

    Args:
        path: string; `-` is standard output.
        flag: Name of the flag that gave it.
    """
    if path in STANDARD_OUTPUT:
        return
    with path_errors(f"--{flag}={path}"):
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        folder = os.path.dirname(os.path.realpath(path))
        if os.path.isdir(path):
            raise InputError(f"--{flag}={path}: it is a folder; name a file in it")
        if not os.path.isdir(folder):
            raise InputError(
                f"--{flag}={path}: its folder does not exist; create {folder}, or give another path"
            )
        if not os.access(
            path if os.path.exists(path) and not os.path.isfile(path) else folder, os.W_OK
        ):
            raise InputError(f"--{flag}={path}: no permission to write to it; give another path")


def check_outputs(options, *flags):
    """Checks several flags as `check_writable`, and that they name different files.

    Args:
        options: Options with these flags.
        *flags: Names of flags, each the path of a file or None.
    """
    taken = {}
    for flag in flags:
        if path := getattr(options, flag):
            check_writable(path, flag)
            if other := taken.get(path):
                raise InputError(f"--{flag}={path} is the file of --{other}; give another one")
            taken[path] = flag


STANDARD_OUTPUT = ("-", "/dev/stdout")  # where output is redirected, the file is not replaced


def write(path, content):
    """Writes an `--output`; files are replaced atomically.

    Args:
        path: string; `-` is standard output.
        content: string or bytes.

    Raises:
        OSError: If writing fails, e.g. when the disk is full.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    if path in STANDARD_OUTPUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write_output(path, content)


def publish_scores(scores, options, as_table):
    """Prints scores in the format of --format, and writes them as JSON to --output, if given.

    Args:
        scores: dict of JSON values.
        options: Options with `format` and `output`.
        as_table: Function from scores to text.
    """
    text = json.dumps(scores, indent=2)
    if options.output:
        write(options.output, text + "\n")
    if options.output != "-":
        print(text if options.format == "json" else as_table(scores))


def publish_table(command, options, arguments, table, last=()):
    """Prints a table, or writes it to --output together with the command that made it.

    Args:
        command: Name of the command.
        options: Options with `output`.
        arguments: Positional arguments of the command.
        table: string, Markdown.
        last: Words at the end of the command line: `--` and flags of train.
    """
    if options.output:
        line = command_line(command, options, arguments, last)
        write(options.output, f"{table}\nGenerated by `{line}`.\n")
    else:
        print(table, end="")


def command_line(command, options, arguments, last=()):
    """Returns the command line that was given, with quotes where a shell needs them."""
    return shlex.join(["keras-mixer", command, *arguments, *as_flags(options), *last])
