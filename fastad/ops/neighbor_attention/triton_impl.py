"""CUDA kernel: one pass over keys and values, softmax kept online, no score leaves registers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-untyped-call"
# Kernels are Triton's dialect, which has no types.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastad.ops.aot import SHARED_LIMIT_BYTES

EXCLUDED = tl.constexpr(-1e30)  # finite: rows that see nothing in a tile stay free of NaN


@triton.jit
def _attend(
    acc, top, total, b_q, o_m, k_ptr, v_ptr, k_position_ptr,
    start, tiles, gap_at, gap, N, s_kn, s_vn, s_kpn,
    D: tl.constexpr, W: tl.constexpr, RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, HAS_K_POS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take key tiles from ``start`` on into the running softmax, jumping ``gap`` at ``gap_at``."""
    o_d = tl.arange(0, BLOCK_D)
    for i_tile in range(0, tiles):
        n = start + i_tile * BLOCK_N
        n += tl.where(n >= gap_at, gap, 0)
        o_n = n + tl.arange(0, BLOCK_N)
        m_nd = (o_n < N)[:, None] & (o_d < D)[None, :]
        o_n64 = o_n.to(tl.int64)
        b_k = tl.load(k_ptr + o_n64[:, None] * s_kn + o_d[None, :], mask=m_nd, other=0.0)
        if HAS_K_POS:
            o_p = o_n64[:, None] * s_kpn + o_d[None, :]
            b_k += tl.load(k_position_ptr + o_p, mask=m_nd, other=0.0)
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * SCALE
        if MASKED:
            hidden = (o_n >= N)[None, :]
            if RADIUS_H >= 0:
                away_h = tl.abs((o_m // W)[:, None] - (o_n // W)[None, :])
                away_w = tl.abs((o_m % W)[:, None] - (o_n % W)[None, :])
                hidden = hidden | ((away_h <= RADIUS_H) & (away_w <= RADIUS_W))
            score = tl.where(hidden, EXCLUDED, score)
        new_top = tl.maximum(top, tl.max(score, 1))
        # Weights of a row that saw only hidden keys are 1 here; the first visible key makes
        # ``fade`` 0 and wipes them out.
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        b_v = tl.load(v_ptr + o_n64[:, None] * s_vn + o_d[None, :], mask=m_nd, other=0.0)
        acc = tl.dot(weight.to(b_v.dtype), b_v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def neighbor_attention_kernel(
    q_ptr, k_ptr, v_ptr, q_position_ptr, k_position_ptr, heads, N,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on,
    s_qph, s_qpn, s_kph, s_kpn,
    out_ptr,
    D: tl.constexpr, W: tl.constexpr, RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
    HAS_Q_POS: tl.constexpr, HAS_K_POS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per image, head and BLOCK_M queries; tensors [B, heads, N, D] by strides.

    Positions are [heads, N, D]; the pointer of an absent one is never read.
    """
    tiles = tl.cdiv(N, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_M
    i_b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    i_h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_md = (o_m < N)[:, None] & (o_d < D)[None, :]
    o_q = i_b * s_qb + i_h * s_qh + o_m.to(tl.int64)[:, None] * s_qn + o_d[None, :]
    b_q = tl.load(q_ptr + o_q, mask=m_md, other=0.0)
    if HAS_Q_POS:
        o_p = i_h * s_qph + o_m.to(tl.int64)[:, None] * s_qpn + o_d[None, :]
        b_q += tl.load(q_position_ptr + o_p, mask=m_md, other=0.0)
    k_position_ptr += i_h * s_kph
    k_ptr += i_b * s_kb + i_h * s_kh
    v_ptr += i_b * s_vb + i_h * s_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], EXCLUDED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # Keys of the grid rows that the windows of this tile reach; all others need no mask.
    band_start = first // W - RADIUS_H
    band_stop = (tl.minimum(first + BLOCK_M, N) - 1) // W + RADIUS_H + 1
    whole = N // BLOCK_N * BLOCK_N
    lower = tl.minimum(tl.maximum(band_start * W, 0) // BLOCK_N * BLOCK_N, whole)
    upper = tl.minimum(tl.cdiv(band_stop * W, BLOCK_N) * BLOCK_N, whole)
    if RADIUS_H < 0:  # no window
        lower = whole
        upper = whole
    # Without mask: [0, lower) and [upper, whole). With: [lower, upper) and the ragged last tile.
    acc, top, total = _attend(
        acc, top, total, b_q, o_m, k_ptr, v_ptr, k_position_ptr,
        0, (lower + whole - upper) // BLOCK_N, lower, upper - lower, N, s_kn, s_vn, s_kpn,
        D, W, RADIUS_H, RADIUS_W, SCALE, PRECISION, HAS_K_POS, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, b_q, o_m, k_ptr, v_ptr, k_position_ptr,
        lower, tl.cdiv(upper - lower + N - whole, BLOCK_N), upper, whole - upper,
        N, s_kn, s_vn, s_kpn,
        D, W, RADIUS_H, RADIUS_W, SCALE, PRECISION, HAS_K_POS, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    sees = top > 0.5 * EXCLUDED
    result = tl.where(sees[:, None], acc / total[:, None], 0.0)
    o_o = i_b * s_ob + i_h * s_oh + o_m.to(tl.int64)[:, None] * s_on + o_d[None, :]
    tl.store(out_ptr + o_o, result.to(out_ptr.dtype.element_ty), mask=m_md)


def tile_sizes(programs_of_16: int, D: int, itemsize: int, processors: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps).

    Counted, not measured: the tallest tile that still gives every multiprocessor two programs.
    """
    row_bytes = max(16, D) * itemsize
    heights = (64, 32) if row_bytes <= 128 else (32,) if row_bytes <= 256 else ()
    rows = next((m for m in heights if programs_of_16 * 16 // m >= 2 * processors), 16)
    return rows, tile_keys(D, itemsize), 4 if rows == 64 else 2


def tile_keys(D: int, itemsize: int) -> int:
    """BLOCK_N; float32 needs registers for the parts of its three products."""
    return (64 if D <= 64 else 32) if itemsize == 2 else (32 if D <= 32 else 16)


def stages(D: int, itemsize: int, has_k_position: bool) -> int:
    """Steps of the software pipeline: one where two would not fit into shared memory.

    Counted as keys, values and positions of each step; what layouts need comes on top (2 KiB with
    triton 3.8, less with 3.9), so that a limit met exactly is one exceeded.
    """
    tiles = 3 if has_k_position else 2
    step_bytes = tiles * tile_keys(D, itemsize) * _block_d(D) * itemsize
    return 2 if 2 * step_bytes < SHARED_LIMIT_BYTES else 1


def _block_d(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))


def constants(
    D: int,
    W: int,
    window: tuple[int, int],
    block_m: int,
    block_n: int,
    positions: tuple[bool, bool] = (False, False),
) -> dict[str, int | float | str]:
    """Compile-time arguments of the kernel."""
    masked = min(window) > 0
    return {
        "D": D,
        "W": W,
        "RADIUS_H": window[0] // 2 if masked else -1,
        "RADIUS_W": window[1] // 2 if masked else -1,
        "SCALE": math.log2(math.e) / math.sqrt(D),
        "PRECISION": "tf32x3",  # of float32 inputs: three products keep 21 of 24 bits
        "HAS_Q_POS": positions[0],
        "HAS_K_POS": positions[1],
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": _block_d(D),
    }


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    out: Tensor,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    tiles: tuple[int, int, int] | None = None,
) -> None:
    """Fill ``out``, [B, heads, N, D] with stride 1 along D, for arguments the kernel takes."""
    B, heads, N, D = q.shape
    if tiles is None:
        processors = (
            torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        )
        tiles = tile_sizes(B * heads * triton.cdiv(N, 16), D, q.element_size(), processors)
    block_m, block_n, num_warps = tiles
    programs = (B * heads * triton.cdiv(N, block_m),)
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    for position in (q_position, k_position):
        strides += (0, 0) if position is None else position.stride()[:2]
    positions = (q_position is not None, k_position is not None)
    if q.numel() == 0:
        return
    with torch.cuda.device_of(q):
        neighbor_attention_kernel[programs](
            q, k, v, q if q_position is None else q_position,
            k if k_position is None else k_position, heads, N, *strides, out,
            **constants(D, grid[1], window, block_m, block_n, positions),
            num_warps=num_warps, num_stages=stages(D, q.element_size(), positions[1]),
        )  # fmt: skip
