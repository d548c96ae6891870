"""Anomaly map to original size and mask, in standard operations."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastad.errors import InputError
from fastad.ops.check import check_rank


def postprocess(
    anomaly_map: Tensor, size: tuple[int, int], threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Bilinear with half-pixel centres; mask is empty [0] without a threshold."""
    resized = anomaly_map
    if tuple(anomaly_map.shape[1:]) != size:
        resized = F.interpolate(anomaly_map[:, None], size, mode="bilinear")[:, 0]
    if threshold is None:
        return resized.clone(), anomaly_map.new_empty(0, dtype=torch.bool)
    floor = float32_floor(threshold) if anomaly_map.dtype == torch.float32 else threshold
    return resized.clone(), resized > floor


def float32_floor(threshold: float) -> float:
    """Largest float32 not above: ``v > floor`` exactly when ``v > threshold`` as real numbers.

    >>> float32_floor(0.1) <= 0.1
    True
    """
    floor = np.float32(threshold)
    if float(floor) > threshold:
        floor = np.nextafter(floor, np.float32(-np.inf))
    return float(floor)


def check_arguments(anomaly_map: Tensor, size: tuple[int, int], threshold: float | None) -> None:
    """Refuse what is no map, no size or no threshold.

    Raises:
        InputError: names the argument, what was expected and what came.
    """
    check_rank("anomaly_map", anomaly_map, "B H W")
    if anomaly_map.dtype not in (torch.float32, torch.float64) or 0 in anomaly_map.shape[1:]:
        raise InputError(
            f"anomaly_map: expected float32 [B, H, W], got {anomaly_map.dtype} "
            f"{list(anomaly_map.shape)}"
        )
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size: expected (H, W), both at least 1, got {size}")
    if threshold is not None and not math.isfinite(threshold):
        raise InputError(f"threshold: expected a finite number, got {threshold}")
