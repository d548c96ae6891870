"""Parity: what a runtime computes against reference outputs, at export and on every machine."""

from __future__ import annotations

from os import PathLike
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Precision, Runtime
from fastad.engine.container import read_engine
from fastad.engine.opening import GPU_RUNTIMES, open_engine, why_engine_unsupported
from fastad.engine.select import RUNTIMES, RuntimeName, open_runtime, why_inexact, why_unsupported
from fastad.errors import EngineError
from fastad.spec import ParityReport

MAP_LIMIT = 1e-3  # largest map difference over the range of the reference maps
# Other precisions may differ from PyTorch by this much of what the export saw on more images: int8
# and bfloat16 kernels round differently from CPU to CPU, a wrong graph is further off.
FACTOR = 2.0


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


def check(report: ParityReport, limit: float = MAP_LIMIT) -> None:
    """Refuse a runtime that differs from the reference.

    Raises:
        EngineError: the largest map or score difference exceeds ``limit`` of the map's range, or
            is NaN.
    """
    worst = np.max([report.map_max, report.score_max])  # NaN if either is
    if not worst <= limit:
        raise EngineError(
            f"parity: {report.runtime} {report.precision} differs from PyTorch by {worst:.2e} of "
            f"the map's range on {report.images} images, allowed is {limit:g}"
        )


def verify(path: str | PathLike[str]) -> tuple[list[ParityReport], list[str]]:
    """Rerun an engine's golden images on every runtime of this machine: CPUs in every precision.

    GPUs run float32 here; a TensorRT plan of another precision is compared when it is built.

    float32 must agree with PyTorch to `MAP_LIMIT`; a variant of another precision may differ by
    `FACTOR` times what its own report of the export says. Refused variants are left out.

    Returns:
        A report per runtime and precision, and a sentence for each that is not here.

    Raises:
        EngineError: the file is damaged, or a runtime differs by more than allowed.
    """
    reports, absent = _verify_gpu(path)
    with read_engine(path) as engine:
        manifest, golden = engine.manifest, engine.golden()
        graphs = {v.member: engine.member(v.member) for v in manifest.variants}
    full, *lower = manifest.variants
    runs = [(full.member, str(name), "fp32", MAP_LIMIT) for name in RUNTIMES]
    for variant in lower:
        if reason := why_inexact(variant):
            absent += [f"{report.runtime} {reason}" for report in variant.parity]
            continue
        runs += [(variant.member, r.runtime, r.precision, _limit(r)) for r in variant.parity]
    threshold = manifest.calibration.pooled.value if manifest.calibration else None
    reference = (golden.anomaly_map, golden.raw_score)
    for member, name, precision, limit in runs:
        reason = why_unsupported(cast(RuntimeName, name), cast(Precision, precision))
        if reason:
            absent.append(reason)
            continue
        runtime = open_runtime(graphs[member], name, precision, "cpu")
        try:
            reports.append(compare(runtime, golden.images, reference, threshold))
        finally:
            runtime.close()
        check(reports[-1], limit)
    return reports, absent


def _verify_gpu(path: str | PathLike[str]) -> tuple[list[ParityReport], list[str]]:
    """The same for the GPU runtimes of this machine, in float32."""
    reports, absent = [], []
    with read_engine(path) as engine:
        golden, fitted = engine.golden(), engine.manifest.calibration
        for name in GPU_RUNTIMES:
            if reason := why_engine_unsupported(engine, name, "fp32", "cuda"):
                absent.append(reason)
                continue
            runtime = open_engine(engine, name, "fp32", "cuda")
            try:
                reference = (golden.anomaly_map, golden.raw_score)
                threshold = fitted.pooled.value if fitted else None
                reports.append(compare(runtime, golden.images, reference, threshold))
            finally:
                runtime.close()
            check(reports[-1], MAP_LIMIT)
    return reports, absent


def _limit(report: ParityReport) -> float:
    return MAP_LIMIT + FACTOR * max(report.map_max, report.score_max)
