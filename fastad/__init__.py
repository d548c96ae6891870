"""fastad: from a folder of normal images to a fast, verified anomaly-detection engine.

Importing fastad is cheap: the names below are loaded on first use, and none of what runs an
engine on a CPU imports torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastad.errors import EngineError as EngineError
    from fastad.errors import FastadError as FastadError
    from fastad.errors import FastadWarning as FastadWarning
    from fastad.errors import InputError as InputError
    from fastad.errors import UnsupportedError as UnsupportedError
    from fastad.evaluation import evaluate as evaluate
    from fastad.prediction import Prediction as Prediction
    from fastad.predictor import Predictor as Predictor
    from fastad.predictor import load as load
    from fastad.training.fit import train as train

_HOMES = {
    "EngineError": "fastad.errors",
    "FastadError": "fastad.errors",
    "FastadWarning": "fastad.errors",
    "InputError": "fastad.errors",
    "Prediction": "fastad.prediction",
    "Predictor": "fastad.predictor",
    "UnsupportedError": "fastad.errors",
    "evaluate": "fastad.evaluation",
    "load": "fastad.predictor",
    "train": "fastad.training.fit",
}

__all__ = ["__version__", *sorted(_HOMES)]
__version__ = version("fastad")


def __getattr__(name: str) -> Any:
    if name == "export":  # a package of its own, which must not load before it is asked for
        return import_module("fastad.export")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastad' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
