"""Distance, map and score in standard operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.ops.check import check_like, check_rank

Distance = Literal["l2", "cosine", "refined"]
Refine = tuple[float, float, float]  # mse_threshold, mse_weight, cosine_weight

EPS = 1e-8  # least norm in a cosine
GRAD_REFINE: Refine = (10.0, 0.3, 0.7)


def distance_map(
    distance: Distance,
    feat: Tensor,  # [B, C, H, W] floating
    feat_hat: Tensor,  # [B, C, H, W] like feat
    refine: Refine = GRAD_REFINE,
) -> Tensor:  # [B, H, W] float32, or float64 for float64
    """Distance of two feature maps at every feature pixel; formulas at `anomaly_map`."""
    wide = torch.promote_types(feat.dtype, torch.float32)
    f, g = feat.to(wide), feat_hat.to(wide)
    if distance == "cosine":
        return 1.0 - _cosine(f, g)
    e2 = (f - g).square().sum(1)
    if distance == "l2":
        return e2.sqrt()
    mse_threshold, mse_weight, cosine_weight = refine
    passes = (e2 / f.shape[1] <= mse_threshold).to(wide)
    S = mse_weight * passes + cosine_weight * _cosine(f, g)
    return (1.0 - S).abs() * e2.sqrt()


def _cosine(f: Tensor, g: Tensor) -> Tensor:
    # F.cosine_similarity normalises both maps first: 1.5 times the time on a CPU.
    norm_f = torch.linalg.vector_norm(f, dim=1).clamp_min(EPS)
    norm_g = torch.linalg.vector_norm(g, dim=1).clamp_min(EPS)
    cosine: Tensor = (f * g).sum(1) / (norm_f * norm_g)
    return cosine


def anomaly_map(
    distance: Distance,
    feat: Sequence[Tensor],
    feat_hat: Sequence[Tensor],
    map_h: Tensor,
    map_w: Tensor,
    pooled_h: Tensor,
    pooled_w: Tensor,
    refine: Refine = GRAD_REFINE,
) -> tuple[Tensor, Tensor]:
    """One distance map per level, resized and summed by the matrices."""
    levels = [distance_map(distance, f, g, refine) for f, g in zip(feat, feat_hat, strict=True)]
    return head(levels, map_h, map_w), head(levels, pooled_h, pooled_w).amax((1, 2))


def head(levels: Sequence[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over levels of ``rows_l @ level @ columns_l.T``; matrices concatenated along axis 1."""
    dtype = levels[0].dtype
    to_h = torch.split(rows.to(dtype), [d.shape[1] for d in levels], dim=1)
    to_w = torch.split(columns.to(dtype), [d.shape[2] for d in levels], dim=1)
    total: Tensor = to_h[0] @ levels[0] @ to_w[0].T
    for a, d, b in zip(to_h[1:], levels[1:], to_w[1:], strict=True):
        total = total + a @ d @ b.T
    return total


def check_arguments(
    distance: str,
    feat: Sequence[Tensor],
    feat_hat: Sequence[Tensor],
    matrices: dict[str, Tensor],
    refine: Sequence[float],
) -> None:
    """Refuse what does not fit together.

    Raises:
        InputError: names the argument, what was expected and what came.
    """
    if distance not in get_args(Distance):
        raise InputError(f"distance: expected one of {list(get_args(Distance))}, got {distance!r}")
    if not feat or len(feat) != len(feat_hat):
        raise InputError(f"feat_hat: expected {max(len(feat), 1)} levels, got {len(feat_hat)}")
    for i, (f, g) in enumerate(zip(feat, feat_hat, strict=True)):
        check_rank(f"feat[{i}]", f, "B C H W")
        if not f.dtype.is_floating_point:
            raise InputError(f"feat[{i}]: expected a floating dtype, got {f.dtype}")
        check_like(f"feat_hat[{i}]", g, f)
        check_like(f"feat[{i}]", f, feat[0], shape=False)
        if f.shape[0] != feat[0].shape[0]:
            raise InputError(f"feat[{i}]: expected batch {feat[0].shape[0]}, got {f.shape[0]}")
    sizes = {"h": sum(f.shape[2] for f in feat), "w": sum(f.shape[3] for f in feat)}
    for name, matrix in matrices.items():
        check_rank(name, matrix, f"out {name[-1].upper()}")
        if matrix.shape[1] != sizes[name[-1]]:
            raise InputError(
                f"{name}: expected {sizes[name[-1]]} columns, the levels' sizes together, "
                f"got {list(matrix.shape)}"
            )
        if matrix.device != feat[0].device or matrix.dtype != torch.float32:
            raise InputError(
                f"{name}: expected float32 on {feat[0].device}, got {matrix.dtype} on "
                f"{matrix.device}"
            )
    if len(refine) != 3 or not all(math.isfinite(r) for r in refine):
        raise InputError(f"refine: expected three finite numbers, got {refine}")
