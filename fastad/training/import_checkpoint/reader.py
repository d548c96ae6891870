"""Read the authors' pickled checkpoints with torch's restricted unpickler.

The files hold tensors, numbers and configuration dictionaries of the ``easydict`` package. Only
those are let through; anything else in the file stops the read before it can run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from fastad.errors import InputError


class _EasyDict:
    """Stands in for easydict.EasyDict while unpickling: gives a plain ordered dictionary."""

    def __new__(cls, *args: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]  # another class
        return OrderedDict(*args)


def _allowed() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64)]
    return [
        (_EasyDict, "easydict.EasyDict"),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
    ]


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of an authors' checkpoint by their original key, without the ``module.`` prefix.

    Args:
        path: A file written by ``torch.save``: the state itself or a dictionary that holds it
            under ``state_dict``.

    Raises:
        InputError: no such file, not a checkpoint, or one that would need to run foreign code.
    """
    loaded = read_pickled(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    foreign = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if foreign:
        raise InputError(f"{path}: expected only tensors in the state, {foreign[:3]} are not")
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors, numbers and settings.

    Raises:
        InputError: no such file, not a checkpoint, or one that would need to run foreign code.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a checkpoint file, found nothing there")
    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise without a common base class
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise InputError(
            f"{path}: not readable as a checkpoint of tensors and settings "
            f"({type(error).__name__}: {reason}); nothing in it was executed"
        ) from error


def shape_of(state: Mapping[str, Tensor], key: str, letters: str, label: str) -> Size:
    """Shape of a tensor that settings follow from.

    Raises:
        InputError: it is missing, empty, or has another number of axes than ``letters``.
    """
    if key not in state:
        raise InputError(f"{label}: key {key} is missing; is this another method?")
    shape = state[key].shape
    if len(shape) != len(letters.split()) or 0 in shape:
        raise InputError(f"{label}: key {key}: expected [{letters}], got {list(shape)}")
    return shape
