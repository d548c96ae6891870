"""Pillow's bilinear resize of 8-bit images in integers, then normalisation: plain tensors."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastad.errors import InputError
from fastad.ops.check import check_rank

Triple = tuple[float, float, float]

PRECISION_BITS = 22  # 32 bits less 8 of the pixel and 2 of head room, as Pillow
HALF = 1 << (PRECISION_BITS - 1)


@lru_cache(maxsize=64)
def resize_weights(n_in: int, n_out: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """First source position [n_out] and fixed-point weights [n_out, taps] of one axis.

    The triangle filter is widened by the scale when shrinking. Weights behind the last source
    position are 0. Arithmetic and rounding are those of Pillow's ``Resample.c`` (MIT-CMU licence).
    """
    scale = n_in / n_out
    support = max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    centers = (np.arange(n_out) + 0.5) * scale
    # Truncation, which for these values from -0.5 up is what C's cast does.
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + support + 0.5).astype(np.int64), n_in)
    at = first[:, None] + np.arange(taps)
    weights = 1.0 - np.abs((at - centers[:, None] + 0.5) * (1.0 / support))
    weights[(weights < 0) | (at >= stop[:, None])] = 0.0
    total = np.zeros(n_out)
    for tap in range(taps):  # in Pillow's order: another one may differ in the last bit
        total += weights[:, tap]
    weights /= total[:, None]
    fixed = (weights * (1 << PRECISION_BITS) + 0.5).astype(np.int32)
    return first.astype(np.int32), fixed


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W, C] uint8 to [B, *size, C]: columns first, both results rounded to 8 bits."""
    return _shrink(_shrink(images, 2, size[1]), 1, size[0])


def _shrink(images: Tensor, axis: int, n_out: int) -> Tensor:
    first, weights = resize_weights(images.shape[axis], n_out)
    start = torch.from_numpy(first).to(images.device, torch.int64)
    total = images.new_full((), HALF, dtype=torch.int32)
    for tap in range(weights.shape[1]):
        at = (start + tap).clamp_max(images.shape[axis] - 1)
        shape = [-1 if i == axis else 1 for i in range(images.dim())]
        weight = torch.from_numpy(weights[:, tap].copy()).to(images.device).view(shape)
        total = total + images.index_select(axis, at).to(torch.int32) * weight
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


def preprocess(
    images: Tensor,
    size: tuple[int, int],
    mean: Triple | None,
    std: Triple | None,
    swap_red_blue: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Resized, channels swapped, and with mean and std normalised to [B, 3, h, w]."""
    resized = resize(images, size)
    if swap_red_blue:
        resized = resized.flip(-1)
    if mean is None or std is None:
        return resized
    scale, shift = normalisation(mean, std)
    wide = torch.promote_types(dtype, torch.float32)
    a = torch.tensor(scale, device=images.device, dtype=wide)
    b = torch.tensor(shift, device=images.device, dtype=wide)
    return (resized.to(wide) * a + b).permute(0, 3, 1, 2).to(dtype).contiguous()


def normalisation(mean: Triple, std: Triple) -> tuple[Triple, Triple]:
    """(scale, shift) such that ``x * scale + shift`` is ``(x / 255 - mean) / std``."""
    r, g, b = zip(mean, std, strict=True)
    scale = (1 / (255 * r[1]), 1 / (255 * g[1]), 1 / (255 * b[1]))
    return scale, (-r[0] / r[1], -g[0] / g[1], -b[0] / b[1])


def check_arguments(
    images: Tensor, size: tuple[int, int], mean: Triple | None, std: Triple | None
) -> None:
    """Refuse what is no batch of images, or no size.

    Raises:
        InputError: names the argument, what was expected and what came.
    """
    check_rank("images", images, "B H W C")
    if images.dtype != torch.uint8 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise InputError(
            f"images: expected uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size: expected (H, W), both at least 1, got {size}")
    if (mean is None) != (std is None):
        raise InputError(f"std: expected mean and std together, got mean={mean}, std={std}")
    if (mean is not None and std is not None and (len(mean), len(std)) != (3, 3)) or (
        std is not None and min(std) <= 0
    ):
        raise InputError(f"std: expected three positive numbers, got mean={mean}, std={std}")
