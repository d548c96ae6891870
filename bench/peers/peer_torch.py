"""The reference model in PyTorch: eager, and through `torch.compile`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.peers.worker import Peer, Setup, Verdict
from fastad.models.registry import Method
from fastad.training.checkpoint import load_checkpoint


def open_peer(setup: Setup) -> Peer:
    """Options: ``run``, a run folder; ``compile``, whether to call `torch.compile`."""
    torch.set_num_threads(setup.threads)
    method = load_checkpoint(setup.options["run"]).method.eval()
    model = torch.compile(method) if setup.options["compile"] else method
    mean = torch.tensor(method.input.mean).view(1, 3, 1, 1)
    std = torch.tensor(method.input.std).view(1, 3, 1, 1)

    @torch.inference_mode()
    def predict(frame: NDArray[np.uint8]) -> Verdict:
        pixels = torch.from_numpy(resized(frame, method.input.size))
        x = (pixels.permute(2, 0, 1)[None].float() / 255.0 - mean) / std
        anomaly_map, raw_score = model(x)
        return anomaly_map[0].numpy(), raw_score.item()

    return Peer(predict, describe(method))


def resized(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """``frame`` [H, W, 3] at model size (H, W), by the rule that the model was trained with."""
    H, W = size
    return np.array(Image.fromarray(frame).resize((W, H), Image.Resampling.BILINEAR))


def describe(method: Method) -> dict[str, Any]:
    """What the result says of a row that runs the reference model itself."""
    backbone = method.spec.config.get("backbone") or {}
    return {
        "network": f"{method.name} {backbone.get('name', '')}".strip(),
        "size": list(method.input.size),
        "weights": "run",
        "parameters": sum(p.numel() for p in method.parameters()),
        "precision": "fp32",
    }
