"""Helpers of several commands: checks of arguments, standard input, writing of outputs."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path

from keras_mixer.config.command_line import parse
from keras_mixer.config.options import as_flags
from keras_mixer.config.presets import preset_folder
from keras_mixer.config.training import Config
from keras_mixer.data.image_checks import starts_like_image
from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import is_special, write_through
from keras_mixer.reports.report import read_experiments
from keras_mixer.runs.run import CONFIG, describe_scores, read_metrics
from keras_mixer.studies.space import resolve_alias


def only(arguments, what):
    """Returns the only one of a command's arguments; raises an `InputError` if there is not one.

    Args:
        arguments: list of strings.
        what: Name of the argument in `--help`.
    """
    if len(arguments) != 1:
        raise InputError(f"expected exactly one {what}, received {len(arguments)}")
    return arguments[0]


def hint_at_separator(error, name):
    """Returns an error of a command's flags that says which of them are train's, and go after --.

    Args:
        error: `InputError` of `parse`.
        name: Name of the command.
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
    """Raises an `InputError` for options after -- that the command sets itself.

    Args:
        arguments: list of strings: flags of train.
        taken: dict from the name of an option to why it is not free.
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


# === Runs by their presets ===


def presets_in(folder=None):
    """Returns a dict from the flag that names a preset to the set of its flags.

    Args:
        folder: Folder of flagfiles; None for that of `--preset`.
    """
    presets, paths = {}, sorted(Path(folder or preset_folder()).glob("*.flags"))
    if folder and not paths:
        raise InputError(f"--presets={folder}: expected a folder of .flags files")
    for path in paths:
        name = f"--flagfile={path.as_posix()}" if folder else f"--preset={path.stem}"
        try:
            presets[name] = set(as_flags(parse(Config, [f"--flagfile={path}"])[0]))
        except InputError as error:
            raise InputError(f"{path}: {error}; fix it, or give another --presets") from error
    return presets


def provenance_of(source):
    """Returns how a run was trained, and its scores, as text; empty for what is no finished run."""
    with path_errors(source):
        if not (Path(source) / CONFIG).exists() or not read_metrics(source)[0]:
            return ""
    (((name, _), (run,)),) = read_experiments([source], presets_in()).items()
    scores = describe_scores(run["scores"])
    return f"trained by {name} on {run['data']} images (training, validation, test); {scores}"


# === Standard input ===

MOST_INPUT = 256 * 10**6  # bytes; all are kept in memory
MOST_NAME = 4096  # characters of a path


def with_standard_input(arguments):
    """Returns arguments in which what standard input holds replaces `-`.

    Args:
        arguments: list of strings.

    Returns:
        list of strings, and an `io.BytesIO` if standard input is an image. Else it is a list of
        names, separated by NUL if there is any, or else by newlines.

    Raises:
        InputError: If it is neither, empty, too long, or to be read twice.
    """
    if arguments.count("-") > 1:
        raise InputError("-: expected once, since standard input is read only once")
    parts = [_standard_input() if argument == "-" else [argument] for argument in arguments]
    return list(itertools.chain.from_iterable(parts))


def _standard_input():
    content = _read_all()
    if starts_like_image(content):
        return [io.BytesIO(content)]
    separator = rb"\0" if b"\0" in content else rb"\r?\n"
    names = [os.fsdecode(name) for name in re.split(separator, content) if name.strip()]
    # Two NULs in a row are in most files, but in no list.
    if not names or b"\0\0" in content or max(map(len, names)) > MOST_NAME:
        raise InputError(
            f"-: expected on standard input a JPEG, PNG, BMP, WebP or GIF image, or names of "
            f"images, one per line; received {'something else' if names else 'nothing'}"
        )
    return names


def _read_all():
    if sys.stdin is None:
        raise InputError("-: standard input is closed; pipe an image or names of images into it")
    content = sys.stdin.buffer.read(MOST_INPUT + 1)
    if len(content) > MOST_INPUT:
        raise InputError(
            f"-: expected at most {MOST_INPUT // 10**6} MB on standard input, received more; give "
            f"the names of files instead"
        )
    return content


# === --output ===


def standard_stream(path):
    """Returns `sys.stdout` or `sys.stderr` if an `--output` leads there, else None.

    It does if it is `-`, for standard output, or the same file by another name: `/dev/stdout`, or
    the file that the shell redirects to, which must not be replaced while it is written to.
    """
    if path == "-":
        if sys.stdout is None:
            raise InputError("--output=-: standard output is closed; give the path of a file")
        return sys.stdout
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError):  # no such path, or a stream that is closed
            if stream and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return stream
    return None


def check_writable(path, flag="output"):
    """Raises an `InputError` if an `--output` cannot be written, before the work for it is done.

    The path is not opened: a pipe would wait for its reader, or tell it that all is written.

    Args:
        path: string.
        flag: Name of the flag that gave it.
    """
    if standard_stream(path):
        return
    with path_errors(f"--{flag}={path}"):
        problem = _problem(path)
    if problem:
        raise InputError(f"--{flag}={path}: {problem}")


def check_outputs(options, *flags):
    """Checks the given ones of several flags as `check_writable`, and that no two are one file.

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


def _problem(path):
    """Returns why a path cannot be written, or None; raises an OSError if it cannot exist."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        return "it is a folder; name a file in it"
    if is_special(path):
        return None if os.access(path, os.W_OK) else "no permission to write to it"
    if not os.path.isdir(folder):
        return f"its folder does not exist; create {folder}, or give another path"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"no permission to write in the folder {folder}; give another path"
    return None


def write(path, content):
    """Writes an `--output`, after `check_writable`; files are replaced atomically.

    Args:
        path: string: a path; `-` is standard output.
        content: string or bytes.

    Raises:
        InputError: If it cannot be written, see `check_writable`.
        OSError: If writing fails, as when the disk is full.
    """
    check_writable(path)
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    if stream := standard_stream(path):
        _write_to_stream(stream, content)
    else:
        write_through(path, content)


def _write_to_stream(stream, content):
    """Writes bytes behind what was printed to a standard stream before."""
    rest = memoryview(content)
    try:
        stream.flush()
        while rest:  # with PYTHONUNBUFFERED, only a part may be written at a time
            rest = rest[stream.buffer.write(rest) :]
        stream.buffer.flush()
    except OSError:
        # Python writes again at its end what could not be written, and would fail again.
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        raise


def publish_scores(scores, options, as_table):
    """Prints scores in the --format asked for, and writes them as JSON to --output, if any.

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
        last: Words at the end of the command line: `--` and flags for another command.
    """
    if options.output:
        line = command_line(command, options, arguments, last)
        write(options.output, f"{table}\nGenerated by `{line}`.\n")
    else:
        print(table, end="")


def command_line(command, options, arguments, last=()):
    """Returns the command line that was given, with quotes where a shell needs them."""
    return shlex.join(["keras-mixer", command, *arguments, *as_flags(options), *last])
