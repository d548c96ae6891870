"""Decision thresholds from held-out normal images, and a score scale that keeps the raw order.

Split conformal prediction: of n exchangeable normal scores and one more, the new one is above the
k-th smallest, k = ceil((n + 1)(1 - a)), with probability at most a. No distribution is assumed;
what must hold is that the held-out images were not trained on and come from the same line.

Papers:
    Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005, section 4.1;
    Lei et al., Distribution-Free Predictive Inference for Regression, JASA 2018, Theorem 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.errors import InputError
from fastad.spec import Calibration, Threshold

__all__ = [
    "at",
    "calibrate",
    "check_count",
    "conformal_rank",
    "false_alarm_interval",
    "false_alarm_refusal",
    "heat_map_scale",
    "needed_count",
    "pred_score",
    "threshold_at",
]

# Share of the spread between median and k-th score; runtimes differ by about 1e-6 of a map's range.
ROUNDING_ROOM = 1e-4
# Half the spacing of float32 at 1.0: scores are float32, so a spread not above it is rounding.
NO_SPREAD = 2.0**-24
# What serves instead: 1 % above such a threshold scores 0.95, 10^5 thresholds still do not tie.
SPREAD_INSTEAD = 2.0**-10


def conformal_rank(count: int, false_alarm_rate: float) -> int:
    """Rank k, from 1, of the threshold among ``count`` ascending normal scores.

    A rank above ``count`` says that the sample is too small for the rate.

    Raises:
        InputError: the rate is outside (0, 1) or the count negative.
    """
    if count < 0:
        raise InputError(f"count: expected 0 or more normal images, got {count}")
    return math.ceil((count + 1) * (1 - _exact_rate(false_alarm_rate)))


def needed_count(false_alarm_rate: float) -> int:
    """Fewest held-out normal images that can support a false-alarm rate in (0, 1).

    Raises:
        InputError: the rate is outside (0, 1).

    >>> needed_count(0.01)
    99
    """
    rate = _exact_rate(false_alarm_rate)
    return math.ceil((1 - rate) / rate)  # smallest n with rank <= n


def check_count(count: int, false_alarm_rate: float) -> None:
    """Refuse a rate that ``count`` held-out normal images cannot support.

    Raises:
        InputError: they are too few, or the rate is outside (0, 1).
    """
    needed = needed_count(false_alarm_rate)
    if needed <= count:
        return
    way_out = "add normal images"
    if count > 0:
        smallest = f"{_smallest_rate(count)} (the smallest rate that {count} support)"
        way_out += f" or pass --false-alarm-rate {smallest}"
    raise InputError(
        f"false_alarm_rate: {float(false_alarm_rate):g} needs at least {needed} held-out "
        f"normal images, got {count}; {way_out}"
    )


def threshold_at(raw_score: NDArray[np.float64], false_alarm_rate: float) -> Threshold:
    """The threshold of normal images' finite raw scores [N]; `check_count` has passed N.

    Raises:
        InputError: the rate is outside (0, 1).
    """
    k = conformal_rank(len(raw_score), false_alarm_rate)
    kth, median = float(np.sort(raw_score)[k - 1]), float(np.median(raw_score))
    # Anything at or above the k-th score keeps the promise. Exactly there, the rounding of another
    # runtime would turn the image that set the threshold into an alarm.
    return Threshold(kth + ROUNDING_ROOM * (kth - median), median, len(raw_score))


def calibrate(
    raw_score: NDArray[np.floating[Any]],  # [N], of normal images that training never saw
    category: Sequence[str],  # [N]
    map_scale: tuple[float, float],
    false_alarm_rate: float = 0.01,
) -> Calibration:
    """Thresholds for a false-alarm rate, over all categories and for each that has enough images.

    The pooled promise holds for images in the sample's mix of categories; a category's own promise
    holds for that category. A normal image is called anomalous when its score is above (not at) the
    threshold.

    Args:
        raw_score: Raw scores; higher is more anomalous.
        category: Category of each image.
        map_scale: (low, high) of anomaly map values that heat maps span; see `heat_map_scale`.
        false_alarm_rate: Largest accepted share, in (0, 1), of normal images called anomalous.

    Raises:
        InputError: the sample is too small for the rate, lengths differ, a score is NaN or
            infinite, or the scale is not rising.
    """
    if raw_score.ndim != 1 or raw_score.dtype.kind != "f" or len(category) != len(raw_score):
        got = f"{raw_score.dtype} {list(raw_score.shape)} with {len(category)} categories"
        raise InputError(f"raw_score: expected float [N] with N categories, got {got}")
    _check_finite("raw_score", raw_score)
    low, high = float(map_scale[0]), float(map_scale[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"map_scale: expected finite low < high, got ({low}, {high})")
    check_count(len(raw_score), false_alarm_rate)
    needed = needed_count(false_alarm_rate)
    scores = raw_score.astype(np.float64)
    names = np.asarray(category, dtype=object)
    per_category: dict[str, Threshold] = {}
    uncovered: list[str] = []
    for name in sorted(set(category)):
        own = scores[names == name]
        if len(own) < needed:
            uncovered.append(name)
        else:
            per_category[name] = threshold_at(own, false_alarm_rate)
    return Calibration(
        false_alarm_rate=float(false_alarm_rate),
        pooled=threshold_at(scores, false_alarm_rate),
        per_category=per_category,
        map_scale=(low, high),
        uncovered=tuple(uncovered),
    )


def heat_map_scale(
    map_median: NDArray[np.floating[Any]],  # [N], median of each normal image's anomaly map
    map_peak: NDArray[np.floating[Any]],  # [N], maximum of each normal image's anomaly map
) -> tuple[float, float]:
    """The (low, high) of map values that heat maps span, the same for all images.

    Low is the typical normal pixel. The 99th percentile of normal peaks lands in the middle of the
    scale, so a normal image never shows the upper half of the colours.

    Raises:
        InputError: not 1-D of one length, empty, or a value is NaN or infinite.
    """
    if map_median.ndim != 1 or map_median.shape != map_peak.shape or len(map_peak) == 0:
        got = f"{list(map_median.shape)} and {list(map_peak.shape)}"
        raise InputError(f"map_median, map_peak: expected [N] and [N] with N > 0, got {got}")
    _check_finite("map_median", map_median)
    _check_finite("map_peak", map_peak)
    low = float(np.median(map_median.astype(np.float64)))
    peak = float(np.quantile(map_peak.astype(np.float64), 0.99, method="higher"))
    return low, low + 2 * _spread(peak, low)


def pred_score(raw: float, threshold: Threshold) -> float:
    """Calibrated score in (0, 1): above 0.5 exactly when ``raw`` is above the threshold.

    With ``z = (raw - value) / (value - median)`` this is ``0.5 + 0.5 * z / (1 + |z|)``: 0.5 at the
    threshold, 0.25 at the median normal image. Its tails fall like 1 / z, not exponentially, so
    float32 scores keep their order up to 10^8 spreads beyond the threshold. Order is never
    reversed; still further out scores may tie. Where the sample has no spread, 2^-10 of the
    threshold serves as spread.

    Raises:
        InputError: ``raw`` is NaN or infinite.
    """
    raw = float(raw)
    if not math.isfinite(raw):
        raise InputError(
            f"raw: expected a finite score, got {raw}; check the engine's precision on this input"
        )
    z = (raw - threshold.value) / _spread(threshold.value, threshold.median)
    # Written per side so that no digits cancel; clamped where rounding would reach 0, 0.5 or 1.
    if z > 0.0:
        return min(max(1.0 - 0.5 / (1.0 + z), math.nextafter(0.5, 1.0)), math.nextafter(1.0, 0.0))
    if z < 0.0:
        return max(min(0.5 / (1.0 - z), math.nextafter(0.5, 0.0)), math.nextafter(0.0, 1.0))
    return 0.5


def at(threshold: Threshold, value: float) -> Threshold:
    """The threshold moved to ``value``, in raw units, with the spread of its score scale kept.

    The median moves along, so 0.25 is then no longer the median normal image.

    Raises:
        InputError: ``value`` is NaN or infinite.
    """
    value = float(value)
    if not math.isfinite(value):
        raise InputError(f"threshold: expected a finite raw score, got {value}")
    spread = _spread(threshold.value, threshold.median)
    return Threshold(value=value, median=value - spread, count=threshold.count)


def false_alarm_interval(
    alarms: int,
    count: int,  # normal images the alarms were seen in
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Exact (Clopper-Pearson) two-sided confidence interval of a false-alarm rate.

    Paper:
        Clopper and Pearson, The Use of Confidence or Fiducial Limits, Biometrika 1934.

    Raises:
        InputError: not ``0 <= alarms <= count`` with a count above 0, or the confidence is outside
            (0, 1).

    >>> low, high = false_alarm_interval(0, 99)
    >>> low, round(high, 4)
    (0.0, 0.0366)
    """
    if not 0 <= alarms <= count or count == 0:
        raise InputError(f"alarms: expected 0 <= alarms <= count, got {alarms} of {count}")
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence: expected a value in (0, 1), got {confidence}; try 0.95")
    tail = (1.0 - confidence) / 2
    return _lower_limit(alarms, count, tail), 1.0 - _lower_limit(count - alarms, count, tail)


def false_alarm_refusal(rate: float, interval: tuple[float, float], count: int) -> str:
    """Why a precision may not replace float32 at a threshold, or empty.

    Its false-alarm rate over ``count`` normal images has to lie inside the `false_alarm_interval`
    of float32's own alarms on the same images.

    >>> false_alarm_refusal(0.02, (0.0, 0.04), 99)
    ''
    """
    low, high = interval
    if low <= rate <= high:
        return ""
    return (
        f"{rate:.2%} false alarms on {count} normal images, float32's own prove a rate of "
        f"{low:.2%} to {high:.2%}"
    )


def _lower_limit(k: int, n: int, tail: float) -> float:
    """The p in [0, k / n] at which k or more of n happen with probability ``tail``."""
    if k == 0:
        return 0.0
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    successes = np.arange(k + 1, n + 1)
    ratios = (n - successes + 1) / successes  # of neighbouring binomial terms, at odds 1
    # At k / n the tail is above one half, so the bracket holds for any tail.
    low, high = 0.0, k / n
    while True:
        p = (low + high) / 2
        if p in (low, high):
            return p
        # k > n p: ratios are below 1, the sum cannot overflow.
        terms = np.cumprod(ratios * (p / (1.0 - p)))
        log_first = log_choose + k * math.log(p) + (n - k) * math.log1p(-p)
        if log_first + math.log1p(float(terms.sum())) < math.log(tail):
            low = p
        else:
            high = p


def _spread(value: float, median: float) -> float:
    """Distance that one unit of z stands for; above 0 even where the sample has none."""
    size = abs(value) or 1.0
    return value - median if value - median > NO_SPREAD * size else SPREAD_INSTEAD * size


def _exact_rate(false_alarm_rate: float) -> Fraction:
    """The fraction that the caller's float stands for: 0.01 is 1/100, 1 / 3 is 1/3."""
    rate = float(false_alarm_rate)
    # A float's own fraction is a hair off, and would ask for 100 images instead of 99.
    exact = Fraction(rate).limit_denominator(10**12) if math.isfinite(rate) else Fraction(0)
    if not 0 < exact < 1:
        raise InputError(f"false_alarm_rate: expected a rate in (0, 1), got {rate}; try 0.01")
    return exact


def _smallest_rate(count: int) -> Decimal:
    """1 / (count + 1) in four digits, rounded up: a rate that the sample does support."""
    return Context(prec=4, rounding=ROUND_CEILING).divide(Decimal(1), Decimal(count + 1))


def _check_finite(name: str, values: NDArray[Any]) -> None:
    bad = len(values) - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise InputError(
            f"{name}: expected finite values, got {bad} NaN or infinite of {len(values)}; "
            "check the engine's precision on these images"
        )
