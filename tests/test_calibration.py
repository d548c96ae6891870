"""The promised false-alarm rate holds; the calibrated score keeps the order of the raw one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta

from fastad.calibration import (
    at,
    calibrate,
    conformal_rank,
    false_alarm_interval,
    heat_map_scale,
    needed_count,
    pred_score,
)
from fastad.errors import InputError
from fastad.spec import Calibration, Threshold, from_json, to_json

SCALE = (0.0, 1.0)


def draw(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).gamma(3.0, size=count)


@pytest.mark.parametrize(
    ("count", "rate", "rank"),
    [
        (99, 0.01, 99),
        (98, 0.01, 99),
        (100, 0.01, 100),
        (199, 0.01, 198),
        (19, 0.05, 19),
        (2, 1 / 3, 2),
        (999, 0.001, 999),
        (9, 0.1, 9),
        (9, 0.3, 7),
        (1, 0.9, 1),
    ],
)
def test_rank_is_free_of_float_rounding(count: int, rate: float, rank: int) -> None:
    assert conformal_rank(count, rate) == rank


@pytest.mark.parametrize(
    ("rate", "count"),
    [(0.01, 99), (0.05, 19), (0.1, 9), (0.001, 999), (1 / 3, 2), (0.5, 1), (0.9, 1), (0.03, 33)],
)
def test_needed_count_is_the_smallest_that_supports_the_rate(rate: float, count: int) -> None:
    assert needed_count(rate) == count
    assert conformal_rank(count, rate) <= count
    assert conformal_rank(count - 1, rate) > count - 1


def raised(kth: float, median: float) -> float:
    """The threshold that a k-th smallest score gives: room for rounding, far below the spread."""
    return float(kth + 1e-4 * (kth - median))


def test_threshold_is_just_above_the_kth_smallest_score() -> None:
    score = np.arange(1.0, 200.0)[::-1]  # 199 scores: k = 198
    got = calibrate(score, ["pcb"] * 199, SCALE)
    assert got.pooled == Threshold(value=198.0 + 1e-4 * 98.0, median=100.0, count=199)
    assert got.per_category == {"pcb": got.pooled}
    assert got.false_alarm_rate == 0.01


# Each draw: calibrate on n images, then the next one comes. The promise is about both together.
@pytest.mark.parametrize(
    ("count", "rate"), [(99, 0.01), (150, 0.01), (19, 0.05), (100, 0.05), (30, 0.2)]
)
def test_promised_rate_holds_over_many_draws(count: int, rate: float) -> None:
    draws = 20_000
    scores = np.random.default_rng(count).lognormal(size=(draws, count + 1))
    k = conformal_rank(count, rate)
    thresholds = np.partition(scores[:, :count], k - 1, axis=1)[:, k - 1]
    pooled = calibrate(scores[0, :count], ["a"] * count, SCALE, rate).pooled
    assert pooled.value == raised(thresholds[0], pooled.median)
    alarms = int(np.sum(scores[:, count] > thresholds))
    # Without ties the expectation is known exactly, and is at most the rate.
    expected = 1 - k / (count + 1)
    assert expected <= rate + 1e-12
    sigma = math.sqrt(expected * (1 - expected) / draws)
    # Seeded, so it cannot flicker; 4 sigma would be one failure in 16 000 seeds.
    assert abs(alarms / draws - expected) < 4 * sigma


def test_promised_rate_holds_with_tied_scores() -> None:
    scores = np.random.default_rng(3).integers(0, 5, (20_000, 20)).astype(float)
    thresholds = np.partition(scores[:, :19], 18, axis=1)[:, 18]
    assert conformal_rank(19, 0.05) == 19
    assert np.mean(scores[:, 19] > thresholds) <= 0.05


def test_a_score_at_the_threshold_is_not_above_it() -> None:
    threshold = calibrate(np.ones(99), ["a"] * 99, SCALE).pooled
    assert pred_score(1.0, threshold) == 0.5


def test_99_images_support_one_percent() -> None:
    pooled = calibrate(draw(99), ["a"] * 99, SCALE).pooled
    assert pooled.value == raised(draw(99).max(), pooled.median)


def test_refuses_98_images_for_one_percent_and_names_the_way_out() -> None:
    message = (
        r"false_alarm_rate: 0\.01 needs at least 99 held-out normal images, got 98; add normal "
        r"images or pass --false-alarm-rate 0\.01011 \(the smallest rate that 98 support\)"
    )
    with pytest.raises(InputError, match=message):
        calibrate(draw(98), ["a"] * 98, SCALE)
    calibrate(draw(98), ["a"] * 98, SCALE, false_alarm_rate=0.01011)


def test_refuses_an_empty_sample() -> None:
    with pytest.raises(InputError, match=r"needs at least 99 .* got 0; add normal images$"):
        calibrate(np.zeros(0), [], SCALE)


def test_small_categories_are_listed_as_uncovered() -> None:
    category = ["pcb"] * 99 + ["bolt"] * 98 + ["cable"] * 100
    got = calibrate(draw(297), category, SCALE)
    assert got.uncovered == ("bolt",)
    assert {name: t.count for name, t in got.per_category.items()} == {"cable": 100, "pcb": 99}
    assert got.pooled.count == 297


def test_categories_have_thresholds_of_their_own_scores() -> None:
    score = np.concatenate([draw(99), 100 + draw(99, seed=1)])
    got = calibrate(score, ["a"] * 99 + ["b"] * 99, SCALE)
    for name, own in (("a", score[:99]), ("b", score[99:])):
        assert got.per_category[name].value == raised(own.max(), float(np.median(own)))


def test_pooling_small_categories_can_suffice() -> None:
    got = calibrate(draw(100), ["a", "b"] * 50, SCALE)
    assert got.per_category == {}
    assert got.uncovered == ("a", "b")


def test_calibration_survives_json() -> None:
    got = calibrate(draw(150).astype(np.float32), np.array(["a"] * 150), SCALE)
    assert from_json(Calibration, to_json(got), "test") == got


@pytest.mark.parametrize(
    ("score", "category", "scale", "rate", "message"),
    [
        (np.full(99, np.nan), ["a"] * 99, SCALE, 0.01, "got 99 NaN or infinite of 99"),
        (draw(99), ["a"] * 98, SCALE, 0.01, r"got float64 \[99\] with 98 categories"),
        (draw(99)[None], ["a"] * 99, SCALE, 0.01, r"expected float \[N\]"),
        (np.arange(99), ["a"] * 99, SCALE, 0.01, r"got int64 \[99\]"),
        (draw(99), ["a"] * 99, (1.0, 1.0), 0.01, r"map_scale: expected finite low < high"),
        (draw(99), ["a"] * 99, (0.0, math.inf), 0.01, r"map_scale: expected finite low < high"),
        (draw(99), ["a"] * 99, SCALE, 0.0, r"expected a rate in \(0, 1\), got 0\.0"),
        (draw(99), ["a"] * 99, SCALE, 1.0, r"expected a rate in \(0, 1\), got 1\.0"),
        (draw(99), ["a"] * 99, SCALE, math.nan, r"expected a rate in \(0, 1\), got nan"),
    ],
    ids=["nan", "length", "rank", "dtype", "flat", "infinite", "zero", "one", "nan_rate"],
)
def test_calibrate_refuses(
    score: NDArray[np.float64],
    category: list[str],
    scale: tuple[float, float],
    rate: float,
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(score, category, scale, rate)


THRESHOLDS = {
    "plain": Threshold(value=2.0, median=1.0, count=99),
    "sixty_plus_small_differences": Threshold(value=60.01, median=60.0, count=99),
    "negative": Threshold(value=-3.0, median=-8.0, count=99),
    "no_spread": Threshold(value=5.0, median=5.0, count=99),
    "all_zero": Threshold(value=0.0, median=0.0, count=99),
}
by_threshold = pytest.mark.parametrize("name", THRESHOLDS)


@by_threshold
def test_score_is_one_half_at_the_threshold(name: str) -> None:
    assert pred_score(THRESHOLDS[name].value, THRESHOLDS[name]) == 0.5


@pytest.mark.parametrize("name", ["plain", "sixty_plus_small_differences", "negative"])
def test_score_is_one_quarter_at_the_median(name: str) -> None:
    assert pred_score(THRESHOLDS[name].median, THRESHOLDS[name]) == 0.25


def test_score_follows_its_formula() -> None:
    for_z = {z: pred_score(2.0 + z, THRESHOLDS["plain"]) for z in (-9.0, -1.0, 1.0, 9.0)}
    assert for_z == pytest.approx({z: 0.5 + 0.5 * z / (1 + abs(z)) for z in for_z}, abs=1e-15)


@by_threshold
@given(
    first=st.floats(allow_nan=False, allow_infinity=False),
    second=st.floats(allow_nan=False, allow_infinity=False),
)
def test_score_never_reverses_the_order(name: str, first: float, second: float) -> None:
    threshold = THRESHOLDS[name]
    low, high = sorted((first, second))
    assert 0.0 < pred_score(low, threshold) <= pred_score(high, threshold) < 1.0
    assert (pred_score(first, threshold) > 0.5) == (first > threshold.value)
    assert (pred_score(first, threshold) < 0.5) == (first < threshold.value)


# Neighbouring float32 values, the closest that a model's scores can be: up to a million spreads.
@pytest.mark.parametrize("name", ["plain", "sixty_plus_small_differences", "negative"])
@given(z=st.floats(-1e6, 1e6))
def test_neighbouring_float32_scores_stay_apart(name: str, z: float) -> None:
    threshold = THRESHOLDS[name]
    raw = np.float32(threshold.value + z * (threshold.value - threshold.median))
    higher = np.nextafter(raw, np.float32(np.inf))
    # Around 0 float32 is finer than float64 is around the threshold.
    if abs(raw) > 1e-6:
        assert pred_score(float(raw), threshold) < pred_score(float(higher), threshold)


# Without spread the score still tells 10^5 thresholds from the next float32 value.
@pytest.mark.parametrize("factor", [-1e5, -1.0, 0.5, 2.0, 1e5])
def test_sample_without_spread_still_orders_scores(factor: float) -> None:
    raw = np.float32(5.0 * factor)
    higher = np.nextafter(raw, np.float32(np.inf))
    threshold = THRESHOLDS["no_spread"]
    assert pred_score(float(raw), threshold) < pred_score(float(higher), threshold)


@pytest.mark.parametrize("raw", [math.nan, math.inf, -math.inf])
def test_score_refuses_what_is_not_finite(raw: float) -> None:
    with pytest.raises(InputError, match="raw: expected a finite score"):
        pred_score(raw, THRESHOLDS["plain"])


@by_threshold
def test_moved_threshold_keeps_the_scale(name: str) -> None:
    original = THRESHOLDS[name]
    moved = at(original, original.value + 0.25)
    assert pred_score(moved.value, moved) == 0.5
    assert moved.count == original.count
    for step in (-0.5, -1e-3, 1e-3, 0.5):
        got = pred_score(moved.value + step, moved)
        assert got == pytest.approx(pred_score(original.value + step, original), rel=1e-6)


def test_moved_threshold_leaves_the_original_alone() -> None:
    original = THRESHOLDS["plain"]
    at(original, 9.0)
    assert original == Threshold(value=2.0, median=1.0, count=99)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moved_threshold_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(InputError, match="threshold: expected a finite raw score"):
        at(THRESHOLDS["plain"], value)


def test_heat_map_scale_puts_normal_peaks_in_the_middle() -> None:
    low, high = heat_map_scale(np.full(200, 1.0), np.linspace(2.0, 3.0, 200))
    assert low == 1.0
    assert (low + high) / 2 == pytest.approx(2.99, abs=0.005)


def test_heat_map_scale_of_flat_maps_still_rises() -> None:
    low, high = heat_map_scale(np.full(3, 60.0), np.full(3, 60.0))
    assert low < high


@pytest.mark.parametrize(
    ("median", "peak", "message"),
    [
        (np.zeros(2), np.zeros(3), r"got \[2\] and \[3\]"),
        (np.zeros(0), np.zeros(0), "with N > 0"),
        (np.zeros(1), np.array([np.inf]), "map_peak: .* got 1 NaN or infinite"),
    ],
    ids=["length", "empty", "infinite"],
)
def test_heat_map_scale_refuses(
    median: NDArray[np.float64], peak: NDArray[np.float64], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        heat_map_scale(median, peak)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(
    ("alarms", "count"),
    [(0, 1), (1, 1), (0, 99), (1, 99), (5, 100), (99, 99), (3, 100_000), (50_000, 100_000)],
)
def test_interval_equals_the_beta_quantiles(alarms: int, count: int, confidence: float) -> None:
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, alarms, count - alarms + 1) if alarms else 0.0
    high = beta.ppf(1 - tail, alarms + 1, count - alarms) if alarms < count else 1.0
    # lgamma(10^5) is near 10^6: its rounding is 10^-10 of a probability.
    assert false_alarm_interval(alarms, count, confidence) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize(("alarms", "count"), [(-1, 5), (6, 5), (0, 0)])
def test_interval_refuses_impossible_counts(alarms: int, count: int) -> None:
    with pytest.raises(InputError, match="expected 0 <= alarms <= count"):
        false_alarm_interval(alarms, count)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_interval_refuses_impossible_confidence(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence: expected a value in"):
        false_alarm_interval(1, 5, confidence)
