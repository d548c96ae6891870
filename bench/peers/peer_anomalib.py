"""anomalib's own networks through its own inferencers, in its own environment.

Its defaults: Reverse Distillation with WideResNet-50-2 at 256 px, EfficientAd small at 256 px.
Weights are random and nothing is downloaded. The OpenVINO file comes from ``to_openvino()`` as it
stands, so its graph takes frames of any size and resizes them itself, and OpenVINO chooses the
precision. `TorchInferencer.predict` records gradients by itself; here it need not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.models import EfficientAd, ReverseDistillation
from numpy.typing import NDArray

from bench.peers.worker import Peer, Setup, Verdict

Inferencer = Callable[[NDArray[np.uint8]], Any]


def open_peer(setup: Setup) -> Peer:
    """Options: ``network``, "rd" or "efficientad"; ``inferencer``, "torch" or "openvino"."""
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    if setup.options["network"] == "rd":
        model, name = ReverseDistillation(pre_trained=False), "rd4ad wide_resnet50_2"
    else:
        model, name = EfficientAd(), "EfficientAd small"
    model.eval()
    if setup.options["inferencer"] == "openvino":
        infer, precision = openvino_inferencer(model, setup.threads)
    else:
        infer, precision = torch_inferencer(model), "fp32"

    def predict(frame: NDArray[np.uint8]) -> Verdict:
        found = infer(frame)
        anomaly_map = np.asarray(found.anomaly_map, np.float32).squeeze()
        return anomaly_map, float(np.asarray(found.pred_score).squeeze())

    about = {
        "network": name,
        "size": list(model.input_size),
        "weights": "random",
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "precision": precision,
    }
    return Peer(predict, about)


def openvino_inferencer(model: Any, threads: int) -> tuple[Inferencer, str]:
    """The exported file in anomalib's inferencer, and the precision OpenVINO runs it in."""
    path = model.to_openvino(Path("exported"))
    inferencer = OpenVINOInferencer(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    used = inferencer.model.get_property("INFERENCE_PRECISION_HINT").to_string()
    return inferencer.predict, {"f32": "fp32"}.get(used, used)


def torch_inferencer(model: Any) -> Inferencer:
    # The file was written a line above; anomalib asks for this before it reads any.
    os.environ["TRUST_REMOTE_CODE"] = "1"
    inferencer = TorchInferencer(model.to_torch(Path("exported")), "cpu")

    def infer(frame: NDArray[np.uint8]) -> Any:
        with torch.inference_mode():
            return inferencer.predict(frame)

    return infer
