"""Multilinear interpolation as hat weights times table: exact, branch-free, any D."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.ops.check import check_like


def hat_weights(
    coords: Tensor,  # [..., D] floating
    nodes: tuple[int, ...],  # table nodes per axis, slowest axis first
) -> Tensor:  # [..., n_1 * ... * n_D] dtype of coords
    """Weight of every table node at every coordinate.

    Node ``i`` of an axis with ``n`` nodes sits at ``(2 i + 1) / n - 1``; its weight falls linearly
    to 0 at the neighbouring nodes. At most ``2 ** D`` weights of a row differ from 0. Beyond the
    outermost node the sum of a row fades to 0: zero padding, ``align_corners=False``.

    Args:
        coords: Component 0 addresses the LAST axis of ``nodes``, as in ``grid_sample``.
        nodes: Sizes of the table's axes.
    """
    weights: Tensor | None = None
    for axis, n in enumerate(nodes):
        p = ((coords[..., len(nodes) - 1 - axis] + 1.0) * n - 1.0) * 0.5  # [...] in node units
        index = torch.arange(n, device=coords.device, dtype=coords.dtype)
        hat = (1.0 - (p.unsqueeze(-1) - index).abs()).clamp_min(0.0)  # [..., n]
        if weights is None:
            weights = hat
        else:
            weights = (weights.unsqueeze(-1) * hat.unsqueeze(-2)).flatten(-2)
    assert weights is not None
    return weights


def check_arguments(table: Tensor, coords: Tensor, per_image: bool, out: Tensor | None) -> None:
    """Refuse what does not fit together.

    Raises:
        InputError: names the argument, what was expected and what came.
    """
    D = table.dim() - 1 - per_image
    if D < 1 or coords.dim() < 1 + per_image or coords.shape[-1] != D:
        raise InputError(
            f"coords: expected [{'B, ' if per_image else ''}..., {D}] for a table "
            f"{list(table.shape)}, got {list(coords.shape)}"
        )
    check_like("coords", coords, table, shape=False)
    if not table.dtype.is_floating_point:
        raise InputError(f"table: expected a floating dtype, got {table.dtype}")
    if per_image and coords.shape[0] != table.shape[0]:
        raise InputError(
            f"coords: expected one row per table, {table.shape[0]}, got {coords.shape[0]}"
        )
    if out is not None:
        check_like("out", out, table, shape=False)
        expected = [*coords.shape[:-1], table.shape[-1]]
        if list(out.shape) != expected:
            raise InputError(f"out: expected {expected}, got {list(out.shape)}")


def grid_interpolate(table: Tensor, coords: Tensor, per_image: bool = False) -> Tensor:
    """Standard operations in the table's dtype: a product that every runtime has."""
    nodes = tuple(table.shape[per_image:-1])
    weights = hat_weights(coords, nodes)  # [..., K]
    if not per_image:
        out: Tensor = weights @ table.flatten(0, -2)
        return out
    B = table.shape[0]
    rows = weights.reshape(B, -1, weights.shape[-1]) @ table.flatten(1, -2)  # [B, P, C]
    return rows.reshape(*coords.shape[:-1], table.shape[-1])
