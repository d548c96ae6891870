"""Map resize, threshold, connected components and region measurements against plain references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch

from fastad import _native
from fastad.errors import InputError

SIZES = [  # (h, w), (H, W)
    ((64, 64), (256, 256)),
    ((64, 64), (717, 1201)),  # large enough to be split among threads
    ((17, 23), (40, 31)),
    ((30, 40), (7, 9)),  # no antialiasing when it shrinks
    ((5, 8), (5, 24)),  # one axis stays
    ((8, 5), (24, 5)),
    ((1, 1), (3, 4)),
    ((1, 6), (4, 1)),
]


def random_map(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(size, dtype=np.float32)


@pytest.mark.parametrize(("size", "to"), SIZES, ids=str)
def test_resize_map_equals_torch(size: tuple[int, int], to: tuple[int, int]):
    anomaly_map = random_map(size)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(anomaly_map).double()[None, None],
        size=to,
        mode="bilinear",
        align_corners=False,
    )
    # Values in 0..1: a weight and two interpolations, each rounded to float32 (2^-24 at 1.0).
    np.testing.assert_allclose(
        _native.resize_map(anomaly_map, to), expected[0, 0].numpy(), rtol=0, atol=4 * 2.0**-24
    )


def test_resize_map_to_its_own_size_keeps_every_bit():
    bits = np.random.default_rng(0).integers(0, 2**32, (33, 47), dtype=np.uint32)
    same = _native.resize_map(bits.view(np.float32), (33, 47))  # NaN payloads included
    np.testing.assert_array_equal(same.view(np.uint32), bits)


def test_resize_map_thread_count_changes_no_bit():
    before = _native.threads()
    results = []
    for count in (1, 3):
        _native.set_threads(count)
        results.append(_native.resize_map(random_map((64, 64)), (600, 800)))
    _native.set_threads(before)
    np.testing.assert_array_equal(*results)


def test_resize_map_reads_views():
    anomaly_map = random_map((40, 60))
    np.testing.assert_array_equal(
        _native.resize_map(anomaly_map[::2, 5:50].T, (70, 30)),
        _native.resize_map(np.ascontiguousarray(anomaly_map[::2, 5:50].T), (70, 30)),
    )


@pytest.mark.parametrize("threshold", [0.5, 0.1, -1.0, 2.0, math.inf, -math.inf])
def test_threshold_is_strict(threshold: float):
    anomaly_map = random_map((37, 41))
    anomaly_map[3, 5:9] = [threshold, -math.inf, math.inf, math.nan]
    expected = anomaly_map.astype(np.float64) > threshold
    mask = _native.threshold_mask(anomaly_map, threshold)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("step", [-1e-12, 0.0, 1e-12])
def test_threshold_is_not_rounded_to_float32(step: float):
    value = np.float32(0.3)
    mask = _native.threshold_mask(np.full((1, 1), value), float(value) + step)
    assert mask.item() == (step < 0)


def raster_labels(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """8-connected labels of SciPy, renumbered by each region's first pixel."""
    labels, count = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    seen = list(dict.fromkeys(labels[labels > 0].tolist()))
    number = np.zeros(count + 1, np.int32)
    number[seen] = np.arange(1, count + 1)
    return number[labels], count


MASKS = {
    **{
        f"random {density}": np.random.default_rng(7).random((61, 83)) < density
        for density in (0.02, 0.2, 0.4, 0.6, 0.97)
    },
    "empty": np.zeros((9, 11), bool),
    "full": np.ones((9, 11), bool),
    "one pixel": np.ones((1, 1), bool),
    "chessboard": np.indices((20, 21)).sum(0) % 2 == 0,
    "comb joined at the bottom": np.array([[1, 0, 1, 0, 1]] * 6 + [[1] * 5], bool),
    "spiral": np.array(
        [
            [1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 1],
            [1, 1, 1, 1, 1, 0, 1],
            [1, 0, 0, 0, 1, 0, 1],
            [1, 0, 1, 1, 1, 0, 1],
            [1, 0, 0, 0, 0, 0, 1],
            [1, 1, 1, 1, 1, 1, 1],
        ],
        bool,
    ),
    "corners only": np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1]], bool),
    "one row": np.random.default_rng(8).random((1, 100)) < 0.5,
    "one column": np.random.default_rng(9).random((100, 1)) < 0.5,
    "a view": (np.random.default_rng(10).random((50, 90)) < 0.4)[::2, ::-3],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_components_equal_scipy(mask: np.ndarray):
    labels, count = _native.connected_components(mask)
    expected, expected_count = raster_labels(mask)
    assert (count, labels.dtype) == (expected_count, np.int32)
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_region_stats_equal_a_plain_loop(mask: np.ndarray):
    anomaly_map = random_map(mask.shape, 3) - np.float32(0.5)
    labels, count = raster_labels(mask)
    stats = _native.region_stats(labels, count, anomaly_map)
    boxes, areas, peaks, means = [], [], [], []
    for label in range(1, count + 1):
        ys, xs = np.nonzero(labels == label)
        boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        areas.append(len(xs))
        peaks.append(anomaly_map[ys, xs].max())
        means.append(np.float32(math.fsum(anomaly_map[ys, xs].tolist()) / len(xs)))
    np.testing.assert_array_equal(stats.box, np.array(boxes, np.int32).reshape(-1, 4))
    np.testing.assert_array_equal(stats.area_px, np.array(areas, np.int64))
    np.testing.assert_array_equal(stats.peak, np.array(peaks, np.float32))
    # Sums in float64, so a mean is off by one float32 rounding at most; values within 0.5.
    np.testing.assert_allclose(stats.mean, np.array(means, np.float32), rtol=0, atol=2.0**-25)


def test_region_stats_of_an_absent_label_are_empty():
    labels = np.array([[0, 2, 2]], np.int32)
    stats = _native.region_stats(labels, 2, np.array([[5.0, 1.0, 3.0]], np.float32))
    assert stats.box.tolist() == [[0, 0, 0, 0], [1, 0, 3, 1]]
    assert stats.area_px.tolist() == [0, 2]
    np.testing.assert_array_equal(stats.peak, np.array([np.nan, 3.0], np.float32))
    np.testing.assert_array_equal(stats.mean, np.array([np.nan, 2.0], np.float32))


def test_region_stats_have_the_promised_types():
    stats = _native.region_stats(np.zeros((2, 3), np.int32), 0, random_map((2, 3)))
    shapes = [(part.dtype.name, part.shape) for part in stats]
    assert shapes == [
        ("int32", (0, 4)),
        ("int64", (0,)),
        ("float32", (0,)),
        ("float32", (0,)),
    ]


MAP = random_map((4, 5))
LABELS = np.zeros((4, 5), np.int32)
REFUSALS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "float64 map": (_native.resize_map, (MAP.astype(float), (2, 2)), "anomaly_map: .* got float64"),
    "3-D map": (_native.resize_map, (MAP[None], (2, 2)), r"expected float32 \[H, W\].*\[1, 4, 5\]"),
    "list": (_native.resize_map, ([[1.0]], (2, 2)), "anomaly_map: expected float32 .* got list"),
    "empty map": (_native.resize_map, (MAP[:0], (2, 2)), "anomaly_map: .* not empty"),
    "one side": (_native.resize_map, (MAP, 7), r"size: expected \(H, W\), two integers, got 7"),
    "zero side": (_native.resize_map, (MAP, (0, 7)), "size: expected sides of 1"),
    "float side": (_native.resize_map, (MAP, (2.5, 7)), r"size: expected \(H, W\), two integers"),
    "threshold map": (_native.threshold_mask, (LABELS, 0.5), "expected float32 .* got int32"),
    "NaN threshold": (_native.threshold_mask, (MAP, math.nan), "threshold: expected a number"),
    "uint8 mask": (
        _native.connected_components,
        (np.zeros((4, 5), np.uint8),),
        r"mask: expected bool \[H, W\], not empty, got uint8",
    ),
    "int64 labels": (
        _native.region_stats,
        (LABELS.astype(np.int64), 1, MAP),
        "labels: expected int32 .* got int64",
    ),
    "other shape": (
        _native.region_stats,
        (LABELS[:3], 1, MAP),
        "anomaly_map: expected the shape of labels",
    ),
    "label above count": (
        _native.region_stats,
        (LABELS + 3, 2, MAP),
        r"labels: expected values in 0..2, got 3..3",
    ),
    "negative label": (_native.region_stats, (LABELS - 1, 2, MAP), r"got -1..-1"),
    "negative count": (_native.region_stats, (LABELS, -1, MAP), "count: expected 0 or more"),
}


@pytest.mark.parametrize(
    ("function", "arguments", "message"), REFUSALS.values(), ids=REFUSALS.keys()
)
def test_rejects(function: Any, arguments: tuple[Any, ...], message: str):
    with pytest.raises(InputError, match=message):
        function(*arguments)
