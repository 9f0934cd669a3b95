"""Presets: the flagfiles in flags/, by name. An installed package includes them."""

import itertools
from pathlib import Path

from keras_mixer.config.options import nearest
from keras_mixer.errors import InputError
from keras_mixer.log import logger
from keras_mixer.model.architecture import MIXER_FIELDS
from keras_mixer.model.variants import MIXER

OF_MIXER_TRAINING = ("variant", "stochastic_depth", "layer_decay", "resize_tokens", "remat")
_PACKAGE = Path(__file__).parents[1]


def preset_folder():
    """Returns the `Path` of the presets: in the installed package, or next to it in a clone."""
    inside = _PACKAGE / "flags"
    return inside if inside.is_dir() else _PACKAGE.parent / "flags"


def preset_names():
    """Returns the sorted names of all presets."""
    return sorted(path.stem for path in preset_folder().glob("*.flags"))


def preset_path(name):
    """Returns the `Path` of a preset's flagfile.

    Raises:
        InputError: If there is no such preset; lists them.
    """
    names = preset_names()
    if name not in names:
        hint = nearest(name, names)
        raise InputError(f"--preset={name}: expected one of {', '.join(names)}{hint}")
    return preset_folder() / f"{name}.flags"


def preset_of(path):
    """Returns the name of the preset whose flagfile a path is; None if it is none."""
    path = Path(path)
    is_preset = path.suffix == ".flags" and path.resolve().parent == preset_folder().resolve()
    return path.stem if is_preset else None


def left_out_of_presets(arguments):
    """Returns the names of flags that a preset has for mixer layers, if the model is a baseline.

    Args:
        arguments: The other arguments, which may say --model.
    """
    if _value(arguments, "model", MIXER).lower() == MIXER:
        return set()
    return {*MIXER_FIELDS, *OF_MIXER_TRAINING}


def shortened_warmup(preset, arguments):
    """Returns {"warmup_step"} if a preset's warm-up is not below the epochs that are given.

    Its default, at most a third of them, is then taken.

    Args:
        preset: The flags of the preset.
        arguments: The other arguments, which may say --epochs and --warmup_epochs.
    """
    epochs, warmup = (
        _value(arguments, long, _value(arguments, short, ""))
        for long, short in (("epochs", "num_steps"), ("warmup_epochs", "warmup_step"))
    )
    usual = _value(preset, "warmup_step", "0")
    if warmup or not epochs.isdecimal() or int(usual) < int(epochs):
        return set()
    logger.info(f"the preset's warm-up of {usual} is shortened to a third of {epochs} or less")
    return {"warmup_step"}


def _value(arguments, name, default):
    """Returns the last value of a flag in arguments, or the default."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    values = [value for word, value in itertools.pairwise(words) if word == f"--{name}"]
    return values[-1] if values else default
