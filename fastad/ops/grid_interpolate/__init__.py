"""Values of a D-dimensional table at continuous coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.ops.check import runs_registered
from fastad.ops.grid_interpolate import op, reference
from fastad.ops.grid_interpolate.reference import hat_weights

__all__ = ["grid_interpolate", "hat_weights", "why_unsupported"]

why_unsupported = op.why_unsupported


def grid_interpolate(
    table: Tensor,  # [n_1, ..., n_D, C] floating; with per_image [B, n_1, ..., n_D, C]
    coords: Tensor,  # [..., D] dtype of table; with per_image [B, ..., D]
    *,
    per_image: bool = False,
    out: Tensor | None = None,  # [..., C] dtype of table
) -> Tensor:  # [..., C] dtype of table
    """Read a D-dimensional table of vectors at continuous coordinates.

    Equals ``torch.nn.functional.grid_sample(mode="bilinear", padding_mode="zeros",
    align_corners=False)`` where that exists (D = 2, 3), for every D >= 1. Differentiable in both
    arguments: with gradients this is `reference.grid_interpolate` in standard operations, which
    costs ``N * n_1 * ... * n_D * C`` multiply-adds for N coordinates, in an ONNX export the node
    ``GridInterpolate``; otherwise ``fastad::grid_interpolate``.

    Args:
        table: Node values, channel-last.
        coords: Positions in [-1, 1] across the table (outside reads fade to 0); component 0
            addresses the last node axis, component D - 1 the first.
        per_image: Each image has its own table.
        out: Where to write, for example one half of a concatenation. Any strides on a CPU; on CUDA
            the axes between the first and the last must fold into one.

    Returns:
        Interpolated vectors: ``out`` if given.

    Raises:
        InputError: ``coords`` has another D than ``table``, or another dtype or device, or ``out``
            does not fit.
        UnsupportedError: the CUDA kernel cannot take these; `why_unsupported` says why.

    Paper:
        Lee et al., Continuous Memory Representation for Anomaly Detection, ECCV 2024.

    >>> grid_interpolate(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0]]))
    tensor([[0.5000]])
    """
    reference.check_arguments(table, coords, per_image, out)
    if torch.onnx.is_in_onnx_export():
        node = op.onnx_node(table, coords, per_image)
        return node if out is None else out.copy_(node)
    if runs_registered(table, coords):
        if out is not None:
            torch.ops.fastad.grid_interpolate_out(table, coords, per_image, out)
            return out
        result: Tensor = torch.ops.fastad.grid_interpolate(table, coords, per_image)
        return result
    result = reference.grid_interpolate(table, coords, per_image)
    return result if out is None else out.copy_(result)
