"""Parity: what a runtime computes against reference outputs, at export and on every machine."""

from __future__ import annotations

from os import PathLike

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Runtime
from fastad.engine.container import read_engine
from fastad.engine.select import RUNTIMES, open_runtime, why_unsupported
from fastad.errors import EngineError
from fastad.spec import ParityReport

MAP_LIMIT = 1e-3  # largest map difference over the range of the reference maps


def compare(
    runtime: Runtime, images: NDArray[np.uint8], reference: Outputs, threshold: float | None
) -> ParityReport:
    """Run ``images`` [N, H, W, 3] singly and as one batch; report the worse of both.

    Decisions are compared at ``threshold``, or without one at the median reference score.
    """
    ref_map, ref_score = reference
    batch_map, batch_score = runtime.run(images)
    single = [runtime.run(images[i : i + 1]) for i in range(len(images))]
    single_map = np.concatenate([anomaly_map for anomaly_map, _ in single])
    single_score = np.concatenate([raw_score for _, raw_score in single])
    map_range = max(float(ref_map.max() - ref_map.min()), float(np.finfo(np.float32).tiny))
    limit = float(np.median(ref_score)) if threshold is None else threshold
    map_difference = np.maximum(abs(batch_map - ref_map), abs(single_map - ref_map))
    score_difference = np.maximum(abs(batch_score - ref_score), abs(single_score - ref_score))
    expected = ref_score > limit
    flips = ((batch_score > limit) != expected) | ((single_score > limit) != expected)
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
    """Refuse a runtime that differs from the reference.

    Raises:
        EngineError: the largest map or score difference exceeds `MAP_LIMIT` of the map's range, or
            is NaN.
    """
    worst = np.max([report.map_max, report.score_max])  # NaN if either is
    if not worst <= MAP_LIMIT:
        raise EngineError(
            f"parity: {report.runtime} {report.precision} differs from PyTorch by {worst:.2e} of "
            f"the map's range on {report.images} images, allowed is {MAP_LIMIT:g}"
        )


def verify(path: str | PathLike[str]) -> tuple[list[ParityReport], list[str]]:
    """Rerun an engine's golden images on every runtime of this machine, in float32.

    Returns:
        A report per runtime, and a sentence for each runtime that is not here.

    Raises:
        EngineError: the file is damaged, or a runtime differs by more than `MAP_LIMIT`.
    """
    with read_engine(path) as engine:
        manifest, golden = engine.manifest, engine.golden()
        graph = engine.member(manifest.variants[0].member)
    threshold = manifest.calibration.pooled.value if manifest.calibration else None
    reports, absent = [], []
    for name in RUNTIMES:
        reason = why_unsupported(name, "fp32")
        if reason:
            absent.append(reason)
            continue
        runtime = open_runtime(graph, name, "fp32", "cpu")
        try:
            reference = (golden.anomaly_map, golden.raw_score)
            reports.append(compare(runtime, golden.images, reference, threshold))
        finally:
            runtime.close()
        check(reports[-1])
    return reports, absent
