"""Checks of the fields of an architecture, given by users or read from files."""

import dataclasses
import operator

from keras_mixer.errors import InputError
from keras_mixer.model.variants import ACTIVATIONS, MODELS

_LARGEST_SIZE = 1 << 20
_MOST_LAYERS = 1000


def validate(field, value):
    """Returns the value, converted to the type of a dataclass field.

    Raises:
        InputError: If it has another type, or is out of range.
    """
    check = _CHECKS.get(field.name) or _CHECKS[field.type]
    try:
        return check(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field.name}: expected {error}, received {value!r:.60}") from error


def _size(low=1, high=_LARGEST_SIZE):
    def check(value):
        if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return operator.index(value)

    return check


def _shape(value):
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError("two positive integers, height and width")
    return tuple(map(_size(), value))


def _boolean(value):
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(names):
    def check(value):
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return check


_CHECKS = {
    tuple[int, int]: _shape,
    int: _size(),
    bool: _boolean,
    "depth": _size(high=_MOST_LAYERS),
    "num_classes": _size(low=0),
    "activation": _one_of(ACTIVATIONS),
    "model": _one_of(MODELS[1:]),
}


def format_shape(shape):
    """Returns a shape as text, as in flags."""
    return ",".join(map(str, shape))


def read_fields(kind, values):
    """Returns the keyword arguments of a dataclass from a JSON dict of its fields.

    Raises:
        InputError: If a field is unknown, or one without a default is missing.
    """
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    if not isinstance(values, dict) or not values.keys() <= set(names):
        given = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"expected the fields {', '.join(names)}, received {given:.200}")
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise InputError(f"expected the fields {', '.join(names)}, missing: {', '.join(missing)}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
