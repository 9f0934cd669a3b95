"""Presets: the flagfiles in flags/, by name. They are part of an installed package, too."""

import difflib
from pathlib import Path

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
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"--preset={name}: expected one of {', '.join(names)}{hint}")
    return preset_folder() / f"{name}.flags"
