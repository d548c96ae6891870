"""CUDA kernel: map to original size and mask in one launch, with the arithmetic of the CPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-untyped-call"
# Kernels are Triton's dialect, which has no types.

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastad.ops.postprocess.reference import float32_floor


@triton.jit
def postprocess_kernel(
    map_ptr, first_h_ptr, weight_h_ptr, first_w_ptr, weight_w_ptr, floor_ptr, h, w, H, W,
    out_ptr, mask_ptr, RESIZE: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image, output row and BLOCK columns; map float32 [B, h, w]."""
    i_b = tl.program_id(2).to(tl.int64)
    i_y = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < W
    map_ptr += i_b * h * w
    if RESIZE:
        y0 = tl.load(first_h_ptr + i_y)
        y1 = tl.minimum(y0 + 1, h - 1)
        weight_y = tl.load(weight_h_ptr + i_y)
        x0 = tl.load(first_w_ptr + o_x, mask=m_x, other=0)
        x1 = tl.minimum(x0 + 1, w - 1)
        weight_x = tl.load(weight_w_ptr + o_x, mask=m_x, other=0.0)
        upper0 = tl.load(map_ptr + y0 * w + x0, mask=m_x, other=0.0)
        upper1 = tl.load(map_ptr + y0 * w + x1, mask=m_x, other=0.0)
        lower0 = tl.load(map_ptr + y1 * w + x0, mask=m_x, other=0.0)
        lower1 = tl.load(map_ptr + y1 * w + x1, mask=m_x, other=0.0)
        upper = (1.0 - weight_x) * upper0 + weight_x * upper1
        lower = (1.0 - weight_x) * lower0 + weight_x * lower1
        value = (1.0 - weight_y) * upper + weight_y * lower
    else:
        value = tl.load(map_ptr + i_y * w + o_x, mask=m_x, other=0.0)
    o_out = (i_b * H + i_y) * W + o_x
    tl.store(out_ptr + o_out, value, mask=m_x)
    if MASK:
        tl.store(mask_ptr + o_out, (value > tl.load(floor_ptr)).to(tl.uint8), mask=m_x)


@lru_cache(maxsize=32)
def _tables(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower source position, int32, and weight of the upper one, float32, both [n_out]."""
    at = np.maximum((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0.0)
    first = np.minimum(at.astype(np.int64), n_in - 1)
    weight = torch.from_numpy((at - first).astype(np.float32))
    return torch.from_numpy(first.astype(np.int32)).to(device), weight.to(device)


@lru_cache(maxsize=32)
def _floor(threshold: float, device: torch.device) -> Tensor:
    return torch.tensor([float32_floor(threshold)], dtype=torch.float32, device=device)


def postprocess(anomaly_map: Tensor, threshold: float | None, out: tuple[Tensor, Tensor]) -> None:
    """Fill ``out``, map and mask, for arguments the kernel takes."""
    resized, mask = out
    B, h, w = anomaly_map.shape
    H, W = resized.shape[1:]
    if resized.numel() == 0:
        return
    device = anomaly_map.device
    with torch.cuda.device_of(anomaly_map):
        postprocess_kernel[(triton.cdiv(W, 256), H, B)](
            anomaly_map, *_tables(h, H, device), *_tables(w, W, device),
            _floor(0.0 if threshold is None else threshold, device), h, w, H, W,
            resized, mask.view(torch.uint8),
            RESIZE=(h, w) != (H, W), MASK=threshold is not None, BLOCK=256, num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where the CPU rounds twice
        )  # fmt: skip
