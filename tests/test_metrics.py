"""Metrics against scikit-learn, torchmetrics and plain slow definitions; memory stays bounded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from fastad import metrics as metrics_module
from fastad.errors import InputError
from fastad.metrics import ImageMetrics, PixelMetrics, PixelScores, image_scores

# Sums of at most 10^4 float64 terms in another order.
ROUNDING = 1e-12

Image = tuple[NDArray[np.float32], NDArray[np.bool_] | None]

# name: (lowest value, step between values, number of values)
VALUES = {
    "unit_range_with_ties": (0.0, 1 / 16, 16),
    "both_signs": (-1.0, 1 / 8, 16),
    "sixty_plus_small_differences": (60.0, 2.0**-18, 64),  # one float32 spacing at 60
    "hardly_any_ties": (0.5, 2.0**-24, 2**20),
}


def images(seed: int, values: str, count: int = 6, size: tuple[int, int] = (17, 23)) -> list[Image]:
    """Maps with drawn values; half of them with blobs that also raise the map."""
    rng = np.random.default_rng(seed)
    low, step, levels = VALUES[values]
    made: list[Image] = []
    for i in range(count):
        level = rng.integers(0, levels, size)
        if i % 2:
            made.append(((low + step * level).astype(np.float32), None))
            continue
        mask = ndimage.gaussian_filter(rng.normal(size=size), 1.5) > 0.25
        mask[0, 0] = True  # never empty
        level = np.where(mask, np.minimum(level + levels // 4, levels - 1), level)
        made.append(((low + step * level).astype(np.float32), mask))
    return made


def accumulate(batch: list[Image]) -> PixelMetrics:
    metrics = PixelMetrics()
    for anomaly_map, mask in batch:
        metrics.add(anomaly_map, mask)
    return metrics


def flat(batch: list[Image]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    masks = [np.zeros(m.shape, bool) if g is None else g for m, g in batch]
    return np.concatenate([m.ravel() for m, _ in batch]), np.concatenate([g.ravel() for g in masks])


def best_f1(label: NDArray[np.bool_], score: NDArray[np.float32]) -> float:
    precision, recall, _ = precision_recall_curve(label, score)
    total = precision + recall
    return float(np.max(2 * precision * recall / np.where(total == 0, 1, total)))


def slow_aupro(batch: list[Image], limit: float) -> float:
    """The definition: one point for every threshold, regions one by one."""
    score, label = flat(batch)
    regions = []
    for anomaly_map, mask in batch:
        if mask is not None:
            labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
            regions += [anomaly_map[labels == i] for i in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for t in np.unique(score)[::-1]:
        fpr.append(float(np.mean(score[~label] >= t)))
        pro.append(float(np.mean([np.mean(region >= t) for region in regions])))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], pro[:-1], pro[1:], strict=True):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_image_scores_equal_scikit_learn(levels: int, dtype: type) -> None:
    rng = np.random.default_rng(levels)
    label = rng.random(200) < 0.3
    score = (rng.integers(0, levels, 200) + label * levels // 3).astype(dtype)
    got = image_scores(score, label)
    assert got.auroc == pytest.approx(roc_auc_score(label, score), abs=ROUNDING)
    assert got.ap == pytest.approx(average_precision_score(label, score), abs=ROUNDING)
    assert got.f1max == pytest.approx(best_f1(label, score), abs=ROUNDING)


def test_image_scores_equal_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    label = rng.random(100) < 0.5
    score = rng.integers(0, 9, 100) / 10  # in 0..1: torchmetrics would apply a sigmoid otherwise
    got = image_scores(score, label)
    target = torch.from_numpy(label.astype(np.int64))
    # torchmetrics computes in float32.
    auroc = float(binary_auroc(torch.from_numpy(score), target))
    ap = float(binary_average_precision(torch.from_numpy(score), target))
    assert got.auroc == pytest.approx(auroc, abs=1e-6)
    assert got.ap == pytest.approx(ap, abs=1e-6)


@pytest.mark.parametrize("label", [[], [True, True], [False]], ids=["none", "anomalous", "normal"])
def test_image_scores_of_one_class_are_none(label: list[bool]) -> None:
    got = image_scores(np.arange(len(label), dtype=np.float64), np.array(label, bool))
    assert got == ImageMetrics(None, None, None)


@pytest.mark.parametrize("values", VALUES)
def test_pixel_scores_equal_scikit_learn(values: str) -> None:
    batch = images(1, values)
    score, label = flat(batch)
    got = accumulate(batch).compute()
    assert got.auroc == pytest.approx(roc_auc_score(label, score), abs=ROUNDING)
    assert got.ap == pytest.approx(average_precision_score(label, score), abs=ROUNDING)
    assert got.f1max == pytest.approx(best_f1(label, score), abs=ROUNDING)
    assert (got.auroc_bound, got.ap_bound, got.f1max_bound, got.aupro_bound) == (0, 0, 0, 0)
    assert (got.normal_count, got.anomalous_count) == (np.sum(~label), np.sum(label))


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("values", VALUES)
def test_aupro_equals_its_definition(values: str, limit: float) -> None:
    batch = images(2, values)
    assert accumulate(batch).compute(limit).aupro == pytest.approx(
        slow_aupro(batch, limit), abs=ROUNDING
    )


def test_aupro_weighs_a_small_region_like_a_large_one() -> None:
    mask = np.zeros((10, 20), bool)
    mask[:8, :10] = True
    mask[9, 19] = True
    anomaly_map = np.zeros(mask.shape, np.float32)
    anomaly_map[9, 19] = 1.0  # found at no false positive; the large one only with all pixels
    got = accumulate([(anomaly_map, mask)]).compute(fpr_limit=0.5)
    # From (0, 0.5) straight to (1, 1): at 0.5 the overlap is 0.75.
    assert got.aupro == pytest.approx(0.625, abs=ROUNDING)
    assert got.region_count == 2


def test_diagonal_pixels_are_one_region() -> None:
    mask = np.eye(5, dtype=bool)
    assert accumulate([(mask.astype(np.float32), mask)]).compute().region_count == 1


def test_minus_zero_ties_with_zero() -> None:
    anomaly_map = np.array([[0.0, -0.0]], np.float32)
    assert accumulate([(anomaly_map, np.array([[True, False]]))]).compute().auroc == 0.5


def test_accepts_views_that_are_not_contiguous() -> None:
    anomaly_map, mask = images(3, "unit_range_with_ties", count=1)[0]
    assert mask is not None
    got = accumulate([(anomaly_map.T[::-1], mask.T[::-1])]).compute()
    assert got == accumulate([(anomaly_map.T[::-1].copy(), mask.T[::-1].copy())]).compute()
    assert got.auroc == pytest.approx(roc_auc_score(mask.ravel(), anomaly_map.ravel()), abs=1e-12)


@pytest.mark.parametrize("mask", [None, np.zeros((2, 3), bool), np.ones((2, 3), bool)])
def test_pixel_scores_of_one_class_are_none(mask: NDArray[np.bool_] | None) -> None:
    got = accumulate([(np.ones((2, 3), np.float32), mask)]).compute()
    assert (got.auroc, got.ap, got.f1max, got.aupro, got.auroc_bound) == (None,) * 5


# At 2^21 bins the small batches stay exact; at 2^13 their values must share bins.
@pytest.mark.parametrize("max_bins", [1 << 21, 1 << 13])
def test_merge_equals_joint_accumulation(monkeypatch: pytest.MonkeyPatch, max_bins: int) -> None:
    monkeypatch.setattr(metrics_module, "MAX_BINS", max_bins)
    near_zero, near_sixty = images(4, "both_signs"), images(5, "sixty_plus_small_differences")
    joint = accumulate(near_zero + near_sixty).compute()
    first, second = accumulate(near_zero), accumulate(near_sixty)
    before = second.compute()
    first.merge(second)
    assert_same(first.compute(), joint)
    assert second.compute() == before
    second.merge(accumulate(near_zero))
    assert_same(second.compute(), joint)


def assert_same(got: PixelScores, want: PixelScores) -> None:
    # Only region shares are floats; they are added in another order.
    assert got.aupro == pytest.approx(want.aupro, abs=ROUNDING)
    assert got.aupro_bound == pytest.approx(want.aupro_bound, abs=ROUNDING)
    assert (got.auroc, got.ap, got.f1max) == (want.auroc, want.ap, want.f1max)
    assert got.auroc_bound == want.auroc_bound
    assert got.normal_count == want.normal_count
    assert got.region_count == want.region_count


@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.51, 0.55)], ids=["loose", "many_tied"])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("max_bins", [1 << 8, 1 << 10, 1 << 13])
def test_errors_of_joined_bins_stay_within_their_bounds(
    monkeypatch: pytest.MonkeyPatch, max_bins: int, limit: float, clip: tuple[float, float]
) -> None:
    batch = [(m.clip(*clip).astype(np.float32), mask) for m, mask in images(6, "hardly_any_ties")]
    exact = accumulate(batch).compute(limit)
    monkeypatch.setattr(metrics_module, "MAX_BINS", max_bins)
    joined = accumulate(batch).compute(limit)
    assert exact.auroc_bound == 0.0
    for name in ("auroc", "ap", "f1max", "aupro"):
        error = abs(getattr(joined, name) - getattr(exact, name))
        assert error <= getattr(joined, f"{name}_bound") + ROUNDING, name
    assert 0.0 < joined.auroc_bound < 0.1


# Maps of 1024 x 1024 with values that hardly ever repeat: what most bins are needed for. Over 12
# seeds the largest bounds were 8e-7 (AUROC), 1e-5 (AP), 2e-5 (F1max), 2e-6 (AUPRO): AP and F1max
# hang on whether a normal pixel shares one of the few bins that decide.
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["near_sixty", "six_decades", "both_signs", "clipped"])
def test_bounds_are_below_a_ten_thousandth(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((1024, 1024), bool)
    mask[300:420, 500:580] = mask[700:710, 100:110] = True
    noise = rng.normal(size=mask.shape) + 1.5 * mask
    make = {
        "near_sixty": lambda: 60.0 + 0.01 * noise,
        "six_decades": lambda: 10.0 ** (noise - 3),
        "both_signs": lambda: noise,
        "clipped": lambda: np.clip(noise, 0.0, 2.0),  # most pixels tie at an end
    }
    got = accumulate([(make[name]().astype(np.float32), mask)]).compute()
    assert max(got.auroc_bound, got.aupro_bound) < 1e-5
    assert max(got.ap_bound, got.f1max_bound) < 1e-4


def test_memory_stays_bounded_with_large_images() -> None:
    # Eight maps of other magnitudes open all the pages that 100 of them (400 MB) would; the second
    # round shows that nothing is kept per image.
    rng = np.random.default_rng(8)
    noise = rng.random((1024, 1024), dtype=np.float32)
    mask = noise > 0.7
    mask[:, 5:] = False
    metrics = PixelMetrics()
    held_mib = []
    tracemalloc.start()
    try:
        for i in range(16):
            anomaly_map = noise * np.float32(10.0 ** (i % 8 - 4)) * np.float32((-1) ** i)
            metrics.add(anomaly_map, mask if i % 2 else None)
            del anomaly_map
            held_mib.append(tracemalloc.get_traced_memory()[0] / 2**20)
        metrics.compute()
        peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert max(held_mib) < 64  # 56 MiB of bins, one table of prefixes
    assert held_mib[15] - held_mib[7] < 0.1
    assert peak_mib < 250


MAP = np.zeros((4, 6), np.float32)
MASK = np.zeros((4, 6), bool)


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "message"),
    [
        (MAP.astype(np.float64), None, r"expected float32 \[H, W\], got float64 \[4, 6\]"),
        (MAP[None], None, r"got float32 \[1, 4, 6\]; pass one map at a time"),
        (MAP, MASK.T, r"gt_mask: expected bool \[4, 6\] like the map, got bool \[6, 4\]"),
        (MAP, MASK.astype(np.uint8), r"got uint8 \[4, 6\]; compare with `mask > 0`"),
        (np.where(np.eye(4, 6), np.nan, MAP).astype(np.float32), None, "got 4 NaN or infinite"),
        (np.full((4, 6), np.inf, np.float32), MASK, "got 24 NaN or infinite of 24"),
    ],
    ids=["float64", "batch", "shape", "mask_dtype", "nan", "infinite"],
)
def test_add_refuses_and_adds_nothing(
    anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_] | None, message: str
) -> None:
    metrics = PixelMetrics()
    with pytest.raises(InputError, match=message):
        metrics.add(anomaly_map, mask)
    assert metrics.compute().normal_count == 0


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, float("nan")])
def test_compute_refuses_a_limit_outside_its_range(limit: float) -> None:
    with pytest.raises(InputError, match=r"fpr_limit: expected a rate in \(0, 1\]"):
        PixelMetrics().compute(fpr_limit=limit)


@pytest.mark.parametrize(
    ("score", "label", "message"),
    [
        (np.zeros(3), np.zeros(3, int), "expected float and bool, got float64 and int64"),
        (np.zeros(3, int), np.zeros(3, bool), "expected float and bool, got int64 and bool"),
        (np.zeros(3), np.zeros(4, bool), r"expected \[N\] and \[N\], got \[3\] and \[4\]"),
        (np.array([0.0, np.nan]), np.zeros(2, bool), "got 1 NaN or infinite of 2"),
    ],
    ids=["label_dtype", "score_dtype", "length", "nan"],
)
def test_image_scores_refuses(
    score: NDArray[np.float64], label: NDArray[np.bool_], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        image_scores(score, label)
