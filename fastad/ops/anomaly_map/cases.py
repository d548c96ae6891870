"""Arguments, tolerances and compiled variants that tests and bench share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastad.ops.anomaly_map.matrices import bilinear_matrix, gaussian_matrix, mean_pool_matrix
from fastad.ops.anomaly_map.reference import GRAD_REFINE, Distance
from fastad.ops.anomaly_map.reference import anomaly_map as judge
from fastad.ops.case import Aot, Arguments, Case, seeded

__all__ = ["BENCH", "CASES", "TOLERANCE", "aot", "call_op", "empty", "judge", "kernel"]

# dtype of the features: (rtol, atol); all sums and results are float32 whatever it is, so rounding
# is that of up to 1000 terms: 16 ulp of the distance, and of a cosine near 1.
TOLERANCE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (2e-6, 4e-6))
INTERPRETED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _case(
    name: str,
    distance: Distance,
    B: int,
    levels: list[tuple[int, int, int]],
    size: tuple[int, int],
    *,
    blur: bool = False,
    pool: int | None = None,
    channels_last: bool = False,
    negative: bool = False,
    interpreted: bool = True,
) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = seeded(name)

        def features(near: list[Tensor] | None = None) -> list[Tensor]:
            made = []
            for i, shape in enumerate(levels):
                t = torch.randn(B, *shape, generator=random)
                if near is not None:  # from equal to opposite, so that the whole range is met
                    t = near[i].float() * torch.linspace(-1, 1, shape[2]) + 0.3 * t
                kept = torch.channels_last if channels_last else torch.contiguous_format
                made.append(t.to(dtype).contiguous(memory_format=kept))
            return made

        def matrices(axis: int, window: int | None) -> Tensor:
            n = size[axis]
            parts = [
                torch.from_numpy(bilinear_matrix(n, level[1 + axis], align_corners=True))
                for level in levels
            ]
            joined = torch.cat(parts, 1)
            if blur:
                joined = torch.from_numpy(gaussian_matrix(n, 4.0)) @ joined
            if window is not None:
                joined = torch.from_numpy(mean_pool_matrix(n, window)) @ joined
            # A map below 0 shows a maximum that starts at 0.
            return -joined.float() if negative and axis == 0 else joined.float()

        feat = features()
        map_h, map_w = matrices(0, None), matrices(1, None)
        return {
            "distance": distance,
            "feat": feat,
            "feat_hat": features(feat),
            "map_h": map_h,
            "map_w": map_w,
            "pooled_h": map_h if pool is None else matrices(0, pool),
            "pooled_w": map_w if pool is None else matrices(1, pool),
            "refine": (1.3, 0.3, 0.7),
        }

    return Case(name, make, interpreted)


CASES = [
    _case("uniad", "l2", 2, [(272, 14, 14)], (56, 56), pool=4),
    _case("rd4ad", "cosine", 2, [(16, 20, 20), (40, 10, 10), (70, 5, 5)], (64, 64), blur=True),
    _case("grad", "refined", 2, [(30, 7, 9)], (40, 33), pool=8),
    _case("one pixel", "l2", 1, [(1, 1, 1)], (1, 1)),
    _case("channels last", "cosine", 3, [(37, 6, 5)], (19, 23), channels_last=True),
    _case("negative map", "l2", 2, [(9, 6, 5)], (19, 23), pool=3, negative=True),
    _case("large", "cosine", 8, [(256, 64, 64), (512, 32, 32), (1024, 16, 16)], (256, 256),
          blur=True, interpreted=False),
]  # fmt: skip

BENCH = [
    case
    for B in (1, 8, 64)
    for case in (
        _case(f"uniad B{B}", "l2", B, [(272, 14, 14)], (224, 224), pool=16, interpreted=False),
        _case(
            f"rd4ad B{B}", "cosine", B, [(256, 64, 64), (512, 32, 32), (1024, 16, 16)], (256, 256),
            blur=True, interpreted=False,
        ),
        _case(f"grad B{B}", "refined", B, [(272, 28, 28)], (224, 224), pool=32, interpreted=False),
    )
]  # fmt: skip


def empty(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Output buffers for `kernel`."""
    B, device = arguments["feat"][0].shape[0], arguments["map_h"].device
    size = (B, arguments["map_h"].shape[0], arguments["map_w"].shape[0])
    return torch.empty(size, device=device), torch.empty(B, device=device)


def kernel(out: tuple[Tensor, Tensor], **arguments: Any) -> None:
    """The CUDA kernels, interpreted or not; imports triton."""
    from fastad.ops.anomaly_map import triton_impl

    triton_impl.anomaly_map(out=out, **arguments)


def call_op(**arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and its positional arguments."""
    arguments["refine"] = list(arguments["refine"])
    return torch.ops.fastad.anomaly_map.default, tuple(arguments.values())


def aot() -> list[Aot]:
    """Variants to compile ahead of time, with the kernels' own settings; imports triton."""
    from fastad.ops.anomaly_map import triton_impl

    feature_strides = ("s_fb", "s_fc", "s_gb", "s_gc")
    variants = []
    elements: dict[Distance, str] = {"l2": "fp16", "cosine": "fp32", "refined": "bf16"}
    for distance, element in elements.items():
        pointers = {"f_ptr": f"*{element}", "g_ptr": f"*{element}", "d_ptr": "*fp32"}
        types = pointers | dict.fromkeys(("C", "P", *feature_strides, "s_db"), "i32")
        constants = triton_impl.distance_constants(distance, GRAD_REFINE, True)
        variants.append(
            Aot(f"distance {distance} {element}", "distance_kernel", types,
                constants | {"s_fp": 1, "s_gp": 1}, max_registers=96,
                unaligned=frozenset({"P", "s_fb", "s_fc", "s_gb", "s_gc", "s_db"}))
        )  # fmt: skip
    pointers = dict.fromkeys(("d_ptr", "rows_ptr", "columns_ptr", "map_ptr", "score_ptr"), "*fp32")
    scalars = ("n_h", "n_w", "s_db", "s_rows", "s_columns")
    constants = triton_impl.head_constants([64, 32, 16], [64, 32, 16], True, True)
    variants.append(
        Aot("head of three levels", "head_kernel", pointers | dict.fromkeys(scalars, "i32"),
            constants, max_registers=128, unaligned=frozenset({"s_db"}))
    )  # fmt: skip
    return variants
