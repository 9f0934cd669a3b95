"""Private attributes of Keras and TensorFlow that this package relies on.

Any release may rename them. They are read by `private` alone, so that a missing one is an error
that names the version it was last checked with.
"""

import importlib.metadata

from keras_mixer.errors import RunError

_KERAS, _TENSORFLOW = ("keras", "3.15.1"), ("tensorflow", "2.21.0")

# By name: the package and the version it was checked with, and what needs it.
PRIVATE_APIS = {
    "_compute_loss": (*_KERAS, "--accumulation"),  # of keras.Model
    "_loss_tracker": (*_KERAS, "--accumulation"),
    "_update_metrics_variables": (*_KERAS, "--accumulation"),  # on JAX
    "compute_loss_and_updates": (*_KERAS, "--accumulation"),  # on JAX, undocumented
    "_flatten_layers": (*_KERAS, "--remat"),  # of keras.Layer
    "_apply_weight_decay": (*_KERAS, "--layer_decay"),  # of keras.optimizers.Optimizer
    "_use_weight_decay": (*_KERAS, "--layer_decay"),
    "_get_variable_index": (*_KERAS, "--layer_decay"),
    "_model_variables_moving_average": (*_KERAS, "--ema"),
    "_registry": (*_TENSORFLOW, "training"),  # of tensorflow.python.framework.ops
}


def private(owner, name):
    """Returns a private attribute, a key of `PRIVATE_APIS`, of an object or class.

    Raises:
        RunError: If the installed version does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        package, checked, needed_by = PRIVATE_APIS[name]
        kind = owner if isinstance(owner, type) else type(owner)
        raise RunError(
            f"{package} {importlib.metadata.version(package)} has no {kind.__name__}.{name}, which "
            f"{needed_by} needs; it was checked with {package} {checked}: "
            f"pip install {package}=={checked}"
        ) from error
