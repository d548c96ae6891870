"""What a call asks for beside its images, and the checks of it before any work."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import TypedDict

from fastad import calibration
from fastad.errors import FastadWarning, InputError
from fastad.inspected import Area
from fastad.levels import ValueRange
from fastad.look import Aim, aim_at
from fastad.preprocess import Color
from fastad.spec import Manifest, Threshold


class Options(TypedDict, total=False):
    """What a call may ask for beside its images, as `Predictor.predict` describes it."""

    threshold: float | None
    color: Color
    category: str | None
    value_range: ValueRange | None
    tile: tuple[int, int] | int | None
    overlap: float
    region: Area | None
    ignore: Area | None


@dataclass(frozen=True)
class Request:
    """`Options` of one call, checked; colour and range are checked with the images."""

    applied: Threshold | None  # calibrated, moved to the caller's value if there is one
    value: float | None  # what decides; None if nothing does
    category: str | None
    aim: Aim
    color: Color
    value_range: ValueRange | None


def check_options(
    manifest: Manifest,
    stacklevel: int = 3,
    /,
    *,
    threshold: float | None = None,
    color: Color = "rgb",
    category: str | None = None,
    value_range: ValueRange | None = None,
    tile: tuple[int, int] | int | None = None,
    overlap: float = 0.25,
    region: Area | None = None,
    ignore: Area | None = None,
) -> Request:
    """Check `Options` against an engine; a warning points at the caller's caller.

    Or further out, with a larger ``stacklevel``, which is that of `warnings.warn`.

    Raises:
        InputError: an argument that cannot be used.
        UnsupportedError: a region, and an engine that does not record its score rule.
    """
    applied = _threshold(manifest, category, threshold)
    aim = aim_at(manifest.spec, tile, overlap, region, ignore)
    if aim.tiling and applied and threshold is None:
        warnings.warn(
            "tile: the threshold was calibrated on whole images, and the maximum over tiles is "
            "higher; pass threshold=, which `find_threshold` (`fastad threshold`) finds from "
            "normal images with the same tile",
            FastadWarning,
            stacklevel=stacklevel,
        )
    value = applied.value if applied else None if threshold is None else float(threshold)
    declared = manifest.spec.input.value_range if value_range is None else value_range
    return Request(applied, value, category, aim, color, declared)


def _threshold(manifest: Manifest, category: str | None, value: float | None) -> Threshold | None:
    """The calibrated threshold of a category (or pooled), moved to ``value`` if given.

    None without calibration.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value)):
        raise InputError(f"threshold: expected a finite number, got {value!r}")
    known = manifest.spec.categories
    if category is not None and category not in known:
        raise InputError(f"category: expected one of {', '.join(known)}, got {category!r}")
    fitted = manifest.calibration
    if fitted is None:
        return None
    own = fitted.per_category.get(category, fitted.pooled) if category else fitted.pooled
    return own if value is None else calibration.at(own, value)
