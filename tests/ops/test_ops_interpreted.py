from __future__ import annotations

import importlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import ops_compare
import ops_interpreted
import pytest
from PIL import Image

from fastad.ops import OPS

CASES = [
    pytest.param(op, case.name, str(dtype).removeprefix("torch."))
    for op in OPS
    for cases in [importlib.import_module(f"fastad.ops.{op}.cases")]
    for case in cases.CASES
    if case.interpreted
    for dtype in cases.INTERPRETED_DTYPES
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_kernel_equals_reference(
    interpreter: ProcessPoolExecutor, op: str, case: str, dtype: str
) -> None:
    interpreter.submit(ops_compare.compare, op, case, dtype).result()


@pytest.mark.parametrize("size", [(8, 9), (50, 20), (7, 40)], ids=str)
def test_preprocess_equals_pillow(interpreter: ProcessPoolExecutor, size: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(-100, 355, (23, 31, 3)).clip(0, 255).astype(np.uint8)
    resized = interpreter.submit(ops_interpreted.preprocess, image, size).result()
    # Two calls: from version 13 on, Pillow picks the order of its passes; ours is columns first.
    columns = Image.fromarray(image).resize((size[1], 23), Image.Resampling.BILINEAR)
    expected = columns.resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized, np.asarray(expected))


@pytest.mark.parametrize("size", [(20, 31), (5, 300), (9, 10)], ids=str)
def test_postprocess_equals_the_cpu_bit_for_bit(
    interpreter: ProcessPoolExecutor, size: tuple[int, int]
) -> None:
    native = pytest.importorskip("fastad._native")
    anomaly_map = np.random.default_rng(4).random((9, 10), np.float32)
    threshold = float(anomaly_map.mean())
    resized, mask = interpreter.submit(
        ops_interpreted.postprocess, anomaly_map, size, threshold
    ).result()
    expected = native.resize_map(anomaly_map, size)
    np.testing.assert_array_equal(resized, expected)
    np.testing.assert_array_equal(mask, native.mask_above(anomaly_map, size, threshold))


def test_broken_features_never_look_normal(interpreter: ProcessPoolExecutor) -> None:
    scores = interpreter.submit(ops_interpreted.score_of_broken_features).result()
    assert scores[0] == np.inf  # the image with a NaN
    assert np.isfinite(scores[1])
