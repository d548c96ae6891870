"""Grey levels of more than 8 bits, to uint8 by a declared range: none is ever guessed."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.errors import InputError

ValueRange = tuple[float, float]  # (low, high) in grey levels: black and white


def check_value_range(value_range: ValueRange | None) -> None:
    """Refuse anything but None or two finite grey levels, the lower one first."""
    if value_range is None:
        return
    try:
        low, high = (float(level) for level in value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (low < high and math.isfinite(high - low)):
        raise InputError(
            f"value_range: expected two finite grey levels (low, high), low < high, "
            f"got {value_range!r}"
        )


def to_uint8(levels: NDArray[Any], value_range: ValueRange | None, name: str) -> NDArray[np.uint8]:
    """Grey levels to uint8 of the same shape: low and below is 0, high and above 255.

    Linear, rounded half to even. ``name`` is what errors call the image.

    Raises:
        InputError: no range is declared, or a level is not finite.
    """
    if value_range is None:
        raise undeclared(levels, name)
    if levels.dtype.kind == "u":
        return np.take(_level_table(*value_range), levels)
    if not np.isfinite(levels).all():
        raise InputError(f"{name}: expected finite grey levels, got NaN or infinity")
    return _mapped(levels, *value_range)


def undeclared(levels: NDArray[Any], name: str) -> InputError:
    """The refusal of levels without a declared range."""
    return InputError(
        f"{name}: holds {levels.dtype} grey levels from {levels.min():g} to {levels.max():g}, and "
        "which of them are black and white must be declared: pass value_range=(low, high), for "
        "example (0, 4095) for a 12-bit camera"
    )


@lru_cache(maxsize=8)
def _level_table(low: float, high: float) -> NDArray[np.uint8]:
    return _mapped(np.arange(1 << 16), low, high)


def _mapped(levels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    # The product of integers is exact in float64, so that halves are halves when rint sees them.
    gray = (levels.astype(np.float64) - low) * 255 / (high - low)
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8)
