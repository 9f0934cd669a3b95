"""MLP-Mixer in Keras 3: from one command to a served model, in runs that cannot be lost.

The public names are loaded when they are first used (PEP 562): importing the package is instant,
and does not import TensorFlow.
"""

__version__ = "0.1.0"

_HOMES = {
    "Config": "keras_mixer.config",
    "InputError": "keras_mixer.errors",
    "RunError": "keras_mixer.errors",
    "build_mixer": "keras_mixer.model.mixer",
    "fit": "keras_mixer.training.fit",
    "load_mixer": "keras_mixer.weights.load",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
