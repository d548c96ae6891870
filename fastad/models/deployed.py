"""The graph contract around a method: uint8 images in, map and raw score out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastad.models.registry import Method


class DeployedGraph(nn.Module):
    """A method with its normalisation inside: what exporters trace and parity is judged by."""

    scale: Tensor
    shift: Tensor

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        mean, std = torch.tensor(method.input.mean), torch.tensor(method.input.std)
        self.register_buffer("scale", (1.0 / (255.0 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` uint8 [B, H, W, 3] RGB; map float32 [B, H, W], raw score float32 [B]."""
        # Cast before the axes move: TensorRT transposes no uint8, and CPUs take the same time.
        x = image.float().permute(0, 3, 1, 2) * self.scale + self.shift
        anomaly_map, raw_score = self.method(x)
        return anomaly_map, raw_score
