"""Registration of ``fastad::neighbor_attention``: schema, fake, one implementation per device."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastad.ops.check import (
    refuse_gradient,
    require,
    why_unsupported_dtype,
    why_unsupported_strides,
)
from fastad.ops.neighbor_attention import reference

NAME = "fastad::neighbor_attention"
ONNX_NAME = "NeighborAttention"  # NVIDIA's parser ignores domains: no ONNX operator has this name
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128  # above, a tile of keys and values leaves 48 KiB of shared memory

torch.library.define(
    NAME,
    "(Tensor q, Tensor k, Tensor v, int[2] grid, int[2] window, "
    "Tensor? q_position=None, Tensor? k_position=None) -> Tensor",
)


def empty_output(q: Tensor) -> Tensor:
    """[B, heads, N, D] that lies as [B, N, heads, D], so that merging the heads copies nothing."""
    B, heads, N, D = q.shape
    return q.new_empty(B, N, heads, D).transpose(1, 2)


def why_unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> str | None:
    """Why the CUDA kernel cannot serve these checked arguments; None when it can."""
    tensors = {"q": q, "k": k, "v": v, "q_position": q_position, "k_position": k_position}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name}: expected stride 1 along D, got {tensor.stride()}; use .contiguous()"
        if reason := why_unsupported_strides(name, tensor):
            return reason
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"q: the CUDA kernel takes D up to {MAX_HEAD_DIM}, got {q.shape[-1]}; use reference"
    return why_unsupported_dtype("q", q, KERNEL_DTYPES)


def _anywhere(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: list[int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    out = reference.neighbor_attention(q, k, v, _pair(grid), _pair(window), q_position, k_position)
    return empty_output(q).copy_(out)


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: list[int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    # Blocked by torch: 1.7 times as fast as the reference at 196 tokens, 4.8 times at 3136
    # (bench.ops, one thread of a Xeon).
    mask = _bias(_pair(grid), _pair(window), q.dtype)
    q = q if q_position is None else q + q_position
    k = k if k_position is None else k + k_position
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: list[int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    require(why_unsupported(q, k, v, q_position, k_position))
    # Imported by the first call that needs it: no machine without CUDA pays for triton.
    from fastad.ops.neighbor_attention import triton_impl

    out = empty_output(q)
    triton_impl.neighbor_attention(q, k, v, _pair(grid), _pair(window), out, q_position, k_position)
    return out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: list[int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    return empty_output(q)


def onnx_node(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """The operator as one node of a graph under export; `onnx_impl` says what it means.

    A form for each set of positions, because plugins and functions take no optional inputs.
    """
    form = "Q" * (q_position is not None) + "K" * (k_position is not None)
    positions = [t for t in (q_position, k_position) if t is not None]
    out: Tensor = torch.onnx.ops.symbolic(
        f"fastad::{ONNX_NAME}{form}",
        (q, k, v, *positions),
        {
            "grid_height": grid[0],
            "grid_width": grid[1],
            "window_height": window[0],
            "window_width": window[1],
            "scale": float(q.shape[-1]) ** -0.5,
            # TensorRT takes a plugin of this name before the function
            "plugin_namespace": "fastad",
        },
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )
    return out


@lru_cache(maxsize=8)
def _bias(grid: tuple[int, int], window: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """[N, N], -inf inside the window; a float mask, because torch's Boolean one is slower."""
    if min(window) == 0:
        return None
    N = grid[0] * grid[1]
    hidden = reference.neighbor_mask(grid, window)
    return torch.zeros(N, N, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


torch.library.impl(NAME, "CompositeExplicitAutograd")(_anywhere)
torch.library.impl(NAME, "CPU")(_cpu)
torch.library.impl(NAME, "CUDA")(_cuda)
torch.library.register_fake(NAME)(_fake)
torch.library.register_autograd(NAME, refuse_gradient)
