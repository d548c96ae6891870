"""Map resize, what is above a threshold, and connected components against plain references."""

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
    mask = _native.mask_above(anomaly_map, (37, 41), threshold)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("step", [-1e-12, 0.0, 1e-12])
def test_threshold_is_not_rounded_to_float32(step: float):
    value = np.float32(0.3)
    mask = _native.mask_above(np.full((1, 1), value), (1, 1), float(value) + step)
    assert mask.item() == (step < 0)


# What a model gives: mostly low, a few hills. All of one sign, of both, wide, tiny, and broken.
KINDS = {
    "hills": lambda size: random_map(size) ** 8,
    "signs": lambda size: random_map(size) - np.float32(0.5),
    "negative": lambda size: -random_map(size) * np.float32(1e4),
    "tiny": lambda size: random_map(size) * np.float32(1e-40),
    "flat": lambda size: np.full(size, 0.3, np.float32),
    "flat and tiny": lambda size: np.full(size, 3 * 2.0**-149, np.float32),
    "broken": lambda size: np.where(random_map(size, 1) < 0.1, np.nan, random_map(size)),
    "infinite": lambda size: np.where(random_map(size, 2) < 0.1, np.inf, random_map(size)),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("counts", [True, False], ids=["all", "part"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "to"), [*SIZES, ((37, 41), (37, 41))], ids=str)
def test_what_is_above_is_that_of_the_resized_map(
    size: tuple[int, int], to: tuple[int, int], kind: str, counts: bool
):
    anomaly_map = KINDS[kind](size).astype(np.float32)
    resized = _native.resize_map(anomaly_map, to)
    counted = None if counts else random_map(to, 5) < 0.7
    finite = resized[np.isfinite(resized)]
    # A value that is there, and the floats beside it.
    levels = [
        q for at in (0.0, 0.5, 0.97, 1.0) for q in [np.quantile(finite, at, method="nearest")]
    ]
    for level in levels:
        for threshold in (level, np.nextafter(level, np.float32(-9)), np.nextafter(level, np.inf)):
            expected = resized.astype(np.float64) > float(threshold)
            expected &= True if counted is None else counted
            mask = _native.mask_above(anomaly_map, to, float(threshold), counted)
            np.testing.assert_array_equal(mask, expected)
            found = _native.regions_above(anomaly_map, to, float(threshold), counted)
            check_regions(found, expected, resized)


def test_a_map_that_is_below_everywhere_has_no_regions():
    found = _native.regions_above(random_map((64, 64)), (1080, 1920), 1.0)
    shapes = [(part.dtype.name, part.shape) for part in found]
    assert shapes == [
        ("int32", (0, 4)),
        ("int64", (0,)),
        ("float32", (0,)),
        ("float32", (0,)),
    ]


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


def check_regions(found: _native.Regions, mask: np.ndarray, anomaly_map: np.ndarray) -> None:
    """The regions of a mask, measured on a map of its size by SciPy."""
    labels, count = raster_labels(mask)
    slices = scipy.ndimage.find_objects(labels)
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in slices]
    np.testing.assert_array_equal(found.box, np.array(boxes, np.int32).reshape(-1, 4))
    parts = [anomaly_map[at][labels[at] == i] for i, at in enumerate(slices, 1)]
    np.testing.assert_array_equal(found.area_px, np.array([len(p) for p in parts], np.int64))
    np.testing.assert_array_equal(found.peak, np.array([p.max() for p in parts], np.float32))
    means = [np.float32(math.fsum(p.tolist()) / len(p)) for p in parts]
    # Sums in float64, so a mean is off by one float32 rounding at most.
    np.testing.assert_allclose(found.mean, np.array(means, np.float32), rtol=2.0**-23, atol=1e-45)
    assert len(found.area_px) == count


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_regions_of_every_shape(mask: np.ndarray):
    anomaly_map = np.where(mask, random_map(mask.shape, 3) + np.float32(0.5), np.float32(-1))
    found = _native.regions_above(anomaly_map, mask.shape, 0.0)
    check_regions(found, mask, anomaly_map)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_what_does_not_count_parts_regions(mask: np.ndarray):
    anomaly_map = random_map(mask.shape, 3) + np.float32(0.5)
    found = _native.regions_above(anomaly_map, mask.shape, 0.0, mask)
    check_regions(found, mask, anomaly_map)


MAP = random_map((4, 5))
COUNTED = np.ones((8, 9), bool)
REFUSALS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "float64 map": (_native.resize_map, (MAP.astype(float), (2, 2)), "anomaly_map: .* got float64"),
    "3-D map": (_native.resize_map, (MAP[None], (2, 2)), r"expected float32 \[H, W\].*\[1, 4, 5\]"),
    "list": (_native.resize_map, ([[1.0]], (2, 2)), "anomaly_map: expected float32 .* got list"),
    "empty map": (_native.resize_map, (MAP[:0], (2, 2)), "anomaly_map: .* not empty"),
    "one side": (_native.resize_map, (MAP, 7), r"size: expected \(H, W\), two integers, got 7"),
    "zero side": (_native.resize_map, (MAP, (0, 7)), "size: expected sides of 1"),
    "float side": (_native.resize_map, (MAP, (2.5, 7)), r"size: expected \(H, W\), two integers"),
    "int map": (
        _native.mask_above,
        (MAP.astype(int), (8, 9), 0.5),
        "expected float32 .* got int64",
    ),
    "no size": (_native.mask_above, (MAP, (8,), 0.5), r"size: expected \(H, W\), two integers"),
    "NaN threshold": (_native.mask_above, (MAP, (8, 9), math.nan), "threshold: expected a number"),
    "NaN for regions": (
        _native.regions_above,
        (MAP, (8, 9), math.nan),
        "threshold: expected a num",
    ),
    "uint8 counted": (
        _native.regions_above,
        (MAP, (8, 9), 0.5, COUNTED.astype(np.uint8)),
        r"counted: expected bool \[H, W\], not empty, got uint8",
    ),
    "counted of another size": (
        _native.mask_above,
        (MAP, (8, 9), 0.5, COUNTED[:7]),
        r"counted: expected bool \[8, 9\], got bool \[7, 9\]",
    ),
    "uint8 mask": (
        _native.connected_components,
        (np.zeros((4, 5), np.uint8),),
        r"mask: expected bool \[H, W\], not empty, got uint8",
    ),
}


@pytest.mark.parametrize(
    ("function", "arguments", "message"), REFUSALS.values(), ids=REFUSALS.keys()
)
def test_rejects(function: Any, arguments: tuple[Any, ...], message: str):
    with pytest.raises(InputError, match=message):
        function(*arguments)
