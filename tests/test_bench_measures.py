"""What the benches divide by and compare: operations, matrix products, memory, slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bench import fresh, matrix_peak, soak, timing
from bench.flops import flops
from fastad.engine.openvino import why_unsupported


def graph(nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], last: str) -> bytes:
    """ONNX bytes: uint8 [B, 8, 6, 3] cast and moved to ``x`` [B, 3, 8, 6], then ``nodes``."""
    head = [
        helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["x"], perm=[0, 3, 1, 2]),
    ]
    made = helper.make_graph(
        head + nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 8, 6, 3])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [
            helper.make_tensor(name, TensorProto.FLOAT, shape, np.ones(np.prod(shape)))
            for name, shape in weights.items()
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("node", "shape", "by_hand"),
    [
        # 8 x 6 pixels, 5 outputs of 3 inputs x 3 x 3
        (helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4), (5, 3, 3, 3), 48 * 5 * 27),
        # 4 x 3 pixels after stride 2
        (
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, strides=[2, 2]),
            (5, 3, 3, 3),
            12 * 5 * 27,
        ),
        # depthwise: 3 outputs of one input each
        (
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, group=3),
            (3, 1, 3, 3),
            48 * 3 * 9,
        ),
        # each of 3 x 48 inputs goes to 5 outputs x 2 x 2
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
            (3, 5, 2, 2),
            3 * 48 * 5 * 4,
        ),
        # [B, 3, 8, 6] x [6, 7]
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (6, 7), 3 * 8 * 7 * 6),
        # no products
        (helper.make_node("Mul", ["x", "w"], ["y"]), (1, 3, 8, 6), 0),
    ],
    ids=["conv", "stride", "depthwise", "transposed", "matmul", "mul"],
)
def test_operations_agree_with_counting_by_hand(
    node: onnx.NodeProto, shape: tuple[int, ...], by_hand: int, batch: int
) -> None:
    assert flops(graph([node], {"w": shape}, "y"), (8, 6), batch) == 2 * by_hand * batch


def test_operations_add_up_over_a_graph() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),  # [B, 4, 8, 6]
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["c", "t"], ["y"]),  # [B, 4, 8, 8]
    ]
    by_hand = 48 * 4 * 3 + 4 * 8 * 8 * 6
    assert flops(graph(nodes, {"w": (4, 3, 1, 1)}, "y"), (8, 6)) == 2 * by_hand


def test_uncounted_products_are_refused() -> None:
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="bchw,wk->bchk")
    with pytest.raises(ValueError, match="Einsum are not counted"):
        flops(graph([node], {"w": (6, 7)}, "y"), (8, 6))


def test_matrix_peak_covers_what_the_machine_has() -> None:
    rows = matrix_peak.measure((64,), 0.0)
    here = {p for p in matrix_peak.PRECISIONS if why_unsupported(p) is None}
    assert {row["precision"] for row in rows if row["by"] == "openvino"} == here
    assert {row["precision"] for row in rows if row["by"] == "torch"} == here - {"int8"}
    best = matrix_peak.best(rows)
    assert best["fp32"] == max(
        row["gflop_per_s"] * 1e9 for row in rows if row["precision"] == "fp32"
    )


def test_matrix_peak_leaves_out_what_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bf16(precision: str) -> str | None:
        return "no bfloat16" if precision == "bf16" else None

    monkeypatch.setattr(matrix_peak, "why_unsupported", without_bf16)
    assert not matrix_peak.calls("bf16", 64)
    assert set(matrix_peak.calls("fp32", 64)) == {"openvino", "torch"}


def test_product_is_the_product() -> None:
    product: Callable[[], Any] = matrix_peak.openvino_product("fp32", 32)
    rng = np.random.default_rng(0)
    right = rng.uniform(-1, 1, (32, 32)).astype(np.float32)
    left = rng.uniform(-1, 1, (32, 32)).astype(np.float32)
    found = next(iter(product().values()))
    np.testing.assert_allclose(found, left @ right, atol=1e-5)


def test_peak_memory_counts_what_was_freed() -> None:
    before = fresh.rss_bytes()
    held = np.ones(64 << 20, np.uint8)
    del held
    assert fresh.peak_bytes() >= before + (60 << 20)


def test_slope_is_that_of_the_line_behind_the_warm_up() -> None:
    samples = [
        {"frames": 1000 * i, "rss_bytes": 9_000_000 + 500 * i + (i < 2) * 5_000_000}
        for i in range(20)
    ]
    found = soak.growth(samples)
    assert found["bytes per 1000 frames"] == 500
    assert found["first MB"] == pytest.approx(9.001)
    assert found["last MB"] == pytest.approx(9.0095)


def test_soak_frames_change_and_repeat_from_their_seed() -> None:
    frames = list(soak.frames(60))
    assert len({frame.shape for frame in frames}) > 50
    assert {frame.ndim for frame in frames} == {2, 3}
    assert {str(frame.dtype) for frame in frames} == {"uint8", "float32"}
    assert {frame.flags.c_contiguous for frame in frames} == {True, False}
    low, high = soak.SIDES
    assert all(low <= side <= high for frame in frames for side in frame.shape[:2])
    again = soak.frames(60)
    assert all(np.array_equal(one, other) for one, other in zip(frames, again, strict=True))


def test_warm_up_ends_with_its_share_of_the_budget() -> None:
    calls: list[None] = []
    timings = timing.compare({"a": lambda: calls.append(None)}, rounds=9, warmup=50, budget_s=0.0)
    assert timings["a"].runs == 3
    assert len(calls) == 1 + 3


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (1, 1.0), (50, 2.0), (51, 3.0), (75, 3.0), (99, 4.0)]
)
def test_percentile_is_a_value_that_was_measured(percent: int, expected: float) -> None:
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], percent) == expected


def test_percentile_of_one_value_is_that_value() -> None:
    assert timing.percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(("soak", ""), "soak"), (("soak", "night"), "soak-night"), (("gpu", "grad", ""), "gpu-grad")],
)
def test_suite_leaves_out_empty_parts(parts: tuple[str, ...], expected: str) -> None:
    assert timing.suite(*parts) == expected
