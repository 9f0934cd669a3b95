"""MLP-Mixer for image classification, in Keras 3 on TensorFlow.

Public names are imported when they are first used (PEP 562), so importing the package does not
import TensorFlow.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Config": "keras_mixer.config.training",
    "InputError": "keras_mixer.errors",
    "RunError": "keras_mixer.errors",
    "build_mixer": "keras_mixer.model.mixer",
    "evaluate": "keras_mixer.inference.evaluate",
    "export": "keras_mixer.inference.export.formats",
    "fit": "keras_mixer.training.fit",
    "load_mixer": "keras_mixer.weights.load",
    "predict": "keras_mixer.inference.predict",
    "preprocess": "keras_mixer.inference.predict",
    "report": "keras_mixer.reports.report",
    "run_job": "keras_mixer.jobs",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
