"""Checkpoint in, engine file out: graphs, parity and gate on real images, manifest."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastad import _native
from fastad.atomic import check_target
from fastad.engine import parity
from fastad.engine.base import Outputs, Precision
from fastad.engine.container import MODEL, WEIGHTS, Golden, write_engine
from fastad.engine.pytorch import PyTorchRuntime, weights_member
from fastad.engine.select import RUNTIMES, open_runtime, why_unsupported
from fastad.errors import EngineError, FastadWarning, InputError, UnsupportedError
from fastad.spec import Manifest, ParityReport, Variant
from fastad.training.checkpoint import Checkpoint, Record, load_checkpoint
from fastad.training.folder import Sample, load_images, scan
from fastad.training.progress import Report

from .gate import Limits, load_gate_images
from .precision import Candidate, parse_precisions, try_precisions
from .to_onnx import OPSET, to_onnx

PARITY_IMAGES = 16
GOLDEN_IMAGES = 2
RANGE_IMAGES = 32  # normal images that int8's value ranges are measured on
GATE_IMAGES = 128  # held-out normal images that judge a precision, at most
MADE: tuple[Precision, ...] = ("int8", "int8-bf16", "fp16")  # other graphs than float32's


def export_engine(
    run: str | Path,
    out: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    precision: str | Sequence[str] = "fp32",
    test_data: str | Path | None = None,
    mask_folder: str = "ground_truth",
    limits: Limits | None = None,
    weights: bool = False,
    weight_bits: int | None = None,
    report: Report | None = None,
) -> Path:
    """Write the engine file of a trained run.

    Every runtime of this machine computes real images and is compared with PyTorch in float32; a
    difference above `parity.MAP_LIMIT` of the map's range stops the export. Every other precision
    is compared with float32 of the same runtime (`fastad.export.gate`) and refused, with the reason
    in the file, where it loses too much or fails; float32 is then written all the same.

    Args:
        run: Run folder or checkpoint folder.
        out: The ``.engine`` file to write; replaced only when the new one is complete.
        images: Normal images for parity, golden outputs and gate; None takes the run's held-out
            ones. The gate leaves out what training saw, and where the run's training images are
            gone, half of the others measure value ranges instead.
        precision: ``fp32``, a list with any of ``bf16``, ``int8``, ``int8-bf16``, ``fp16``, or
            ``auto`` for all that may help a CPU. float32 is always there and the default: a call
            that trains or tests models should not spend minutes on a search it did not ask for, nor
            run another precision afterwards. The command line's default is ``auto``.
        test_data: Labelled images in any layout `scan` reads, for AUROC and AUPRO; None leaves the
            gate with normal images only.
        mask_folder: Name of the folder with masks inside each category of ``test_data``.
        limits: What a precision may lose; None takes the defaults.
        weights: Store the weights as well, for PyTorch on a GPU; about doubles the file.
        weight_bits: Of int8 weights: 8, which CPUs without dot products of int8 will not run, or 7,
            which give the same sums on every CPU. None takes 8 where this CPU can judge them.
        report: Receives progress; None is silent.

    Returns:
        The path written.

    Raises:
        InputError: no checkpoint, no images, no test images, an unknown precision, one asked for by
            name without images that could judge it, ``out`` has another suffix, or ``weight_bits``
            is neither 7 nor 8.
        UnsupportedError: torch cannot express the method as a graph, no runtime of this machine has
            a precision that was asked for by name, onnxruntime's quantizer is missing for it, or
            this CPU cannot judge ``weight_bits``.
        EngineError: float32 failed parity, or the file could not be written.
    """
    out = Path(out)
    if out.suffix != ".engine":
        raise InputError(f"out: expected a name ending in .engine, got {out}")
    check_target(out)
    bits = _weight_bits(weight_bits)
    precisions = parse_precisions(precision)
    by_name = precision != "auto" and list(precision) != ["auto"]
    if reason := _why_not_made(precisions):
        if by_name:
            raise UnsupportedError(reason)
        _warn(reason)
        precisions = tuple(p for p in precisions if p not in MADE)
    if by_name:
        _check_available(precisions)
    tested = scan(test_data, None, mask_folder).test if test_data is not None else ()
    if test_data is not None and not tested:
        raise InputError(f"{test_data}: expected test images in <category>/test/, found none")
    checkpoint = load_checkpoint(run)
    record, method = checkpoint.record, checkpoint.method
    if record.calibration is None:
        _warn(
            f"{checkpoint.path}: not calibrated, the engine will have no threshold; run "
            "`fastad calibrate` first"
        )
    threshold = record.calibration.pooled.value if record.calibration else None
    normal = _normal_images(checkpoint, images)
    judging, ranges = _gate_paths(record, normal, tested)
    if len(precisions) > 1 and not (ranges and (judging or tested)):
        reason = (
            f"precision: {', '.join(precisions[1:])} cannot be judged, training saw all the normal "
            "images there are; train with train.holdout above 0, pass --images with other normal "
            "ones, or --test-data with labelled ones"
        )
        if by_name:
            raise InputError(reason)
        _warn(f"{reason}; the engine holds float32 only")
        precisions = ("fp32",)
    spread = normal[:: max(1, len(normal) // PARITY_IMAGES)][:PARITY_IMAGES]  # over the categories
    pixels = _read(spread, record)
    _tell(report, 1, "PyTorch reference")
    reference = _reference(PyTorchRuntime(method), pixels)
    _tell(report, 2, "graph")
    graph = to_onnx(method)
    members = {MODEL: graph} | ({WEIGHTS: weights_member(method)} if weights else {})
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
    variants = [Variant(MODEL, "fp32", tuple(reports), RUNTIMES)]
    if len(precisions) > 1:
        held = load_gate_images(_samples(judging), tested, record.spec.input)
        limits = limits or Limits()
        found = try_precisions(
            graph, precisions, _read(ranges, record), held, threshold, limits, report, bits
        )
        try:
            lower = [c for c in found if c.variant.precision != "fp32"]
            full = tuple(c.report for c in found if c.variant.precision == "fp32")
            variants = [dataclasses.replace(variants[0], gate=full)]
            variants += [_with_parity(c, pixels, reference, threshold) for c in lower]
            members |= {c.variant.member: c.graph for c in lower if c.runtime}
        finally:
            for candidate in found:
                candidate.close()
    manifest = Manifest(
        spec=record.spec,
        variants=tuple(variants),
        calibration=record.calibration,
        provenance=record.provenance | versions(),
    )
    golden = slice(0, GOLDEN_IMAGES)
    members |= Golden(pixels[golden], reference[0][golden], reference[1][golden]).members()
    written = write_engine(out, manifest, members)
    _tell(report, 4, "written")
    return written


def _weight_bits(asked: int | None) -> int:
    """Of int8 weights, checked."""
    exactly = _native.sums_int8_exactly()
    if asked is None:
        return 8 if exactly else 7
    if isinstance(asked, bool) or asked not in (7, 8):
        raise InputError(f"weight_bits: expected 7 or 8, got {asked!r}")
    if asked == 8 and not exactly:
        raise UnsupportedError(
            "weight_bits: this CPU has no dot products of int8 (AVX512-VNNI or AVX-VNNI): sums of "
            "8-bit weights saturate here, and it cannot judge them; pass 7, or export elsewhere"
        )
    return asked


def _why_not_made(precisions: Sequence[Precision]) -> str:
    """Why precisions that are written into the graph cannot be made here, or empty."""
    made = [p for p in precisions if p in MADE]
    reason = why_unsupported("onnxruntime", "fp32") if made else None
    if not reason:
        return ""
    return f"precision: the quantizer for {', '.join(made)} is missing: {reason}"


def _warn(text: str) -> None:
    warnings.warn(text, FastadWarning, stacklevel=3)


def _check_available(precisions: Sequence[Precision]) -> None:
    for precision in precisions:
        reasons = [why_unsupported(name, precision) for name in RUNTIMES]
        if all(reasons):
            raise UnsupportedError("; ".join(reason for reason in reasons if reason))


def _with_parity(
    candidate: Candidate, pixels: NDArray[np.uint8], reference: Outputs, threshold: float | None
) -> Variant:
    """The candidate's variant with its distance from PyTorch; refused where it cannot be had."""
    if candidate.runtime is not None:
        try:
            report = parity.compare(candidate.runtime, pixels, reference, threshold)
        except EngineError as error:
            candidate.refuse(f"it failed when it was compared with PyTorch: {error}")
        else:
            if np.isfinite([report.map_max, report.score_max]).all():
                return dataclasses.replace(candidate.variant, parity=(report,))
            candidate.refuse("it gives NaN or infinity on images that PyTorch was compared on")
    return candidate.variant


def _normal_images(checkpoint: Checkpoint, images: Sequence[str | Path] | None) -> list[Path]:
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
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        first = missing[0] if missing else "none given"
        raise InputError(lost.format(missing=len(missing), all=len(found), first=first))
    return found


def _samples(paths: Sequence[Path]) -> list[Sample]:
    return [Sample(path, "", False) for path in paths]


def _read(paths: Sequence[Path], record: Record) -> NDArray[np.uint8]:
    spec = record.spec.input
    batches = load_images(_samples(paths), spec.size, spec.value_range)
    return np.concatenate([batch for batch, _ in batches])


def _gate_paths(
    record: Record, normal: Sequence[Path], tested: Sequence[Sample]
) -> tuple[list[Path], list[Path]]:
    """Normal images that judge a precision, and those for its value ranges: none is in both.

    Training saw none of the first and, where they are still there, all of the second; without them
    the first are shared out.
    """
    fit = [Path(record.data_root) / name for name in record.fit]
    trained = {path.resolve() for path in fit}
    judging = [path for path in normal if path.resolve() not in trained]
    judging = judging[:: max(1, -(-len(judging) // GATE_IMAGES))]
    seen = {path.resolve() for path in (*judging, *(sample.path for sample in tested))}
    ranges = [path for path in fit if path.is_file() and path.resolve() not in seen]
    if not ranges:
        ranges, judging = judging[::2], judging[1::2]
    return judging, ranges[:: max(1, len(ranges) // RANGE_IMAGES)][:RANGE_IMAGES]


def _reference(runtime: PyTorchRuntime, images: NDArray[np.uint8]) -> Outputs:
    single = [runtime.run(images[i : i + 1]) for i in range(len(images))]
    return (
        np.concatenate([anomaly_map for anomaly_map, _ in single]),
        np.concatenate([raw_score for _, raw_score in single]),
    )


def versions() -> dict[str, str]:
    """When, where and with what a file was exported, for its provenance."""
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
