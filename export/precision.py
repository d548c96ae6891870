"""Which precisions an engine gets: each is made, searched for layers to spare, judged and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Precision, Runtime
from fastad.engine.container import MODEL
from fastad.engine.select import PRECISIONS, RUNTIMES, RuntimeName, open_runtime, why_unsupported
from fastad.errors import EngineError, InputError
from fastad.spec import GateReport, Variant
from fastad.training.progress import Report

from .gate import BATCH, GateImages, Limits, judge, measure
from .quantize import Quantizer

INT8, INT8_ONNXRUNTIME, FLOAT16 = "model.int8.onnx", "model.int8-ort.onnx", "model.fp16.onnx"
AUTO: tuple[Precision, ...] = ("fp32", "bf16", "int8")  # float16 gains nothing on the CPUs measured
GROUPS = 32  # of neighbouring layers, which the search ranks: bounds it at 32 + 6 trials
SEARCH_IMAGES = 4
TIMED_ROUNDS = 15
TIMED_SECONDS = 30.0

Make = Callable[[Collection[str]], bytes]  # layers to keep in float32 -> graph


@dataclass
class Candidate:
    """One runtime and precision that was tried; it owns its runtime until `close`."""

    runtime: Runtime | None  # None once refused
    variant: Variant
    graph: bytes

    @property
    def report(self) -> GateReport:
        """What the gate said."""
        return self.variant.gate[0]

    def refuse(self, reason: str) -> None:
        """Drop runtime and graph; the report stays and names the reason."""
        self.close()
        self.runtime, self.graph = None, b""
        gate = (replace(self.report, refused=reason),)
        self.variant = replace(self.variant, member=MODEL, gate=gate, kept=())

    def close(self) -> None:
        """Free the runtime."""
        if self.runtime is not None:
            self.runtime.close()


def parse_precisions(text: str | Sequence[str]) -> tuple[Precision, ...]:
    """``auto`` or a comma-separated list as precisions, float32 first.

    >>> parse_precisions("int8")
    ('fp32', 'int8')

    Raises:
        InputError: a name that does not exist, or nothing.
    """
    names = [n.strip() for n in text.split(",")] if isinstance(text, str) else list(text)
    if names == ["auto"]:
        return AUTO
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown or not names:
        raise InputError(
            f"precision: expected auto or a list of {', '.join(PRECISIONS)}, got {text!r}"
        )
    return tuple(p for p in PRECISIONS if p == "fp32" or p in names)


def try_precisions(
    graph: bytes,
    precisions: Collection[Precision],
    calibration_images: NDArray[np.uint8],
    images: GateImages,
    threshold: float | None,
    limits: Limits,
    report: Report | None = None,
) -> list[Candidate]:
    """Every runtime of this machine in every precision, judged and timed, float32 first.

    Args:
        graph: The float32 graph.
        precisions: What to try beside float32.
        calibration_images: Normal images, uint8 [N, H, W, 3], for the ranges of int8.
        images: What the gate looks at.
        threshold: The calibrated one, for the false-alarm rate.
        limits: What may be lost.
        report: Receives progress.

    Returns:
        One candidate for each runtime and precision this machine can run; the caller closes them.
    """
    found: list[Candidate] = []
    quantizer: Quantizer | None = None
    if {"int8", "fp16"} & set(precisions):
        _tell(report, "ranges", 1, 1, f"{len(calibration_images)} images")
        quantizer = Quantizer(graph, calibration_images)
    for name in RUNTIMES:
        if why_unsupported(name, "fp32"):
            continue
        reference = open_runtime(graph, name, "fp32", "cpu", cache=False)
        own = measure(reference, reference, images, threshold)
        first = Candidate(reference, Variant(MODEL, "fp32", (), (name,), (own,)), graph)
        found.append(first)
        for precision in precisions:
            if precision == "fp32" or why_unsupported(name, precision):
                continue
            trial = _Trial(name, precision, reference, images, threshold, limits, report)
            if precision == "bf16":
                # OpenVINO decides per operator itself: no layer can be kept in float32
                found.append(trial.judge(MODEL, lambda kept: graph, ()))
                continue
            assert quantizer is not None
            if precision == "fp16":
                found.append(trial.judge(FLOAT16, quantizer.float16, ()))
            else:
                shared = name == "openvino"
                make: Make = partial(quantizer.int8, "s8" if shared else "u8")
                member = INT8 if shared else INT8_ONNXRUNTIME
                found.append(trial.judge(member, make, quantizer.parts.layers))
    _time([c for c in found if c.runtime], images.pixels, report)
    for candidate in found:
        if candidate.variant.member == INT8_ONNXRUNTIME:
            _refuse_if_slower(candidate, found)
    return found


def _refuse_if_slower(candidate: Candidate, found: Iterable[Candidate]) -> None:
    """ONNX Runtime's own int8 file serves nobody else, so it has to be faster than float32."""
    r = candidate.report
    (full,) = (
        c.report for c in found if c.report.runtime == r.runtime and c.report.precision == "fp32"
    )
    if min(r.ms_batch1 / full.ms_batch1, r.ms_batch8 / full.ms_batch8) >= 1.0:
        candidate.refuse(
            f"slower than float32 here: {r.ms_batch1:.1f} against {full.ms_batch1:.1f} ms singly, "
            f"{r.ms_batch8:.1f} against {full.ms_batch8:.1f} ms per image in a batch of {BATCH}"
        )


@dataclass(frozen=True)
class _Trial:
    """One runtime and precision against float32 of the same runtime."""

    name: RuntimeName
    precision: Precision
    reference: Runtime
    images: GateImages
    threshold: float | None
    limits: Limits
    progress: Report | None

    def judge(self, member: str, make: Make, layers: Sequence[str]) -> Candidate:
        """Pass, or pass with layers kept, or a candidate that was refused with the first reason."""
        first = candidate = self._try(member, make, ())
        if not first.report.refused:
            return first
        reason = first.report.refused
        if layers:
            ranked = self._ranked(make, layers)
            count = 1
            while count <= len(ranked) // 2:  # with more than half in float32 nothing is gained
                candidate.close()
                kept = {name for group in ranked[:count] for name in group}
                candidate = self._try(member, make, [n for n in layers if n in kept])
                if not candidate.report.refused:
                    return candidate
                count *= 2
            reason += (
                f"; with the {len(candidate.variant.kept)} most sensitive of {len(layers)} layers "
                f"in float32: {candidate.report.refused}"
            )
        candidate.refuse(reason)
        return candidate

    def _try(self, member: str, make: Make, kept: Sequence[str]) -> Candidate:
        what = f"{self.name} {self.precision}" + (f", {len(kept)} kept" if kept else "")
        _tell(self.progress, "gate", 1, 1, what)
        graph = make(kept)
        runtime = open_runtime(graph, self.name, self.precision, "cpu", cache=False)
        report = measure(runtime, self.reference, self.images, self.threshold)
        gate = (judge(report, self.limits),)
        variant = Variant(member, self.precision, (), (self.name,), gate, tuple(kept))
        return Candidate(runtime, variant, graph)

    def _ranked(self, make: Make, layers: Sequence[str]) -> list[tuple[str, ...]]:
        """Groups of neighbouring layers, first the one whose rounding alone moves maps most."""
        parts = np.array_split(np.array(layers, dtype=object), min(GROUPS, len(layers)))
        groups = [tuple(part.tolist()) for part in parts]
        step = max(1, len(self.images.pixels) // SEARCH_IMAGES)
        few = self.images.pixels[::step][:SEARCH_IMAGES]
        expected = self.reference.run(few)[0]
        errors = []
        for done, group in enumerate(groups, 1):
            graph = make([name for name in layers if name not in group])
            try:
                runtime = open_runtime(graph, self.name, self.precision, "cpu", cache=False)
                difference = np.abs(runtime.run(few)[0] - expected)
                runtime.close()
                errors.append(float(np.nan_to_num(difference, nan=np.inf).mean()))
            except EngineError:  # the runtime has no kernel for this group alone
                errors.append(np.inf)
            _tell(self.progress, "sensitivity", done, len(groups), f"{self.name} {self.precision}")
        return [groups[i] for i in np.argsort(errors, kind="stable")[::-1]]


def _time(
    candidates: Sequence[Candidate], pixels: NDArray[np.uint8], report: Report | None
) -> None:
    """Set ms per image at batch 1 and 8: medians of interleaved runs, so that load hits all."""
    batches = (pixels[:1], np.resize(pixels, (BATCH, *pixels.shape[1:])))
    spent: dict[tuple[int, int], list[float]] = {}
    began = time.perf_counter()
    for done in range(TIMED_ROUNDS + 1):
        for i, candidate in enumerate(candidates):
            assert candidate.runtime is not None
            for k, batch in enumerate(batches):
                start = time.perf_counter()
                candidate.runtime.run(batch)
                if done:  # the first round warms up
                    ms = (time.perf_counter() - start) * 1e3 / len(batch)
                    spent.setdefault((i, k), []).append(ms)
        _tell(report, "timing", done, TIMED_ROUNDS)
        if done >= 3 and time.perf_counter() - began > TIMED_SECONDS:
            break
    for i, candidate in enumerate(candidates):
        one, eight = (float(np.median(spent[i, k])) for k in range(2))
        gate = (replace(candidate.report, ms_batch1=one, ms_batch8=eight),)
        candidate.variant = replace(candidate.variant, gate=gate)


def _tell(report: Report | None, stage: str, done: int, total: int, remark: str = "") -> None:
    if report:
        report(stage, done, total, remark)
