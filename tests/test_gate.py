"""The accuracy gate: what passes, what is refused, and with which sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastad.export.gate import (
    GateImages,
    Limits,
    judge,
    load_gate_images,
    measure,
    rank_correlation,
    refer,
)
from numpy.typing import NDArray
from textures import Textures

from fastad.engine.base import Outputs, Precision
from fastad.spec import GateReport, InputSpec
from fastad.training.folder import Sample, scan

FINE = GateReport(
    runtime="openvino",
    precision="int8",
    normal_images=24,
    test_images=100,
    map_max=0.3,
    map_mean=0.01,
    score_rank_correlation=0.99,
    false_alarm_rate=0.05,
    false_alarm_interval=(0.0, 0.1),
    image_auroc_change=-0.1,
    pixel_auroc_change=0.0,
    aupro_change=-0.3,
    ms_batch1=1.0,
    ms_batch8=1.0,
)
UNLABELLED = replace(
    FINE, test_images=0, image_auroc_change=None, pixel_auroc_change=None, aupro_change=None
)


def seen(held: int = 24, normal: int = 0, anomalous: int = 0, masked: bool = True) -> GateImages:
    """Images of one category by their counts; the gate's rules read no pixels."""
    mask = Path("mask.png") if masked else None
    samples = [Sample(Path("a.png"), "a", False)] * (held + normal)
    samples += [Sample(Path("a.png"), "a", True, "hole", mask)] * anomalous
    return GateImages(np.zeros((len(samples), 1, 1, 3), np.uint8), tuple(samples), held)


LABELLED = seen(24, 50, 50)


@pytest.mark.parametrize(
    ("report", "images"), [(FINE, LABELLED), (UNLABELLED, seen())], ids=["labelled", "unlabelled"]
)
def test_passes_at_its_limits(report: GateReport, images: GateImages) -> None:
    limits = Limits(rank_correlation=0.99, map_mean=0.01)
    assert judge(report, limits, images).refused == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_auroc_change": -0.11}, "image AUROC changes by -0.11 points, allowed is -0.1"),
        ({"pixel_auroc_change": -0.2}, "pixel AUROC changes by -0.20"),
        ({"aupro_change": -0.31}, "AUPRO changes by -0.31 points, allowed is -0.3"),
        ({"image_auroc_change": float("nan")}, "image AUROC changes by"),
        ({"false_alarm_rate": 0.11}, "11.00% false alarms on 74 normal images"),
    ],
)
def test_refuses_labelled(change: dict[str, Any], sentence: str) -> None:
    refused = judge(replace(FINE, **change), Limits(), LABELLED).refused
    assert refused.startswith(sentence)


# A map error of half the range and an order of scores lost.
FAR = replace(FINE, map_mean=0.5, score_rank_correlation=0.1)


@pytest.mark.parametrize(
    ("change", "images", "sentence"),
    [
        ({}, LABELLED, ""),
        ({}, seen(24, 1, 1), "scores of normal images correlate by rank to 0.100"),
        ({}, seen(24, 7, 200), "scores of normal images correlate by rank to 0.100"),
        ({}, seen(24, 8, 8), "scores of normal images correlate by rank to 0.100"),
        ({}, seen(24, 50, 50, masked=False), "maps differ by 50.00% of their range"),
        ({"pixel_auroc_change": None}, LABELLED, "maps differ by 50.00% of their range"),
        ({"aupro_change": None}, LABELLED, "maps differ by 50.00% of their range"),
        ({"image_auroc_change": None}, LABELLED, "scores of normal images correlate by rank to"),
        ({}, seen(0, 6, 17), "6 held-out normal images prove nothing, 8 are needed"),
    ],
)
def test_labels_replace_only_the_rule_they_judge(
    change: dict[str, Any], images: GateImages, sentence: str
) -> None:
    refused = judge(replace(FAR, **change), Limits(), images).refused
    assert refused.startswith(sentence)
    assert bool(refused) == bool(sentence)


@pytest.mark.parametrize(
    ("normal", "anomalous", "pairs", "passes"),
    [(6, 17, 1, True), (6, 17, 2, False), (40, 60, 2, True), (40, 60, 3, False)],
)
def test_few_labels_may_lose_one_pair(
    normal: int, anomalous: int, pairs: int, passes: bool
) -> None:
    lost = replace(FINE, image_auroc_change=-100.0 * pairs / (normal * anomalous))
    assert (judge(lost, Limits(), seen(24, normal, anomalous)).refused == "") == passes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"score_rank_correlation": 0.89}, "scores of normal images correlate by rank to 0.890"),
        ({"map_mean": 0.021}, "maps differ by 2.10% of their range on average, allowed is 2.00%"),
        ({"map_mean": float("nan")}, "maps differ by"),
    ],
)
def test_refuses_without_labels(change: dict[str, Any], sentence: str) -> None:
    changed = replace(UNLABELLED, **change)
    assert judge(changed, Limits(), seen()).refused.startswith(sentence)


def test_refuses_few_images() -> None:
    refused = judge(UNLABELLED, Limits(), seen(7)).refused
    assert refused.startswith("7 held-out normal images prove nothing, 8 are needed")


def test_a_reason_given_before_stays() -> None:
    assert judge(replace(FINE, refused="slow"), Limits(), LABELLED).refused == "slow"


class Arithmetic:
    """A runtime whose map is the red channel over 51, plus an error per value."""

    name = "arithmetic"

    def __init__(self, error: float = 0.0, scale: float = 1.0) -> None:
        self.precision: Precision = "int8"
        self.error, self.scale = np.float32(error), np.float32(scale)
        self.runs = 0

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        self.runs += 1
        maps = images[..., 0].astype(np.float32) / 51 * self.scale + self.error
        return maps, maps.max(axis=(1, 2))

    def close(self) -> None:
        pass


def ramp(count: int) -> GateImages:
    pixels = np.zeros((count, 4, 4, 3), np.uint8)
    pixels[:, 0, 0] = (np.arange(count) * 255 // (count - 1))[:, None]  # scores 0..5
    samples = tuple(Sample(Path(f"{i}.png"), "", False) for i in range(count))
    return GateImages(pixels, samples, count)


def test_measures_errors_of_the_whole_range_over_all_batches() -> None:
    report = measure(Arithmetic(0.25), refer(Arithmetic(), ramp(20)), threshold=4.5)
    assert report.map_max == pytest.approx(0.05)
    assert report.map_mean == pytest.approx(0.05)
    assert report.score_rank_correlation == 1.0
    assert report.false_alarm_rate == pytest.approx(3 / 20)  # float32 has two
    assert report.false_alarm_interval == pytest.approx((0.0123, 0.317), abs=1e-3)
    assert (report.normal_images, report.test_images) == (20, 0)
    assert report.image_auroc_change is None


def test_alarms_beyond_the_interval_are_refused() -> None:
    report = measure(Arithmetic(3.0), refer(Arithmetic(), ramp(20)), threshold=4.5)
    wide = Limits(rank_correlation=0.0, map_mean=9.0)
    assert "70.00% false alarms on 20 normal images" in judge(report, wide, ramp(20)).refused


def test_without_a_threshold_there_are_no_alarms() -> None:
    report = measure(Arithmetic(), refer(Arithmetic(), ramp(9)), threshold=None)
    assert (report.false_alarm_rate, report.false_alarm_interval) == (None, None)
    assert judge(report, Limits(), ramp(9)).refused == ""


def test_float32_runs_once_for_all_trials() -> None:
    full = Arithmetic()
    reference = refer(full, ramp(20))
    runs = full.runs
    own = measure(full, reference, 4.5)
    assert measure(Arithmetic(0.5), reference, 4.5).map_mean > own.map_mean == 0.0
    assert (runs, full.runs) == (3, 3)


def test_float32_loses_nothing_and_its_metrics_are_not_computed_again(
    textures: Textures, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = scan(textures.root).test
    full, images = Arithmetic(), load_gate_images(tested[:0], tested, InputSpec((64, 64)))
    reference = refer(full, images)
    twin = measure(Arithmetic(), reference, 2.5)
    monkeypatch.setattr("fastad.export.gate.PixelMetrics", None)
    assert measure(full, reference, 2.5) == twin
    assert measure(full, reference, 2.5, Limits()) == twin
    assert (twin.aupro_change, twin.map_max, twin.score_rank_correlation) == (0.0, 0.0, 1.0)
    assert twin.false_alarm_rate is not None


def test_float32_that_is_not_finite_is_refused() -> None:
    full = Arithmetic(float("nan"))
    report = measure(full, refer(full, ramp(9)), threshold=4.5)
    assert report.refused == "some outputs are NaN or infinite"


def test_test_images_do_not_hide_the_order_of_the_normal_ones() -> None:
    images = ramp(20)
    anomalous = [replace(s, is_anomalous=True) for s in images.samples[10:]]
    images = GateImages(images.pixels, (*images.samples[:10], *anomalous), 10)
    reference = refer(Arithmetic(), images)
    scores = reference.scores.copy()
    scores[:10] = scores[:10][::-1]  # normal images in reverse, anomalous ones still above them
    turned = replace(reference, scores=scores)
    assert measure(Arithmetic(), turned, None).score_rank_correlation == pytest.approx(-1.0)


def half_normal(count: int) -> GateImages:
    """The brighter half is anomalous; its images come last, without masks."""
    images = ramp(count)
    half = count // 2
    tested = [replace(s, is_anomalous=True) for s in images.samples[half:]]
    return GateImages(images.pixels, (*images.samples[:half], *tested), half // 2)


@pytest.mark.parametrize("error", [0.0, 0.2, 3.0])
def test_a_judged_measure_gives_the_same_verdict(error: float) -> None:
    images, limits = half_normal(40), Limits()
    reference = refer(Arithmetic(), images)
    full = judge(measure(Arithmetic(error), reference, 2.3), limits, images)
    quick = judge(measure(Arithmetic(error), reference, 2.3, limits), limits, images)
    assert bool(quick.refused) == bool(full.refused) == (error > 0.1)
    if not full.refused:
        assert quick == full


def test_normal_images_come_first_and_their_refusal_spares_the_others() -> None:
    images = half_normal(40)
    reference, runtime = refer(Arithmetic(), images), Arithmetic(3.0)
    report = measure(runtime, reference, 2.3, Limits())
    assert runtime.runs == 3  # twenty normal images of forty
    assert "false alarms on 20 normal images" in report.refused
    assert report.image_auroc_change is None
    assert report.map_mean == pytest.approx(0.6)
    everything = Arithmetic(3.0)
    assert measure(everything, reference, 2.3).image_auroc_change == pytest.approx(0.0)
    assert everything.runs == 6


def test_outputs_that_are_not_finite_are_refused() -> None:
    report = measure(Arithmetic(float("nan")), refer(Arithmetic(), ramp(9)), threshold=4.5)
    refused = judge(report, Limits(1e9, 1e9, -1.0, 1e9), ramp(9)).refused
    assert refused == "some outputs are NaN or infinite"


def test_labelled_images_give_changes_in_points(textures: Textures) -> None:
    tested = scan(textures.root).test
    images = load_gate_images(tested[:0], tested, InputSpec((64, 64)))
    assert images.labelled == 22
    assert (images.count_labelled(), images.one_pair) == (10, pytest.approx(100 / 30 / 2))
    same = measure(Arithmetic(), refer(Arithmetic(), images), None)
    changes = (same.image_auroc_change, same.pixel_auroc_change, same.aupro_change)
    assert changes == (0.0, 0.0, 0.0)
    turned = measure(Arithmetic(scale=-1.0), refer(Arithmetic(), images), None)
    plain = measure(Arithmetic(), refer(Arithmetic(scale=-1.0), images), None)
    assert turned.pixel_auroc_change is not None
    assert plain.pixel_auroc_change == pytest.approx(-turned.pixel_auroc_change)
    assert turned.pixel_auroc_change != 0


@pytest.mark.parametrize(
    ("second", "expected"),
    [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], -1.0), ([1, 1, 1, 1], 0.0), ([1, 3, 2, 4], 0.8)],
)
def test_rank_correlation(second: list[float], expected: float) -> None:
    found = rank_correlation(np.array([0.1, 0.2, 0.3, 0.4]), np.array(second, float))
    assert found == pytest.approx(expected)
