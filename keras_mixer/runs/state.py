"""The state of training as arrays, for checkpoints: everything that a training step changes.

These are the weights, seed generators, optimizer variables (EMA included) and metrics. With the
order of the data, which is a function of the step, they determine the rest of training.
"""

import math
import re

import numpy as np

from keras_mixer.errors import RunError, join_names


def gather_state(model, meters):
    """Returns a model's state as a dict from name to array.

    Args:
        model: compiled `keras.Model`, its optimizer built.
        meters: list of the metrics' variables.
    """
    return {name: np.array(v.value) for name, v in _variables(model, meters).items()}


def state_size(model, meters):
    """Returns the size of `gather_state`'s arrays, in bytes."""
    variables = _variables(model, meters).values()
    return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)


def restore_state(model, meters, arrays):
    """Assigns the arrays of `gather_state` to a model's variables.

    Raises:
        RunError: If the names and shapes of the arrays are not exactly those of this model.
    """
    variables = _variables(model, meters)
    own = {(name, tuple(variable.shape)) for name, variable in variables.items()}
    if differing := sorted(own ^ {(name, array.shape) for name, array in arrays.items()}):
        names = dict.fromkeys(f"{name} {shape}" for name, shape in differing)
        raise RunError(f"the checkpoint is of another model; differing: {join_names(list(names))}")
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _variables(model, meters):
    """Returns a dict from name to variable; a name is a group, an index and a path without numbers.

    Keras numbers unnamed objects (`seed_generator_3`) by what was built before in the process.
    """
    groups = {"model": model.variables, "optimizer": model.optimizer.variables, "meters": meters}
    return {
        f"{group}/{index:04d}/{re.sub(r'_[0-9]+', '', variable.path)}": variable
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }
