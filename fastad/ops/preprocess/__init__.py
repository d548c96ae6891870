"""Frames on the device to network input: the integer resize that training used."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.ops.preprocess import op, reference
from fastad.ops.preprocess.reference import Triple

__all__ = ["preprocess", "why_unsupported"]

why_unsupported = op.why_unsupported


def preprocess(
    images: Tensor,  # [B, H, W, 3] uint8
    size: tuple[int, int],
    *,
    mean: Triple | None = None,
    std: Triple | None = None,
    swap_red_blue: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, h, w, 3] uint8, or normalised [B, 3, h, w] dtype
    """Resize frames of one size as Pillow does, bit for bit, and normalise them.

    Pillow's antialiased bilinear filter in 22-bit fixed point, columns first, 8 bits between the
    passes; then, with ``mean`` and ``std``, ``(x / 255 - mean) / std`` in float32.

    Args:
        images: Camera frames, RGB, or BGR with ``swap_red_blue``; 0..255.
        size: (h, w) of the result in pixels.
        mean: Per channel of the result, RGB, in 0..1. None keeps uint8 and the channels last.
        std: As ``mean``, positive.
        swap_red_blue: Exchange the first and the last channel.
        dtype: Of the normalised result.

    Raises:
        InputError: ``images`` is no uint8 [B, H, W, 3], or settings that do not fit.
        UnsupportedError: the CUDA kernel cannot take these; `why_unsupported` says why.

    >>> preprocess(torch.full((1, 6, 8, 3), 7, dtype=torch.uint8), (2, 3)).unique()
    tensor([7], dtype=torch.uint8)
    """
    reference.check_arguments(images, size, mean, std)
    result: Tensor = torch.ops.fastad.preprocess(images, size, mean, std, swap_red_blue, dtype)
    return result
