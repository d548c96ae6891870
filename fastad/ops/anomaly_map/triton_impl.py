"""CUDA kernels: features are read once for the distance; map and score come from its grid.

Every pixel of the map depends on every feature pixel, so the two steps are two launches; what lies
between them is the distance grid, a C-th of the features.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-untyped-call"
# Kernels are Triton's dialect, which has no types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastad.ops.anomaly_map.reference import EPS, Distance, Refine


@triton.jit
def distance_kernel(
    f_ptr, g_ptr, C, P, s_fb, s_fc, s_fp, s_gb, s_gc, s_gp, s_db, d_ptr,
    DISTANCE: tl.constexpr, EPS: tl.constexpr, MSE_THRESHOLD: tl.constexpr,
    MSE_WEIGHT: tl.constexpr, COSINE_WEIGHT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per image and BLOCK_P pixels; features [B, C, P] by strides, d [B, P]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    f_ptr += i_b * s_fb
    g_ptr += i_b * s_gb
    dot = tl.zeros([BLOCK_P], tl.float32)
    ff = tl.zeros([BLOCK_P], tl.float32)
    gg = tl.zeros([BLOCK_P], tl.float32)
    e2 = tl.zeros([BLOCK_P], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
        m_cp = (o_c < C)[:, None] & m_p[None, :]
        o_f = o_c[:, None] * s_fc + o_p.to(tl.int64)[None, :] * s_fp
        o_g = o_c[:, None] * s_gc + o_p.to(tl.int64)[None, :] * s_gp
        b_f = tl.load(f_ptr + o_f, mask=m_cp, other=0.0).to(tl.float32)
        b_g = tl.load(g_ptr + o_g, mask=m_cp, other=0.0).to(tl.float32)
        if DISTANCE != "cosine":
            e2 += tl.sum((b_f - b_g) * (b_f - b_g), 0)
        if DISTANCE != "l2":
            dot += tl.sum(b_f * b_g, 0)
            ff += tl.sum(b_f * b_f, 0)
            gg += tl.sum(b_g * b_g, 0)
    if DISTANCE == "l2":
        d = tl.sqrt(e2)
    else:
        cosine = dot / (tl.maximum(tl.sqrt(ff), EPS) * tl.maximum(tl.sqrt(gg), EPS))
        if DISTANCE == "cosine":
            d = 1.0 - cosine
        else:
            passes = tl.where(e2 / C <= MSE_THRESHOLD, MSE_WEIGHT, 0.0)
            d = tl.abs(1.0 - (passes + COSINE_WEIGHT * cosine)) * tl.sqrt(e2)
    tl.store(d_ptr + i_b * s_db + o_p, d, mask=m_p)


@triton.jit
def head_kernel(
    d_ptr, rows_ptr, columns_ptr, n_h, n_w, s_db, s_rows, s_columns, map_ptr, score_ptr,
    LEVELS: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr,
    STORE: tl.constexpr, SCORE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per tile of the map [B, n_h, n_w]: sum over levels of rows @ d @ columns.T.

    Stores the tile, or lets its maximum compete for the image's score, or both.
    """
    i_b = tl.program_id(2).to(tl.int64)
    o_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_k = tl.arange(0, BLOCK_K)
    m_i = (o_i < n_h)[:, None]
    m_j = (o_j < n_w)[None, :]
    d_ptr += i_b * s_db
    acc = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    first_h = 0
    first_w = 0
    for level in tl.static_range(LEVELS):
        H = (HEIGHTS >> (12 * level)) & 0xFFF
        W = (WIDTHS >> (12 * level)) & 0xFFF
        for w in range(0, W, BLOCK_K):
            m_w = (w + o_k) < W
            part = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
            for h in range(0, H, BLOCK_K):
                m_h = (h + o_k) < H
                o_rows = o_i[:, None] * s_rows + (first_h + h + o_k)[None, :]
                b_rows = tl.load(rows_ptr + o_rows, mask=m_i & m_h[None, :], other=0.0)
                o_d = (h + o_k)[:, None] * W + (w + o_k)[None, :]
                b_d = tl.load(d_ptr + o_d, mask=m_h[:, None] & m_w[None, :], other=0.0)
                part = tl.dot(b_rows, b_d, part, input_precision="ieee")
            o_columns = o_j[None, :] * s_columns + (first_w + w + o_k)[:, None]
            b_columns = tl.load(columns_ptr + o_columns, mask=m_w[:, None] & m_j, other=0.0)
            acc = tl.dot(part, b_columns, acc, input_precision="ieee")
        first_h += H
        first_w += W
        d_ptr += H * W
    if STORE:
        o_map = (i_b * n_h + o_i[:, None]) * n_w + o_j[None, :]
        tl.store(map_ptr + o_map, acc, mask=m_i & m_j)
    if SCORE:
        # A reduction may drop NaN, and a broken image must never look normal: NaN counts as inf.
        seen = tl.where(m_i & m_j, tl.where(acc == acc, acc, float("inf")), float("-inf"))
        tl.atomic_max(score_ptr + i_b, tl.max(tl.max(seen, 1), 0))


def pack(sizes: list[int]) -> int:
    """Level sizes, each below 4096, in one integer, because TensorRT passes no tuples."""
    return sum(n << (12 * i) for i, n in enumerate(sizes))


def distance_constants(distance: Distance, refine: Refine, pixels_fast: bool) -> dict[str, Any]:
    """Compile-time arguments of `distance_kernel`: whole cache lines along the dense axis."""
    names = ("MSE_THRESHOLD", "MSE_WEIGHT", "COSINE_WEIGHT")
    block_c, block_p = (16, 64) if pixels_fast else (128, 8)
    return dict(zip(names, map(float, refine), strict=True)) | {
        "DISTANCE": distance,
        "EPS": EPS,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
    }


def head_constants(
    heights: list[int], widths: list[int], store: bool, score: bool
) -> dict[str, Any]:
    """Compile-time arguments of `head_kernel`; tiles counted, not measured."""
    return {
        "LEVELS": len(heights), "HEIGHTS": pack(heights), "WIDTHS": pack(widths),
        "STORE": store, "SCORE": score, "BLOCK_I": 32, "BLOCK_J": 32, "BLOCK_K": 16,
    }  # fmt: skip


def anomaly_map(
    distance: Distance,
    feat: list[Tensor],
    feat_hat: list[Tensor],
    map_h: Tensor,
    map_w: Tensor,
    pooled_h: Tensor,
    pooled_w: Tensor,
    refine: Refine,
    out: tuple[Tensor, Tensor],
) -> None:
    """Fill ``out``, map [B, n_h, n_w] and score [B], float32, for arguments the kernels take."""
    to_map, score = out
    B = feat[0].shape[0]
    sizes = [f.shape[2] * f.shape[3] for f in feat]
    d = torch.empty(B, sum(sizes), device=score.device, dtype=torch.float32)
    score.fill_(float("-inf"))
    if B == 0:
        return
    with torch.cuda.device_of(score):
        start = 0
        for f, g, P in zip(feat, feat_hat, sizes, strict=True):
            constants = distance_constants(distance, refine, _strides(f)[2] == 1)
            distance_kernel[(triton.cdiv(P, constants["BLOCK_P"]), B)](
                f, g, f.shape[1], P, *_strides(f), *_strides(g), d.stride(0), d[:, start:],
                **constants, num_warps=4,
            )  # fmt: skip
            start += P
        # Without pooling of its own the score is the maximum of the map, in the same launch.
        same = _is(pooled_h, map_h) and _is(pooled_w, map_w)
        _head(d, feat, map_h, map_w, to_map, score, store=True, score_too=same)
        if not same:
            _head(d, feat, pooled_h, pooled_w, to_map, score, store=False, score_too=True)


def _strides(level: Tensor) -> tuple[int, int, int]:
    """Of [B, C, P] seen through [B, C, H, W]; an axis of one element has no stride to trust."""
    return level.stride(0), level.stride(1), level.stride(3 if level.shape[3] > 1 else 2)


def _is(a: Tensor, b: Tensor) -> bool:
    # Not by identity: a dispatcher may wrap the same memory twice.
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _head(
    d: Tensor,
    feat: list[Tensor],
    rows: Tensor,
    columns: Tensor,
    to_map: Tensor,
    score: Tensor,
    *,
    store: bool,
    score_too: bool,
) -> None:
    rows, columns = rows.contiguous(), columns.contiguous()
    n_h, n_w = rows.shape[0], columns.shape[0]
    heights, widths = [f.shape[2] for f in feat], [f.shape[3] for f in feat]
    constants = head_constants(heights, widths, store, score_too)
    tiles = (triton.cdiv(n_h, constants["BLOCK_I"]), triton.cdiv(n_w, constants["BLOCK_J"]))
    head_kernel[(*tiles, d.shape[0])](
        d, rows, columns, n_h, n_w, d.stride(0), rows.stride(0), columns.stride(0), to_map, score,
        **constants, num_warps=4,
    )  # fmt: skip
