"""From distances on a feature grid to an anomaly map and a raw score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastad.ops.anomaly_map import op, reference
from fastad.ops.anomaly_map.matrices import bilinear_matrix, gaussian_matrix, mean_pool_matrix
from fastad.ops.anomaly_map.reference import GRAD_REFINE, Distance, Refine, distance_map
from fastad.ops.check import runs_registered

__all__ = [
    "anomaly_map",
    "bilinear_matrix",
    "distance_map",
    "gaussian_matrix",
    "mean_pool_matrix",
    "why_unsupported",
]

why_unsupported = op.why_unsupported


def anomaly_map(
    distance: Distance,
    feat: Tensor | Sequence[Tensor],  # L levels [B, C, H, W] floating
    feat_hat: Tensor | Sequence[Tensor],  # L levels like feat
    map_h: Tensor,  # [n_h, H_1 + ... + H_L] float32
    map_w: Tensor,  # [n_w, W_1 + ... + W_L] float32
    pooled_h: Tensor | None = None,  # [m_h, H_1 + ... + H_L] float32
    pooled_w: Tensor | None = None,  # [m_w, W_1 + ... + W_L] float32
    *,
    refine: Refine = GRAD_REFINE,
) -> tuple[Tensor, Tensor]:  # [B, n_h, n_w] and [B], float32 (float64 for float64)
    """Anomaly map and raw score from features and their reconstruction.

    At every feature pixel, over channels, in float32:

    - ``"l2"``: ``|f - g|``;
    - ``"cosine"``: ``1 - <f, g> / (max(|f|, eps) * max(|g|, eps))`` with ``eps = 1e-8``;
    - ``"refined"``: ``|1 - S| * |f - g|`` with ``S = mse_weight * (mse <= mse_threshold) +
      cosine_weight * cosine``.

    The map is the sum over levels of ``map_h_l @ d_l @ map_w_l.T``; the score is the maximum of the
    same sum with the pooled matrices. Differentiable: with gradients, and in exports, this is
    `reference.anomaly_map` in standard operations; otherwise ``fastad::anomaly_map``.

    Args:
        distance: Which of the three.
        feat: Features of the frozen network; one tensor is one level.
        feat_hat: What the method makes of them.
        map_h: Resize and blur of the rows; the levels' matrices side by side.
        map_w: The same for columns.
        pooled_h: What the score's maximum is taken over; None for the map itself.
        pooled_w: The same for columns.
        refine: (mse_threshold, mse_weight, cosine_weight) of ``"refined"``.

    Returns:
        Anomaly map and raw score. A NaN in the features gives a score of NaN or infinity.

    Raises:
        InputError: levels, shapes, dtypes or devices do not fit together.
        UnsupportedError: the CUDA kernels cannot take these; `why_unsupported` says why.

    >>> f = torch.zeros(1, 4, 2, 2)
    >>> up = torch.ones(3, 2) / 2
    >>> anomaly_map("l2", f, f + 1, up, up)[1]
    tensor([2.])
    """
    feats = [feat] if isinstance(feat, Tensor) else list(feat)
    hats = [feat_hat] if isinstance(feat_hat, Tensor) else list(feat_hat)
    pooled_h = map_h if pooled_h is None else pooled_h
    pooled_w = map_w if pooled_w is None else pooled_w
    matrices = {"map_h": map_h, "map_w": map_w, "pooled_h": pooled_h, "pooled_w": pooled_w}
    reference.check_arguments(distance, feats, hats, matrices, refine)
    if runs_registered(*feats, *hats):
        result: tuple[Tensor, Tensor] = torch.ops.fastad.anomaly_map(
            distance, feats, hats, map_h, map_w, pooled_h, pooled_w, list(refine)
        )
        return result
    return reference.anomaly_map(distance, feats, hats, map_h, map_w, pooled_h, pooled_w, refine)
