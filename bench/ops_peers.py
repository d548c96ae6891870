"""What else computes the same as an operator: torch's own functions, as `bench.ops` calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastad.ops.anomaly_map import reference as anomaly_map
from fastad.ops.case import Arguments
from fastad.ops.grid_interpolate import reference as grid_interpolate
from fastad.ops.neighbor_attention import reference as neighbor_attention

Calls = dict[str, Callable[[], Any]]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Shapes are fixed in an engine: each gets its own code.
    return torch.compile(function, dynamic=False)


def placed(t: Tensor, position: Tensor | None) -> Tensor:
    return t if position is None else t + position


def attention_peers(arguments: Arguments) -> Calls:
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    q_position, k_position = arguments.get("q_position"), arguments.get("k_position")

    def placed_q() -> Tensor:
        return placed(q, q_position)

    def placed_k() -> Tensor:
        return placed(k, k_position)

    hidden = neighbor_attention.neighbor_mask(arguments["grid"], arguments["window"], q.device)
    added = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    added = added.masked_fill(hidden, float("-inf"))
    attend = F.scaled_dot_product_attention
    found: Calls = {
        "SDPA, float mask": lambda: attend(placed_q(), placed_k(), v, attn_mask=added),
        "SDPA, bool mask": lambda: attend(placed_q(), placed_k(), v, attn_mask=~hidden),
    }
    if q_position is not None or k_position is not None:
        # What folding the positions in must beat.
        registered = torch.ops.fastad.neighbor_attention
        grid, window = arguments["grid"], arguments["window"]
        found["fastad, positions before"] = lambda: registered(
            placed_q(), placed_k(), v, grid, window
        )
    if not q.is_cuda:
        return found
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (H, W), (rows, columns) = arguments["grid"], arguments["window"]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        away_h = (i // W - j // W).abs() > rows // 2
        return away_h | ((i % W - j % W).abs() > columns // 2)

    mask = create_block_mask(seen, None, None, H * W, H * W, device=q.device)
    flex = compiled(flex_attention)
    eager = compiled(neighbor_attention.neighbor_attention)
    return found | {
        "FlexAttention": lambda: flex(placed_q(), placed_k(), v, block_mask=mask),
        "torch.compile": lambda: eager(**arguments),
    }


def interpolation_peers(arguments: Arguments) -> Calls:
    table, coords = arguments["table"], arguments["coords"]
    # In the layout that the sampler likes best, one image per point or per grid of points.
    planes = table.permute(2, 0, 1)[None].contiguous()
    points = coords.reshape(1, -1, 1, 2)

    def sample() -> Tensor:
        out = F.grid_sample(planes, points, align_corners=False)  # [1, C, P, 1]
        return out[0, :, :, 0].T.reshape(*coords.shape[:-1], -1)

    found: Calls = {"grid_sample": sample}
    if coords.dim() == 4:
        B = coords.shape[0]
        # What the authors of GRAD run, with the result still channels first.
        found["grid_sample, batched"] = lambda: F.grid_sample(
            planes.expand(B, -1, -1, -1), coords, align_corners=False
        ).permute(0, 2, 3, 1)
    if table.is_cuda:
        eager = compiled(grid_interpolate.grid_interpolate)
        found["torch.compile"] = lambda: eager(**arguments)
    return found


def map_peers(arguments: Arguments) -> Calls:
    if not arguments["feat"][0].is_cuda:
        return {}
    eager = compiled(anomaly_map.anomaly_map)
    return {"torch.compile": lambda: eager(**arguments)}


def no_peers(arguments: Arguments) -> Calls:
    """Nothing in torch resizes bit for bit as Pillow does; `bench.resize` has the CPU's peers."""
    return {}


PEERS: dict[str, Callable[[Arguments], Calls]] = {
    "anomaly_map": map_peers,
    "grid_interpolate": interpolation_peers,
    "neighbor_attention": attention_peers,
    "postprocess": no_peers,
    "preprocess": no_peers,
}
