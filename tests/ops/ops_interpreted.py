"""What runs in the interpreting process beside `ops_compare`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fastad.ops.anomaly_map import cases as anomaly_map_cases


def preprocess(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] to [*size, 3] by the kernel."""
    from fastad.ops.preprocess import triton_impl

    out = torch.empty(1, *size, 3, dtype=torch.uint8)
    triton_impl.preprocess(torch.from_numpy(image)[None], None, None, False, out)
    return out[0].numpy()


def postprocess(
    anomaly_map: NDArray[np.float32], size: tuple[int, int], threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """[h, w] to [*size] and its mask by the kernel."""
    from fastad.ops.postprocess import triton_impl

    out = torch.empty(1, *size), torch.empty(1, *size, dtype=torch.bool)
    triton_impl.postprocess(torch.from_numpy(anomaly_map)[None], threshold, out)
    return out[0][0].numpy(), out[1][0].numpy()


def score_of_broken_features() -> list[float]:
    """Scores of two images, the first with a NaN in one feature."""
    case = next(c for c in anomaly_map_cases.CASES if c.name == "grad")
    arguments = case.make(torch.float32)
    arguments["feat"][0][0, 3, 2, 1] = float("nan")
    out = anomaly_map_cases.empty(arguments)
    anomaly_map_cases.kernel(out=out, **arguments)
    scores: list[float] = out[1].tolist()
    return scores
