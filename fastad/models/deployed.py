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
        # A row of pixels, because runtimes are slow at repeating three values.
        W = method.input.size[1]
        self.register_buffer("scale", (1.0 / (255.0 * std)).repeat(W, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).repeat(W, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` uint8 [B, H, W, 3] RGB; map float32 [B, H, W], raw score float32 [B]."""
        # All in the order that pixels come in, and then the axes move: a runtime whose first layer
        # wants channels last moves nothing. TensorRT could not transpose uint8 anyway.
        x = image.float() * self.scale + self.shift
        anomaly_map, raw_score = self.method(x.permute(0, 3, 1, 2))
        return anomaly_map, raw_score
