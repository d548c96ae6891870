"""Checkpoint in, engine file out: graph, parity on real images, golden images, manifest."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastad.engine import parity
from fastad.engine.base import Outputs
from fastad.engine.container import Golden, write_engine
from fastad.engine.pytorch import PyTorchRuntime
from fastad.engine.select import RUNTIMES, open_runtime, why_unsupported
from fastad.errors import FastadWarning, InputError
from fastad.spec import Manifest, ParityReport, Variant
from fastad.training.checkpoint import Checkpoint, load_checkpoint
from fastad.training.folder import Sample, load_images
from fastad.training.progress import Report

from .to_onnx import OPSET, to_onnx

PARITY_IMAGES = 16
GOLDEN_IMAGES = 2
GRAPH = "model.onnx"


def export_engine(
    run: str | Path,
    out: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    report: Report | None = None,
) -> Path:
    """Write the engine file of a trained run.

    Every runtime of this machine computes real images and is compared with PyTorch in float32; a
    difference above `parity.MAP_LIMIT` of the map's range stops the export.

    Args:
        run: Run folder or checkpoint folder.
        out: The ``.engine`` file to write; replaced only when the new one is complete.
        images: Images for parity and golden outputs; None takes held-out normal ones of the run.
        report: Receives progress; None is silent.

    Returns:
        The path written.

    Raises:
        InputError: no checkpoint, no images, or ``out`` has another suffix.
        UnsupportedError: torch cannot express the method as a graph.
        EngineError: parity failed, or the file could not be written.
    """
    out = Path(out)
    if out.suffix != ".engine":
        raise InputError(f"out: expected a name ending in .engine, got {out}")
    if not out.parent.is_dir():
        raise InputError(f"out: the folder {out.parent} does not exist; create it first")
    checkpoint = load_checkpoint(run)
    record, method = checkpoint.record, checkpoint.method
    if record.calibration is None:
        warnings.warn(
            f"{checkpoint.path}: not calibrated, the engine will have no threshold; run "
            "`fastad calibrate` first",
            FastadWarning,
            stacklevel=2,
        )
    threshold = record.calibration.pooled.value if record.calibration else None
    pixels = _parity_images(checkpoint, images)
    _tell(report, 1, "PyTorch reference")
    reference = _reference(PyTorchRuntime(method), pixels)
    _tell(report, 2, "graph")
    graph = to_onnx(method)
    reports: list[ParityReport] = []
    for name in RUNTIMES:
        if why_unsupported(name, "fp32") is None:
            _tell(report, 3, f"parity on {name}")
            runtime = open_runtime(graph, name, "fp32", "cpu")
            try:
                reports.append(parity.compare(runtime, pixels, reference, threshold))
            finally:
                runtime.close()
            parity.check(reports[-1])
    manifest = Manifest(
        spec=record.spec,
        variants=(Variant(GRAPH, "fp32", tuple(reports)),),
        calibration=record.calibration,
        provenance=record.provenance | _versions(),
    )
    golden = slice(0, GOLDEN_IMAGES)
    members = {
        GRAPH: graph,
        **Golden(pixels[golden], reference[0][golden], reference[1][golden]).members(),
    }
    written = write_engine(out, manifest, members)
    _tell(report, 4, "written")
    return written


def _parity_images(
    checkpoint: Checkpoint, images: Sequence[str | Path] | None
) -> NDArray[np.uint8]:
    record = checkpoint.record
    if images is not None:
        found = [Path(image) for image in images]
        lost = "images: {missing} of {all} files given are not there, such as {first}"
    else:
        names = record.holdout or record.fit
        if not names:
            raise InputError(
                f"{checkpoint.path}: an imported run names no images; pass --images with a few "
                "normal ones for the parity check"
            )
        found = [Path(record.data_root) / name for name in names]
        lost = (
            "images: {missing} of the run's own {all} images are not there any more, such as "
            "{first}; pass --images with a few normal ones"
        )
    step = max(1, len(found) // PARITY_IMAGES)  # spread over the categories
    paths = found[::step][:PARITY_IMAGES]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        first = missing[0] if missing else "none given"
        raise InputError(lost.format(missing=len(missing), all=len(paths), first=first))
    samples = [Sample(path, "", False) for path in paths]
    spec = record.spec.input
    batches = load_images(samples, spec.size, spec.value_range)
    return np.concatenate([batch for batch, _ in batches])


def _reference(runtime: PyTorchRuntime, images: NDArray[np.uint8]) -> Outputs:
    single = [runtime.run(images[i : i + 1]) for i in range(len(images))]
    return (
        np.concatenate([anomaly_map for anomaly_map, _ in single]),
        np.concatenate([raw_score for _, raw_score in single]),
    )


def _versions() -> dict[str, str]:
    found = {
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "opset": str(OPSET),
        "export_machine": f"{platform.system()} {platform.machine()}",
    }
    for package in ("onnx", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _tell(report: Report | None, step: int, what: str) -> None:
    if report:
        report("export", step, 4, what)
