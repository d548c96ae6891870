"""Anomaly maps on the device to what people look at: original size and mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.ops.postprocess import op, reference

__all__ = ["postprocess", "why_unsupported"]

why_unsupported = op.why_unsupported


def postprocess(
    anomaly_map: Tensor,  # [B, h, w] float32
    size: tuple[int, int],
    threshold: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B, H, W] float32 and [B, H, W] bool
    """Resize maps to original size, bilinear with half-pixel centres, and threshold them.

    Args:
        anomaly_map: At model size.
        size: (H, W) of the original image in pixels.
        threshold: In units of the map. The mask is True strictly above it, compared as real
            numbers; NaN is never above.

    Returns:
        The resized map, and the mask, None without a threshold.

    Raises:
        InputError: no float32 [B, h, w], no size, or a threshold that is not finite.
        UnsupportedError: the CUDA kernel cannot take these; `why_unsupported` says why.

    >>> postprocess(torch.tensor([[[0.0, 1.0]]]), (1, 4), 0.5)[1]
    tensor([[[False, False,  True,  True]]])
    """
    reference.check_arguments(anomaly_map, size, threshold)
    resized, mask = torch.ops.fastad.postprocess(anomaly_map, size, threshold)
    return resized, None if threshold is None else mask
