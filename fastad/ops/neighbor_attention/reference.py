"""Attention over a token grid with each query's neighbourhood excluded, in standard operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.ops.check import check_like, check_rank

# Finite, because a row of -inf is NaN in softmax and in its gradient; any score vanishes beside it.
EXCLUDED = -1e30


def neighbor_mask(
    grid: tuple[int, int], window: tuple[int, int], device: torch.device | None = None
) -> Tensor:  # [N, N] bool
    """True where a key (second axis) lies in the window of a query (first axis).

    Tokens are row-major over ``grid``; the window is centred on the query and cut at the border.
    The token itself is inside. A window of 0 on either axis hides nothing.

    >>> neighbor_mask((14, 14), (7, 7)).sum()
    tensor(7396)
    """
    rows, columns = (_near(n, w, device) for n, w in zip(grid, window, strict=True))
    # From two small matrices, so that an exported graph stores these and not N x N values.
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def has_blind_rows(grid: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether some query sees no key: the window around the middle token covers the grid."""
    return all(w > 0 and n // 2 <= w // 2 for n, w in zip(grid, window, strict=True))


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> None:
    """Refuse what is no attention over this grid.

    Raises:
        InputError: names the argument, what was expected and what came.
    """
    check_rank("q", q, "B heads N D")
    if not q.dtype.is_floating_point:
        raise InputError(f"q: expected a floating dtype, got {q.dtype}")
    check_like("k", k, q)
    check_like("v", v, q)
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != q.shape[2]:
        raise InputError(f"grid: expected (H, W) with H * W = {q.shape[2]} tokens, got {grid}")
    if len(window) != 2 or any(w < 0 or (w > 0 and w % 2 == 0) for w in window):
        raise InputError(f"window: expected two odd sizes, or 0 for no mask, got {window}")
    for name, position in {"q_position": q_position, "k_position": k_position}.items():
        if position is None:
            continue
        check_rank(name, position, "heads N D")
        check_like(name, position, q, shape=False)
        if position.shape != q.shape[1:]:
            raise InputError(
                f"{name}: expected {list(q.shape[1:])}, the shape of q without its batch, got "
                f"{list(position.shape)}"
            )


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Scores in full, in float32 or wider: slow, obvious, differentiable, exportable."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # Half of the scale on each side, so that a graph cast to float16 does not overflow in q @ k.
    scale = float(q.shape[-1]) ** -0.25
    a = _placed(q.to(wide), q_position) * scale
    b = _placed(k.to(wide), k_position) * scale
    scores = a @ b.transpose(-2, -1)  # [B, heads, N, N]
    if min(window) > 0:
        # Adding is what runtimes recognise as the mask of an attention.
        scores = scores + neighbor_mask(grid, window, q.device).to(wide) * EXCLUDED
    weights = scores.softmax(-1)
    if has_blind_rows(grid, window):
        blind = neighbor_mask(grid, window, q.device).all(1, keepdim=True)  # [N, 1]
        weights = weights.masked_fill(blind, 0.0)
    out: Tensor = (weights @ v.to(wide)).to(q.dtype)
    return out


def _placed(t: Tensor, position: Tensor | None) -> Tensor:
    """[B, heads, N, D] with its position."""
    if position is None:
        return t
    # Added as [B, N, heads, D], as projections leave both: in an exported graph this swap of axes
    # cancels the caller's. With the sum behind that one, openvino copies q once more.
    return (t.transpose(1, 2) + position.to(t.dtype).transpose(0, 1)).transpose(1, 2)


def _near(n: int, w: int, device: torch.device | None) -> Tensor:
    """[n, n]: whether two positions of an axis are at most w // 2 apart; nothing when w is 0."""
    i = torch.arange(n, device=device)
    return 2 * (i[:, None] - i[None, :]).abs() < w
