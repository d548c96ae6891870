"""What InTra compares images with: gradient magnitude similarity, SSIM, and its map's filters.

All values are expected in 0..1: the constants of both similarities belong to that range.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastad.ops.anomaly_map import bilinear_matrix
from fastad.ops.anomaly_map.matrices import Matrix

GMS_C = 0.0026  # 170 / 255^2: keeps flat areas, where both gradients vanish, similar
SSIM_PX, SSIM_SIGMA_PX = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def gradient_magnitude(x: Tensor) -> Tensor:
    """Prewitt gradient magnitude of ``x`` float [B, C, H, W], same shape, at most about 1.4.

    Kernels are divided by 3. Borders repeat the edge pixel: zeros there would put the same strong
    gradient into both images and hide differences.
    """
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = p[:, :, :-2] + p[:, :, 1:-1] + p[:, :, 2:]
    columns = p[:, :, :, :-2] + p[:, :, :, 1:-1] + p[:, :, :, 2:]
    gx = (rows[:, :, :, 2:] - rows[:, :, :, :-2]) / 3.0
    gy = (columns[:, :, 2:] - columns[:, :, :-2]) / 3.0
    # 1e-12 keeps the slope of the root finite where both gradients are zero.
    return (gx.square() + gy.square() + 1e-12).sqrt()


def gms_distance(x: Tensor, y: Tensor) -> Tensor:
    """``1 - GMS`` of two images float [B, C, H, W], per value, in 0..1; 0 for equal gradients.

    ``1 - (2 g h + c) / (g^2 + h^2 + c)`` is written as ``(g - h)^2 / (g^2 + h^2 + c)``: the same
    number without the difference of two values near 1, which rounding would dominate.
    """
    g, h = gradient_magnitude(x), gradient_magnitude(y)
    return (g - h).square() / (g.square() + h.square() + GMS_C)


def multi_scale_gms_loss(y: Tensor, truth: Tensor, scales: int) -> Tensor:
    """Mean `gms_distance` over ``scales`` sizes, each half of the one before; a scalar.

    Args:
        y: Painted patches, float [B, C, K, K].
        truth: The patches themselves, like ``y``.
        scales: 1 compares at full size only.
    """
    total = gms_distance(y, truth).mean()
    for _ in range(scales - 1):
        y, truth = F.avg_pool2d(y, 2), F.avg_pool2d(truth, 2)
        total = total + gms_distance(y, truth).mean()
    return total / scales


class PatchLoss(nn.Module):
    """Squared error + GMS + SSIM between painted and true patches. Owns the SSIM blur.

    Args:
        patch_px: Side K of the patches.
        gms_weight: Weight of the gradient term.
        ssim_weight: Weight of the structural term.
        gms_scales: Sizes that the gradient term averages.
    """

    blur: Tensor

    def __init__(
        self, patch_px: int, gms_weight: float, ssim_weight: float, gms_scales: int
    ) -> None:
        super().__init__()
        self.gms_weight, self.ssim_weight, self.gms_scales = gms_weight, ssim_weight, gms_scales
        blur = blur_matrix(patch_px, SSIM_PX, SSIM_SIGMA_PX).astype(np.float32)
        self.register_buffer("blur", torch.from_numpy(blur), persistent=False)

    def ssim(self, y: Tensor, truth: Tensor) -> Tensor:
        """Structural similarity at every value of [B, C, K, K], in -1..1.

        A patch is little larger than the Gaussian window, so borders repeat the edge pixel.
        """

        def mean(x: Tensor) -> Tensor:
            return self.blur @ x @ self.blur.T

        m_y, m_t = mean(y), mean(truth)
        var_y, var_t = mean(y * y) - m_y * m_y, mean(truth * truth) - m_t * m_t
        covariance = mean(y * truth) - m_y * m_t
        similarity: Tensor = (2 * m_y * m_t + SSIM_C1) * (2 * covariance + SSIM_C2)
        return similarity / ((m_y * m_y + m_t * m_t + SSIM_C1) * (var_y + var_t + SSIM_C2))

    def forward(self, y: Tensor, truth: Tensor) -> Tensor:
        """The loss, a scalar, of painted and true patches float [B, C, K, K] in 0..1."""
        gms = multi_scale_gms_loss(y, truth, self.gms_scales)
        structure = 1.0 - self.ssim(y, truth).mean()
        return F.mse_loss(y, truth) + self.gms_weight * gms + self.ssim_weight * structure


class GradientMap(nn.Module):
    """`gms_distance` of two images, mean over colours, filtered at several sizes.

    Every pooling, blur and resize is folded into one matrix per axis and size, in float64.

    Args:
        size: (H, W) of the images.
        pools: Mean pooling before each blur; the results are averaged.
        blur_px: Taps of the Gaussian at the pooled size.
        sigma_px: Its width at the pooled size.
    """

    filters_h: Tensor
    filters_w: Tensor

    def __init__(
        self, size: tuple[int, int], pools: tuple[int, ...], blur_px: int, sigma_px: float
    ) -> None:
        super().__init__()
        for axis, n in zip("hw", size, strict=True):
            matrices = np.stack([map_matrix(n, pool, blur_px, sigma_px) for pool in pools])
            filters = torch.from_numpy(matrices.astype(np.float32))
            self.register_buffer(f"filters_{axis}", filters, persistent=False)  # [S, n, n]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map [B, H, W] in 0..1 of two images float [B, C, H, W]."""
        d = gms_distance(x, y).mean(1)[:, None]
        return (self.filters_h @ d @ self.filters_w.transpose(1, 2)).mean(1)


def blur_matrix(n: int, window: int, sigma_px: float) -> Matrix:
    """Gaussian blur of one axis with ``window`` taps, [n, n]; borders repeat the edge pixel."""
    offsets = np.arange(window) - window // 2
    kernel = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    i = np.arange(n)[:, None]
    matrix = np.zeros((n, n))
    np.add.at(
        matrix,
        (np.broadcast_to(i, (n, window)), np.clip(i + offsets, 0, n - 1)),
        np.broadcast_to(kernel / kernel.sum(), (n, window)),
    )
    return matrix


def map_matrix(n: int, pool: int, blur_px: int, sigma_px: float) -> Matrix:
    """Mean over ``pool`` pixels, Gaussian blur at that size, bilinear back to ``n``; [n, n]."""
    mean = np.kron(np.eye(n // pool), np.full((1, pool), 1.0 / pool))
    blur = blur_matrix(n // pool, blur_px, sigma_px)
    return bilinear_matrix(n, n // pool, align_corners=False) @ blur @ mean
