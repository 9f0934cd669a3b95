"""Everything that a step of training changes, as arrays: what a checkpoint holds.

Weights, states of the seed generators, optimizer variables (the moving average among them) and the
running metrics of the epoch. With the order of the data, which is a function of the step, they
determine all that follows.
"""

import re

import numpy as np

from keras_mixer.errors import RunError


def gather_state(model, meters):
    """Copies the state out of a model.

    Args:
        model: compiled `keras.Model`, its optimizer built.
        meters: list of the variables of the running metrics.

    Returns:
        dict from name to array.
    """
    return {name: np.array(v.value) for name, v in _variables(model, meters).items()}


def restore_state(model, meters, arrays):
    """Copies a gathered state back, every variable of it.

    Raises:
        RunError: If the arrays are not exactly those of this model.
    """
    variables = _variables(model, meters)
    if differing := sorted(set(variables) ^ set(arrays)):
        raise RunError(f"the checkpoint is of another model; differing: {', '.join(differing[:8])}")
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _variables(model, meters):
    """Names every variable by its place and its path.

    Keras numbers what has no name of its own (`seed_generator_3`) by how much was built before in
    the process, so numbers are left out of the path; the place tells them apart.
    """
    groups = {"model": model.variables, "optimizer": model.optimizer.variables, "meters": meters}
    return {
        f"{group}/{index:04d}/{re.sub(r'_[0-9]+', '', variable.path)}": variable
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }
