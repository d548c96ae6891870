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
            stacklevel=3,
        )
    value = applied.value if applied else threshold
    declared = value_range or manifest.spec.input.value_range
    return Request(applied, value, category, aim, color, declared)


def _threshold(manifest: Manifest, category: str | None, value: float | None) -> Threshold | None:
    """The calibrated threshold of a category (or pooled), moved to ``value`` if given.

    None without calibration.
    """
    if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
        raise InputError(f"threshold: expected a finite number, got {value!r}")
    known = manifest.spec.categories
    if category is not None and category not in known:
        raise InputError(f"category: expected one of {', '.join(known)}, got {category!r}")
    fitted = manifest.calibration
    if fitted is None:
        return None
    own = fitted.per_category.get(category, fitted.pooled) if category else fitted.pooled
    return own if value is None else calibration.at(own, value)
