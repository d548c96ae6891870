"""CUDA kernel: both passes of the resize, channel swap, normalisation and layout in one launch."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-untyped-call"
# Kernels are Triton's dialect, which has no types.

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastad.ops.preprocess import reference
from fastad.ops.preprocess.reference import Triple

PRECISION_BITS = tl.constexpr(reference.PRECISION_BITS)
HALF = tl.constexpr(reference.HALF)


@triton.jit
def _by_channel(o_c, red, green, blue):
    return tl.where(o_c == 0, red, tl.where(o_c == 1, green, blue))


@triton.jit
def preprocess_kernel(
    images_ptr, first_h_ptr, weights_h_ptr, first_w_ptr, weights_w_ptr,
    H, W, h, w, taps_h, taps_w, out_ptr,
    SWAP: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE_R: tl.constexpr, SCALE_G: tl.constexpr, SCALE_B: tl.constexpr,
    SHIFT_R: tl.constexpr, SHIFT_G: tl.constexpr, SHIFT_B: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image, output row and BLOCK output columns; images uint8 [B, H, W, 3].

    Rows that neighbouring outputs share are resized again by each: a row in memory and a second
    launch would cost more than the two multiplications a shared row takes.
    """
    i_b = tl.program_id(2).to(tl.int64)
    i_y = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_c = tl.arange(0, 4)
    m_x = o_x < w
    m_xc = m_x[:, None] & (o_c < 3)[None, :]
    images_ptr += i_b * H * W * 3
    first_x = tl.load(first_w_ptr + o_x, mask=m_x, other=0)
    first_y = tl.load(first_h_ptr + i_y)
    acc = tl.full([BLOCK, 4], HALF, tl.int32)
    for tap_h in range(0, taps_h):
        weight_h = tl.load(weights_h_ptr + i_y * taps_h + tap_h)
        # Behind the last row the weight is 0; the address stays inside.
        row_ptr = images_ptr + tl.minimum(first_y + tap_h, H - 1).to(tl.int64) * W * 3
        row = tl.full([BLOCK, 4], HALF, tl.int32)
        for tap_w in range(0, taps_w):
            weight_w = tl.load(weights_w_ptr + o_x * taps_w + tap_w, mask=m_x, other=0)
            at = tl.minimum(first_x + tap_w, W - 1)
            pixel = tl.load(row_ptr + at[:, None] * 3 + o_c[None, :], mask=m_xc, other=0)
            row += pixel.to(tl.int32) * weight_w[:, None]
        row = tl.minimum(tl.maximum(row >> PRECISION_BITS, 0), 255)  # 8 bits between the passes
        acc += row * weight_h
    value = tl.minimum(tl.maximum(acc >> PRECISION_BITS, 0), 255)
    o_to = 2 - o_c if SWAP else o_c
    if NORMALISE:
        scale = _by_channel(o_to, SCALE_R, SCALE_G, SCALE_B)
        shift = _by_channel(o_to, SHIFT_R, SHIFT_G, SHIFT_B)
        result = value.to(tl.float32) * scale[None, :] + shift[None, :]
        o_out = ((i_b * 3 + o_to[None, :]) * h + i_y) * w + o_x[:, None]
        tl.store(out_ptr + o_out, result.to(out_ptr.dtype.element_ty), mask=m_xc)
    else:
        o_out = ((i_b * h + i_y) * w + o_x[:, None]) * 3 + o_to[None, :]
        tl.store(out_ptr + o_out, value.to(tl.uint8), mask=m_xc)


@lru_cache(maxsize=32)
def _tables(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device, so that a camera's frames copy nothing but pixels."""
    first, weights = reference.resize_weights(n_in, n_out)
    return torch.from_numpy(first).to(device), torch.from_numpy(weights).to(device)


def constants(mean: Triple | None, std: Triple | None, swap: bool) -> dict[str, bool | float | int]:
    """Compile-time arguments of the kernel."""
    normalise = mean is not None and std is not None
    scale, shift = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    if mean is not None and std is not None:
        scale, shift = reference.normalisation(mean, std)
    named = {f"SCALE_{c}": s for c, s in zip("RGB", scale, strict=True)}
    named |= {f"SHIFT_{c}": s for c, s in zip("RGB", shift, strict=True)}
    return {"SWAP": swap, "NORMALISE": normalise, "BLOCK": 64} | named


def preprocess(
    images: Tensor, mean: Triple | None, std: Triple | None, swap_red_blue: bool, out: Tensor
) -> None:
    """Fill ``out`` for arguments the kernel takes."""
    B, H, W, _ = images.shape
    h, w = out.shape[2:] if mean is not None else out.shape[1:3]
    first_h, weights_h = _tables(H, h, images.device)
    first_w, weights_w = _tables(W, w, images.device)
    settings = constants(mean, std, swap_red_blue)
    if out.numel() == 0:
        return
    with torch.cuda.device_of(images):
        preprocess_kernel[(triton.cdiv(w, settings["BLOCK"]), h, B)](
            images, first_h, weights_h, first_w, weights_w,
            H, W, h, w, weights_h.shape[1], weights_w.shape[1], out,
            **settings, num_warps=4,
        )  # fmt: skip
