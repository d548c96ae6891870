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
        weights = hat if weights is None else (weights.unsqueeze(-1) * hat.unsqueeze(-2)).flatten(-2)
    assert weights is not None
    return weights


def grid_interpolate(
    table: Tensor,  # [n_1, ..., n_D, C] floating
    coords: Tensor,  # [..., D] dtype of table
) -> Tensor:  # [..., C] dtype of table
    """Read a D-dimensional table of vectors at continuous coordinates.

    Equals ``torch.nn.functional.grid_sample(mode="bilinear", padding_mode="zeros",
    align_corners=False)`` where that exists (D = 2, 3), for every D >= 1. Differentiable in both
    arguments. Cost: ``N * n_1 * ... * n_D * C`` multiply-adds for N coordinates.

    Args:
        table: Node values, channel-last.
        coords: Positions in [-1, 1] across the table (outside reads fade to 0); component 0
            addresses the last node axis, component D - 1 the first.

    Returns:
        Interpolated vectors.

    Raises:
        InputError: ``coords`` has another D than ``table``, or another dtype or device.

    Paper:
        Lee et al., Continuous Memory Representation for Anomaly Detection, ECCV 2024.

    >>> grid_interpolate(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0]]))
    tensor([[0.5000]])
    """
    D = table.dim() - 1
    if D < 1 or coords.dim() < 1 or coords.shape[-1] != D:
        raise InputError(
            f"coords: expected [..., {D}] for a table {list(table.shape)}, got "
            f"{list(coords.shape)}"
        )
    check_like("coords", coords, table, shape=False)
    return hat_weights(coords, tuple(table.shape[:-1])) @ table.flatten(0, -2)
