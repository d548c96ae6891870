"""Registration of ``fastad::anomaly_map``: schema, fake, one implementation per device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastad.ops.anomaly_map import reference
from fastad.ops.anomaly_map.reference import Distance, Refine
from fastad.ops.check import (
    refuse_gradient,
    require,
    why_unsupported_dtype,
    why_unsupported_launch,
    why_unsupported_strides,
)

NAME = "fastad::anomaly_map"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_LEVEL_SIDE = 4095  # sizes reach the kernel packed, 12 bits each

torch.library.define(
    NAME,
    "(str distance, Tensor[] feat, Tensor[] feat_hat, Tensor map_h, Tensor map_w, Tensor pooled_h, "
    "Tensor pooled_w, float[] refine) -> (Tensor, Tensor)",
)


def why_unsupported(feat: list[Tensor], feat_hat: list[Tensor]) -> str | None:
    """Why the CUDA kernels cannot serve these checked arguments; None when they can."""
    for name, levels in {"feat": feat, "feat_hat": feat_hat}.items():
        for i, level in enumerate(levels):
            H, W = level.shape[2:]
            if H > 1 and W > 1 and level.stride(2) != W * level.stride(3):
                return (
                    f"{name}[{i}]: rows must follow each other, got strides {level.stride()}; "
                    "use .contiguous()"
                )
            if max(H, W) > MAX_LEVEL_SIDE:
                return (
                    f"{name}[{i}]: the CUDA kernel takes sides up to {MAX_LEVEL_SIDE}, got {H, W}"
                )
            if reason := why_unsupported_strides(f"{name}[{i}]", level):
                return reason
    return why_unsupported_launch("feat", images=feat[0].shape[0]) or why_unsupported_dtype(
        "feat", feat[0], KERNEL_DTYPES
    )


def _anywhere(
    distance: str,
    feat: list[Tensor],
    feat_hat: list[Tensor],
    map_h: Tensor,
    map_w: Tensor,
    pooled_h: Tensor,
    pooled_w: Tensor,
    refine: list[float],
) -> tuple[Tensor, Tensor]:
    return reference.anomaly_map(
        cast(Distance, distance), feat, feat_hat, map_h, map_w, pooled_h, pooled_w,
        cast(Refine, tuple(refine)),
    )  # fmt: skip


def _cuda(
    distance: str,
    feat: list[Tensor],
    feat_hat: list[Tensor],
    map_h: Tensor,
    map_w: Tensor,
    pooled_h: Tensor,
    pooled_w: Tensor,
    refine: list[float],
) -> tuple[Tensor, Tensor]:
    require(why_unsupported(feat, feat_hat))
    # Imported by the first call that needs it: no machine without CUDA pays for triton.
    from fastad.ops.anomaly_map import triton_impl

    out = _fake(distance, feat, feat_hat, map_h, map_w, pooled_h, pooled_w, refine)
    triton_impl.anomaly_map(
        cast(Distance, distance), feat, feat_hat, map_h, map_w, pooled_h, pooled_w,
        cast(Refine, tuple(refine)), out,
    )  # fmt: skip
    return out


def _fake(
    distance: str,
    feat: list[Tensor],
    feat_hat: list[Tensor],
    map_h: Tensor,
    map_w: Tensor,
    pooled_h: Tensor,
    pooled_w: Tensor,
    refine: list[float],
) -> tuple[Tensor, Tensor]:
    B = feat[0].shape[0]
    dtype = torch.promote_types(feat[0].dtype, torch.float32)
    size = (B, map_h.shape[0], map_w.shape[0])
    return feat[0].new_empty(size, dtype=dtype), feat[0].new_empty((B,), dtype=dtype)


torch.library.impl(NAME, "CompositeExplicitAutograd")(_anywhere)
torch.library.impl(NAME, "CUDA")(_cuda)
torch.library.register_fake(NAME)(_fake)
torch.library.register_autograd(NAME, refuse_gradient)
