"""The parity report: engine outputs against PyTorch in float32, on real images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Runtime
from fastad.errors import EngineError
from fastad.models.registry import Method
from fastad.spec import Calibration, ParityReport

from .to_onnx import DeployedGraph

MAP_LIMIT = 1e-3  # largest map difference over the range of the reference maps


@torch.no_grad()
def reference_outputs(method: Method, images: NDArray[np.uint8], batch: int = 8) -> Outputs:
    """What PyTorch says in float32 about uint8 RGB images [N, H, W, 3]."""
    graph = DeployedGraph(method).eval()
    parts = [graph(torch.from_numpy(images[i : i + batch])) for i in range(0, len(images), batch)]
    maps = torch.cat([anomaly_map for anomaly_map, _ in parts])
    scores = torch.cat([raw_score for _, raw_score in parts])
    return maps.numpy(), scores.numpy()


def compare(
    runtime: Runtime,
    images: NDArray[np.uint8],
    reference: Outputs,
    calibration: Calibration | None,
) -> ParityReport:
    """Run ``images`` [N, H, W, 3] singly and as a batch; report the worse of both.

    Decisions are compared at the pooled threshold, or without calibration at the median score.
    """
    ref_map, ref_score = reference
    batched = runtime.run(images)
    single = [runtime.run(images[i : i + 1]) for i in range(len(images))]
    single_map = np.concatenate([anomaly_map for anomaly_map, _ in single])
    single_score = np.concatenate([raw_score for _, raw_score in single])
    map_range = max(float(ref_map.max() - ref_map.min()), float(np.finfo(np.float32).tiny))
    threshold = calibration.pooled.value if calibration else float(np.median(ref_score))
    map_difference = np.maximum(abs(batched[0] - ref_map), abs(single_map - ref_map))
    score_difference = np.maximum(abs(batched[1] - ref_score), abs(single_score - ref_score))
    flips = ((batched[1] > threshold) != (ref_score > threshold)) | (
        (single_score > threshold) != (ref_score > threshold)
    )
    return ParityReport(
        runtime=runtime.name,
        precision=runtime.precision,
        images=len(images),
        map_max=float(map_difference.max() / map_range),
        map_mean=float(map_difference.mean() / map_range),
        score_max=float(score_difference.max() / map_range),
        decision_flips=int(flips.sum()),
    )


def check(report: ParityReport) -> None:
    """Refuse a graph that differs from PyTorch.

    Raises:
        EngineError: the largest map difference exceeds `MAP_LIMIT` of the range, or is NaN.
    """
    if not report.map_max <= MAP_LIMIT:
        raise EngineError(
            f"parity: {report.runtime} {report.precision} differs from PyTorch by "
            f"{report.map_max:.2e} of the map's range on {report.images} images, allowed is "
            f"{MAP_LIMIT:g}; the engine was not written"
        )
