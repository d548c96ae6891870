"""PyTorch as a runtime: the only bridge from running to torch. Checkpoints are judged with it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Precision
from fastad.errors import EngineError
from fastad.models.deployed import DeployedGraph
from fastad.models.registry import Method


class PyTorchRuntime:
    """The method itself in float32 on the CPU: the reference of every parity report.

    Args:
        method: A trained method; it is put into eval mode.
    """

    name = "pytorch"

    def __init__(self, method: Method) -> None:
        self.precision: Precision = "fp32"
        self._graph: DeployedGraph | None = DeployedGraph(method).eval()

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch; see `fastad.engine.base.Runtime`."""
        graph = self._graph
        if graph is None:
            raise EngineError("pytorch: the runtime is closed; load the checkpoint again")
        # Golden images are read-only, which torch cannot express.
        writable = np.require(images, requirements=["C", "W"])
        with torch.inference_mode():
            anomaly_map, raw_score = graph(torch.from_numpy(writable))
        return anomaly_map.numpy(), raw_score.numpy()

    def close(self) -> None:
        """Drop the method."""
        self._graph = None
