"""Resizing, blurring and pooling of maps as matrices: ``out = A @ map @ B.T``.

All of these are linear and separable, so a chain of them is one product of matrices per axis,
computed once in float64. Every runtime has MatMul, and the result has no border special cases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def bilinear_matrix(n_out: int, n_in: int, *, align_corners: bool) -> Matrix:
    """Bilinear resize of one axis, [n_out, n_in], as ``torch.nn.functional.interpolate`` does it.

    ``align_corners=False`` uses half-pixel centres and repeats the border value.
    """
    i = np.arange(n_out)
    if align_corners:
        x = i * ((n_in - 1) / (n_out - 1)) if n_out > 1 else np.zeros(1)
    else:
        x = np.clip((i + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    low = np.minimum(np.floor(x).astype(int), n_in - 1)
    high = np.minimum(low + 1, n_in - 1)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (i, low), 1 - (x - low))
    np.add.at(matrix, (i, high), x - low)
    return matrix


def mean_pool_matrix(n: int, window: int, padding: int = 0) -> Matrix:
    """Mean over ``window`` neighbours, stride 1, zero padding, divisor always ``window``.

    Returns:
        [n + 2 * padding - window + 1, n].
    """
    first = np.arange(n + 2 * padding - window + 1)[:, None] - padding
    j = np.arange(n)[None, :]
    return ((j >= first) & (j < first + window)) / window


def gaussian_matrix(n: int, sigma_px: float, truncate: float = 4.0) -> Matrix:
    """Gaussian blur of one axis, [n, n], as ``scipy.ndimage.gaussian_filter`` does it.

    The kernel reaches ``truncate * sigma_px`` pixels; borders mirror with the edge pixel repeated.
    """
    radius = int(truncate * sigma_px + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    folded = (np.arange(n)[:, None] + offsets[None, :]) % (2 * n)
    source = np.where(folded < n, folded, 2 * n - 1 - folded)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.broadcast_to(np.arange(n)[:, None], source.shape), source), kernel[None])
    return matrix
