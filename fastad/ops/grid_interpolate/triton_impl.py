"""CUDA kernels: read 2 ** D corners per point (gather), or hat weights times table (hat)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-untyped-call"
# Kernels are Triton's dialect, which has no types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastad.ops.grid_interpolate.op import Form, as_points


@triton.jit
def _axis(nodes: tl.constexpr, i: tl.constexpr):
    """Nodes of axis ``i``; sizes are packed 12 bits each."""
    return (nodes >> (12 * i)) & 0xFFF


@triton.jit
def _position(coords_ptr, o_coords, m_p, nodes: tl.constexpr, i: tl.constexpr, D: tl.constexpr):
    """Where a block of points lies on axis ``i``, in node units, float32."""
    n = _axis(nodes, i)
    x = tl.load(coords_ptr + o_coords + (D - 1 - i), mask=m_p, other=0.0).to(tl.float32)
    return ((x + 1.0) * n - 1.0) * 0.5


@triton.jit
def _add_corner(
    acc, corner, table_ptr, coords_ptr, o_coords, m_p, o_c, m_c, C,
    NODES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Weight times row of one corner: bit ``i`` of ``corner`` picks the upper node of axis i."""
    weight = tl.where(m_p, 1.0, 0.0)
    row = tl.zeros_like(o_coords)
    for i in tl.static_range(D):
        p = _position(coords_ptr, o_coords, m_p, NODES, i, D)
        low = tl.floor(p)
        upper = (corner >> i) & 1
        part = p - low
        node = low + upper
        inside = (node >= 0) & (node < _axis(NODES, i))
        weight *= tl.where(inside, tl.where(upper == 1, part, 1.0 - part), 0.0)
        # A node outside has weight 0 and is never read, wherever it would lie.
        row = row * _axis(NODES, i) + tl.where(inside, node, 0.0).to(tl.int64)
    m_read = (weight > 0.0)[:, None] & m_c[None, :]
    b_row = tl.load(table_ptr + row[:, None] * C + o_c[None, :], mask=m_read, other=0.0)
    return acc + weight[:, None] * b_row.to(tl.float32)


@triton.jit
def gather_kernel(
    table_ptr, coords_ptr, P, C, s_tb, s_cb, s_cp, s_ob, s_op, s_oc, out_ptr,
    NODES: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_C channels, BLOCK_P points and image; out [B, P, C] by strides."""
    i_b = tl.program_id(2).to(tl.int64)
    o_p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p = o_p < P
    m_c = o_c < C
    o_coords = i_b * s_cb + o_p * s_cp
    table_ptr += i_b * s_tb
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if D <= 4:
        for corner in tl.static_range(1 << D):
            acc = _add_corner(
                acc, corner, table_ptr, coords_ptr, o_coords, m_p, o_c, m_c, C, NODES, D
            )
    else:  # unrolled, 2 ** D corners would be code for minutes of compiling
        for corner in range(1 << D):
            acc = _add_corner(
                acc, corner, table_ptr, coords_ptr, o_coords, m_p, o_c, m_c, C, NODES, D
            )
    o_out = i_b * s_ob + o_p[:, None] * s_op + o_c.to(tl.int64)[None, :] * s_oc
    tl.store(out_ptr + o_out, acc.to(out_ptr.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
def hat_kernel(
    table_ptr, coords_ptr, P, C, s_tb, s_cb, s_cp, s_ob, s_op, s_oc, out_ptr,
    NODES: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Same launch as the gather; weights of BLOCK_K of the K nodes at a time, rounded as table."""
    i_b = tl.program_id(2).to(tl.int64)
    o_p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p = o_p < P
    m_c = o_c < C
    o_coords = i_b * s_cb + o_p * s_cp
    table_ptr += i_b * s_tb
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        weight = tl.where(m_p[:, None] & (o_k < K)[None, :], 1.0, 0.0)
        rest = o_k
        for j in tl.static_range(D):
            # Axis D - 1 - j: the last one changes fastest.
            p = _position(coords_ptr, o_coords, m_p, NODES, D - 1 - j, D)
            node = (rest % _axis(NODES, D - 1 - j)).to(tl.float32)
            rest = rest // _axis(NODES, D - 1 - j)
            weight *= tl.maximum(1.0 - tl.abs(p[:, None] - node[None, :]), 0.0)
        m_kc = (o_k < K)[:, None] & m_c[None, :]
        b_table = tl.load(
            table_ptr + o_k.to(tl.int64)[:, None] * C + o_c[None, :], mask=m_kc, other=0.0
        )
        acc = tl.dot(weight.to(b_table.dtype), b_table, acc, input_precision="ieee")
    o_out = i_b * s_ob + o_p[:, None] * s_op + o_c.to(tl.int64)[None, :] * s_oc
    tl.store(out_ptr + o_out, acc.to(out_ptr.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


def pack(nodes: tuple[int, ...]) -> int:
    """Axis sizes, each below 4096, in one integer, because kernels take no tuples from TensorRT."""
    return sum(n << (12 * i) for i, n in enumerate(nodes))


def blocks(form: Form, points: int, channels: int, points_fast: bool) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C): counted, not measured.

    At most 4096 results a program, and whole cache lines along the axis that lies densely in the
    output: points in one image's [C, H, W], else channels.
    """
    if form == "hat":
        return (64, 64) if points > 32 else (16, 128)
    if points >= 16:
        return (64, 32) if points_fast else (16, 128)
    return (4, 512) if channels >= 512 else (4, 256)


def constants(form: Form, nodes: tuple[int, ...], block_p: int, block_c: int) -> dict[str, Any]:
    """Compile-time arguments of a form's kernel."""
    shared = {"NODES": pack(nodes), "D": len(nodes), "BLOCK_P": block_p, "BLOCK_C": block_c}
    if form == "gather":
        return shared
    K = torch.Size(nodes).numel()
    return shared | {"K": K, "BLOCK_K": min(64, max(16, triton.next_power_of_2(K)))}


def grid_interpolate(
    table: Tensor,
    coords: Tensor,
    per_image: bool,
    out: Tensor,
    form: Form,
    tile: tuple[int, int] | None = None,
) -> None:
    """Fill ``out`` [..., C], any strides, for arguments the kernel takes."""
    if out.numel() == 0:
        return
    nodes = tuple(table.shape[per_image:-1])
    coords3, out3 = as_points(coords, per_image), as_points(out, per_image)
    assert coords3 is not None and out3 is not None
    B, P, C = out3.shape
    block_p, block_c = tile or blocks(form, P, C, out3.stride(1) == 1)
    s_cb, s_cp, _ = coords3.stride()
    kernel = gather_kernel if form == "gather" else hat_kernel
    with torch.cuda.device_of(table):
        kernel[(triton.cdiv(C, block_c), triton.cdiv(P, block_p), B)](
            table, coords3, P, C, table.stride(0) if per_image else 0, s_cb, s_cp, *out3.stride(),
            out, **constants(form, nodes, block_p, block_c), num_warps=4, num_stages=2,
        )  # fmt: skip
