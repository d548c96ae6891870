"""Attention over a token grid that cannot see the neighbourhood of the query."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.ops.check import runs_registered
from fastad.ops.neighbor_attention import op, reference
from fastad.ops.neighbor_attention.reference import neighbor_mask

__all__ = ["neighbor_attention", "neighbor_mask", "why_unsupported"]

why_unsupported = op.why_unsupported


def neighbor_attention(
    q: Tensor,  # [B, heads, N, D] float16, bfloat16, float32 or float64
    k: Tensor,  # [B, heads, N, D] like q
    v: Tensor,  # [B, heads, N, D] like q
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    q_position: Tensor | None = None,  # [heads, N, D] like q
    k_position: Tensor | None = None,  # [heads, N, D] like q
) -> Tensor:  # [B, heads, N, D] like q
    """Scaled dot-product attention with keys inside the query's window excluded.

    Computes ``softmax((q + q_position) @ (k + k_position).T / sqrt(D)) @ v`` over the keys outside
    a window centred on the query and cut at the border; the query's own token is inside the window.
    Rows with no key left give 0. Scores and sums run in float32 whatever the input; only queries
    and keys may be rounded to their dtype once more where positions have been added.
    Differentiable: with gradients this is `reference.neighbor_attention` in standard operations, in
    an ONNX export the node ``NeighborAttention``; otherwise ``fastad::neighbor_attention``, whose
    result lies in memory as [B, N, heads, D].

    Args:
        q: Queries, tokens row-major over ``grid``.
        k: Keys.
        v: Values.
        grid: (H, W) of the tokens, ``H * W = N``.
        window: (H, W) of the excluded window in tokens, odd; 0 on an axis excludes nothing.
        q_position: Added to the queries of every image; the CUDA kernel adds it in registers.
        k_position: Added to the keys of every image, in the same way; values never see it.

    Returns:
        Attended values.

    Raises:
        InputError: shapes, dtypes or devices differ, or ``grid`` or ``window`` do not fit.
        UnsupportedError: the CUDA kernel cannot take these; `why_unsupported` says why.

    Paper:
        You et al., A Unified Model for Multi-class Anomaly Detection, NeurIPS 2022, section 3.2.

    >>> v = torch.arange(3.0).reshape(1, 1, 3, 1)
    >>> zero = torch.zeros_like(v)
    >>> neighbor_attention(zero, zero, v, grid=(1, 3), window=(1, 1)).flatten()
    tensor([1.5000, 1.0000, 0.5000])
    """
    reference.check_arguments(q, k, v, grid, window, q_position, k_position)
    if torch.onnx.is_in_onnx_export():
        return op.onnx_node(q, k, v, grid, window, q_position, k_position)
    positions = [t for t in (q_position, k_position) if t is not None]
    if runs_registered(q, k, v, *positions):
        out: Tensor = torch.ops.fastad.neighbor_attention(
            q, k, v, grid, window, q_position, k_position
        )
        return out
    return reference.neighbor_attention(q, k, v, grid, window, q_position, k_position)
