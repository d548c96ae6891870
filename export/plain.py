"""Plain model files for programs that do not use fastad, with a description beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.atomic import check_target
from fastad.engine import parity, tensorrt
from fastad.engine.base import Runtime
from fastad.engine.openvino import OpenVINORuntime
from fastad.engine.plans import Plan
from fastad.engine.pytorch import PyTorchRuntime
from fastad.engine.select import open_runtime, why_unsupported
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.spec import InputSpec, ParityReport
from fastad.training.checkpoint import Record, load_checkpoint, write_bytes
from fastad.training.progress import Report

from .engine import versions
from .to_onnx import describe_onnx, to_onnx
from .to_openvino import describe_ir, to_openvino
from .to_tensorrt import build_plan

SUFFIXES: Mapping[str, str] = {"onnx": ".onnx", "openvino": ".xml", "plan": ".plan"}
DEVICE = "cuda"  # the GPU that a plan is built for
SIDECAR_VERSION = 1
PARITY_IMAGES = 3

RESIZE = (
    "Pillow's Image.resize(BILINEAR) on 8-bit channels: the horizontal pass first, then the "
    "vertical one; the result of each is rounded to 8 bits. Of an axis with n_in and n_out pixels: "
    "scale = n_in / n_out, support = max(scale, 1). Output pixel i has its center at "
    "(i + 0.5) * scale and reads input pixels j from max(trunc(center - support + 0.5), 0) up to, "
    "not including, min(trunc(center + support + 0.5), n_in), each with the weight "
    "max(0, 1 - |j + 0.5 - center| / support) over the sum of these weights (float64). Weights are "
    "fixed point: trunc(0.5 + weight * 2^22). A pixel is (2^21 + sum of weight * value) >> 22, "
    "clipped to 0..255. No cropping, no letter box: the whole image is stretched to the size."
)


def export_plain(
    run: str | Path,
    out: str | Path,
    format: str,  # noqa: A002 - the name of the command's option
    *,
    report: Report | None = None,
) -> Path:
    """Write a trained run as plain model files with a description beside them.

    ``OUT.json`` says what a program needs to feed the file and to read its outputs. It is removed
    first and written last: with it the set is complete, and its digests fit. The files are
    compared with PyTorch before any is written, on three synthetic images.

    Args:
        run: Run folder or checkpoint folder.
        out: The file to write: ``.onnx``, ``.plan``, or ``.xml`` for OpenVINO, whose ``.bin`` goes
            beside it.
        format: ``onnx``: operators as nodes of the domain ``fastad`` with functions of standard
            operators. ``openvino``: IR that any OpenVINO loads. ``plan``: float32 for the TensorRT
            and the first GPU of this machine; a program needs TensorRT only, no plugin library.
        report: Receives progress; None is silent.

    Returns:
        ``out``.

    Raises:
        InputError: no checkpoint, an unknown format, a suffix that does not fit it, or a folder
            that does not exist.
        UnsupportedError: torch or OpenVINO cannot express the method, or a plan was asked for
            where there is no TensorRT or no GPU.
        EngineError: the file differs from PyTorch, or cannot be written.
    """
    out = Path(out)
    if format not in SUFFIXES:
        raise InputError(
            f"format: expected {', '.join(SUFFIXES)}, got {format!r}; engine files come from "
            "export_engine"
        )
    if out.suffix != SUFFIXES[format]:
        raise InputError(f"out: expected a name ending in {SUFFIXES[format]}, got {out}")
    if format == "plan" and (reason := tensorrt.why_unsupported("fp32", DEVICE)):
        raise UnsupportedError(f"{reason}; a plan is built on the machine that will run it")
    check_target(out)
    checkpoint = load_checkpoint(run)
    _tell(report, 1, "graph")
    graph = to_onnx(checkpoint.method)
    plan: Plan | None = None
    if format == "onnx":
        files, about = {out: graph}, describe_onnx(graph)
    elif format == "openvino":
        xml, weights = to_openvino(graph)
        files, about = {out: xml, out.with_suffix(".bin"): weights}, describe_ir(xml)
    else:
        plan, data = build_plan(graph, tensorrt.this_machine(DEVICE))
        files, about = {out: data}, _describe_plan(plan)
    _tell(report, 2, "parity")
    images = _images(checkpoint.record.spec.input.size)
    reports = _compare(files, plan, images, PyTorchRuntime(checkpoint.method).run(images))
    text = json.dumps(_describe(format, files, about, checkpoint.record, reports), indent=1)
    sidecar = out.with_name(f"{out.name}.json")
    try:
        sidecar.unlink(missing_ok=True)
    except OSError as error:
        raise EngineError(f"{sidecar}: cannot be replaced ({error.strerror})") from error
    for path, data in [*files.items(), (sidecar, f"{text}\n".encode())]:
        write_bytes(path, data)
    _tell(report, 3, "written")
    return out


def _images(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Black, noise, and a smooth pattern with a bright square; the same on every machine."""
    H, W = size
    images = np.zeros((PARITY_IMAGES, H, W, 3), np.uint8)
    images[1] = np.random.default_rng(0).integers(0, 256, (H, W, 3))
    y, x = np.mgrid[:H, :W]
    images[2] = (127 + 60 * np.sin(x / 9) * np.cos(y / 7))[..., None] + [0, 20, 40]
    images[2, H // 3 : H // 2, W // 3 : W // 2] = 255
    return images


def _compare(
    files: Mapping[Path, bytes],
    plan: Plan | None,
    images: NDArray[np.uint8],
    reference: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> list[ParityReport]:
    """Every runtime that takes these files against PyTorch; ``plan`` describes a TensorRT one.

    Raises:
        EngineError: a runtime differs by more than `parity.MAP_LIMIT`.
    """
    graph, *weights = files.values()
    runtimes: list[Runtime] = []
    if plan is not None:
        runtimes.append(tensorrt.TensorRTRuntime(graph, plan, DEVICE))
    else:
        joined = b"".join(weights)
        runtimes.append(OpenVINORuntime(graph, "fp32", weights=joined, cache=False))
        if not weights and why_unsupported("onnxruntime", "fp32") is None:
            runtimes.append(open_runtime(graph, "onnxruntime", "fp32", "cpu"))
    reports = []
    for runtime in runtimes:
        try:
            reports.append(parity.compare(runtime, images, reference, None))
        finally:
            runtime.close()
        parity.check(reports[-1])
    return reports


def _describe_plan(plan: Plan) -> dict[str, Any]:
    """What a program that loads the plan has to know about it."""
    return {
        "tensorrt": plan.tensorrt,
        "gpu": plan.gpu,
        "compute_capability": list(plan.capability),
        "hardware": plan.hardware,
        "version_compatible": plan.version_compatible,
        "max_batch": plan.max_batch,
        "profiles": "optimization profile 0 takes a batch of 1, profile 1 one of 2 to max_batch",
        "plugins": list(plan.plugins),
        "plugins_where": "compiled into the plan; loading it needs no library and no Python",
    }


def _describe(
    format_: str,
    files: Mapping[Path, bytes],
    about: Mapping[str, Any],
    record: Record,
    reports: list[ParityReport],
) -> dict[str, Any]:
    spec = record.spec
    H, W = spec.input.size
    return {
        "sidecar_version": SIDECAR_VERSION,
        "format": format_,
        "files": {
            path.name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in files.items()
        },
        "graph": dict(about),
        "method": spec.method,
        "config": spec.config,
        "categories": list(spec.categories),
        "input": _describe_input(spec.input),
        "outputs": {
            "anomaly_map": {
                "dtype": "float32",
                "shape": ["batch", H, W],
                "rule": spec.map_rule,
                "meaning": "higher is more anomalous; no fixed range, compare with map_scale; for "
                "the original image size resize it bilinearly without antialiasing",
            },
            "raw_score": {
                "dtype": "float32",
                "shape": ["batch"],
                "rule": spec.score_rule,
                "meaning": "higher is more anomalous; no fixed range, compare with a threshold",
            },
        },
        "decision": {
            "label": "anomalous exactly when raw_score > threshold.value; the threshold of the "
            "image's category where there is one, else the pooled one",
            "score": "z = (raw_score - value) / (value - median), 0.5 + 0.5 * z / (1 + |z|): in "
            "0..1, 0.5 at the threshold",
            "mask": "pixels of the map above (map_scale[0] + map_scale[1]) / 2",
            "heat_map": "map_scale[0] is the coldest colour, map_scale[1] the hottest",
        },
        "calibration": asdict(record.calibration) if record.calibration else None,
        "precision": {
            "weights": "float32",
            "set": "state float32 explicitly: OpenVINO computes in bfloat16 by itself on CPUs that "
            "have it. The thresholds are calibrated in float32",
            "openvino": {"INFERENCE_PRECISION_HINT": "f32"},
            "tensorrt": {"BuilderFlag::kTF32": False},
        },
        "parity": [asdict(report) for report in reports],
        "provenance": record.provenance | versions(),
    }


def _describe_input(spec: InputSpec) -> dict[str, Any]:
    H, W = spec.size
    return {
        "name": "image",
        "dtype": "uint8",
        "shape": ["batch", H, W, 3],
        "layout": "NHWC, rows from the top, contiguous",
        "color": "RGB; grey images have their value three times, alpha is dropped",
        "value_range": [0, 255],
        "grey_levels": list(spec.value_range) if spec.value_range else None,
        "grey_levels_rule": "images of more than 8 bits: grey_levels = [low, high] become 0 and "
        "255 linearly, rounded half to even and clipped, before the resize; null means 8-bit only",
        "resize": {"rule": spec.resize, "height": H, "width": W, "words": RESIZE},
        "normalization": {
            "where": "inside the graph; feed bytes",
            "words": "(value / 255 - mean) / std per channel R, G, B",
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
    }


def _tell(report: Report | None, step: int, what: str) -> None:
    if report:
        report("export", step, 3, what)
