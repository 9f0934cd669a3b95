"""Presets: the flagfiles in flags/, by name. They are part of an installed package, too."""

from pathlib import Path

from keras_mixer.config.options import nearest
from keras_mixer.errors import InputError

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
