"""Arguments, tolerances and compiled variants that tests and bench share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastad.ops.case import Aot, Arguments, Case, seeded
from fastad.ops.postprocess import op
from fastad.ops.postprocess.reference import postprocess as judge

__all__ = ["BENCH", "CASES", "TOLERANCE", "aot", "call_op", "empty", "judge", "kernel"]

# Means of values in [0, 1]: 4 ulp at 1.0. Masks are compared bit for bit.
TOLERANCE = {torch.float32: (0.0, 5e-7)}
INTERPRETED_DTYPES = (torch.float32,)


def _case(
    name: str,
    B: int,
    source: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None = 0.45,
    *,
    interpreted: bool = True,
) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        values = torch.rand(B, *source, generator=seeded(name), dtype=dtype)
        return {"anomaly_map": values, "size": size, "threshold": threshold}

    return Case(name, make, interpreted)


CASES = [
    _case("grow", 2, (7, 9), (20, 31)),
    _case("shrink", 1, (20, 31), (6, 8)),
    _case("same size", 2, (9, 10), (9, 10)),
    _case("no threshold", 1, (4, 5), (9, 300), None),
    _case("one pixel", 1, (1, 1), (3, 2)),
    _case("camera", 2, (224, 224), (1200, 1600), interpreted=False),
]

BENCH = [
    _case(f"224 to {h}x{w} B{B}", B, (224, 224), (h, w), interpreted=False)
    for h, w in ((900, 900), (1200, 1920), (3000, 4096))
    for B in (1, 8)
]


def empty(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Output buffers for `kernel`."""
    return op.empty_output(arguments["anomaly_map"], arguments["size"], arguments["threshold"])


def kernel(out: tuple[Tensor, Tensor], **arguments: Any) -> None:
    """The CUDA kernel, interpreted or not; imports triton."""
    from fastad.ops.postprocess import triton_impl

    triton_impl.postprocess(arguments["anomaly_map"], arguments["threshold"], out)


def call_op(**arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and its positional arguments."""
    return torch.ops.fastad.postprocess.default, tuple(arguments.values())


def aot() -> list[Aot]:
    """Variants to compile ahead of time."""
    return [
        Aot(
            name="postprocess",
            kernel="postprocess_kernel",
            types={
                "map_ptr": "*fp32", "first_h_ptr": "*i32", "weight_h_ptr": "*fp32",
                "first_w_ptr": "*i32", "weight_w_ptr": "*fp32", "floor_ptr": "*fp32",
                "h": "i32", "w": "i32", "H": "i32", "W": "i32",
                "out_ptr": "*fp32", "mask_ptr": "*u8",
            },
            constants={"RESIZE": True, "MASK": True, "BLOCK": 256},
            max_registers=48,
            unaligned=frozenset("hwHW"),
        )
    ]  # fmt: skip
