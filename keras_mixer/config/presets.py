"""Presets: the flagfiles in flags/, by name. They are part of an installed package, too."""

from pathlib import Path

from absl import flags

from keras_mixer.config.options import nearest
from keras_mixer.errors import InputError
from keras_mixer.model.architecture import OF_MIXER_LAYERS
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


def preset_arguments(name, others):
    """Returns the flags of a preset; for a baseline, without those of mixer layers.

    Args:
        name: Name of the preset.
        others: The other arguments, which may say --model and --permutation.

    Raises:
        InputError: If there is no such preset; lists them.
    """
    flagfile = f"--flagfile={preset_path(name)}"
    if _value(others, "model", MIXER).lower() == MIXER:
        return [flagfile]
    left_out = {*OF_MIXER_LAYERS, *OF_MIXER_TRAINING}
    if _value(others, "permutation", "none") == "patches+pixels":
        left_out.remove("patch_shape")  # the patches to permute
    given = flags.FlagValues().read_flags_from_files([flagfile])
    return [flag for flag in given if flag.lstrip("-").partition("=")[0] not in left_out]


def _value(arguments, name, default):
    """Returns the last value of a flag in arguments, or the default."""
    spelled = [word for pair in arguments for word in pair.split("=", 1)]
    places = [index for index, word in enumerate(spelled[:-1]) if word == f"--{name}"]
    return spelled[places[-1] + 1] if places else default
