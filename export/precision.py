"""Which precisions an engine gets: each is made, searched for layers to spare, judged and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Precision, Runtime, rest_of
from fastad.engine.container import MODEL
from fastad.engine.select import PRECISIONS, RUNTIMES, RuntimeName, open_runtime, why_unsupported
from fastad.errors import EngineError, InputError
from fastad.spec import GateReport, Variant
from fastad.training.progress import Report

from .gate import BATCH, GateImages, Limits, Reference, judge, measure, refer, too_few, unusable
from .quantize import Quantizer

INT8, INT8_ONNXRUNTIME, FLOAT16 = "model.int8.onnx", "model.int8-ort.onnx", "model.fp16.onnx"
INT8_BFLOAT16 = "model.int8-bf16.onnx"  # differs from the int8 graph in the layers kept
# float16 gains nothing on the CPUs measured
AUTO: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int8-bf16")
GROUPS = 16  # of neighbouring layers, which the search ranks: bounds it at 16 + 7 trials
SEARCH_IMAGES = 4
TIMED_ROUNDS = 15
TIMED_SECONDS = 30.0
QUICK_ROUNDS = 3  # before a search
QUICK_SECONDS = 5.0

Make = Callable[[Collection[str]], bytes]  # layers to keep out of int8 -> graph


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
    weight_bits: int = 8,
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
        weight_bits: Of int8 weights, 8 or 7.

    Returns:
        One candidate for each runtime and precision this machine can run; the caller closes them.
    """
    found: list[Candidate] = []
    rankings: dict[str, list[tuple[str, ...]]] = {}
    quantizer: Quantizer | None = None
    if not {"fp32", "bf16"}.issuperset(precisions):
        _tell(report, "ranges", 1, 1, f"{len(calibration_images)} images")
        quantizer = Quantizer(graph, calibration_images, weight_bits)
    with ExitStack() as opened:  # whatever is raised, nothing stays open
        for name in RUNTIMES:
            if why_unsupported(name, "fp32"):
                continue
            full = open_runtime(graph, name, "fp32", "cpu", cache=False)
            opened.callback(full.close)
            reference = refer(full, images)
            own = measure(full, reference, threshold)
            found.append(Candidate(full, Variant(MODEL, "fp32", (), (name,), (own,)), graph))
            for precision in precisions:
                if precision == "fp32" or why_unsupported(name, precision):
                    continue
                trial = _Trial(
                    *(name, precision, reference, threshold, limits, report),
                    *(weight_bits, rankings),
                )
                if precision == "bf16":
                    # OpenVINO decides per operator itself: no layer can be kept in float32
                    candidate = trial.judge(MODEL, lambda kept: graph, ())
                else:
                    assert quantizer is not None
                    candidate = trial.judge(*_recipe(name, precision, quantizer))
                opened.callback(candidate.close)
                found.append(candidate)
        running = [c for c in found if c.runtime]
        runtimes = [c.runtime for c in running if c.runtime]
        spent = _ms_per_image(runtimes, images.pixels, TIMED_ROUNDS, TIMED_SECONDS, report)
        for candidate, (one, eight) in zip(running, spent, strict=True):
            timed = replace(candidate.report, ms_batch1=one, ms_batch8=eight)
            candidate.variant = replace(candidate.variant, gate=(timed,))
        for candidate in running:
            _share_or_refuse(candidate, running)
        opened.pop_all()
    return found


def _recipe(
    name: RuntimeName, precision: Precision, quantizer: Quantizer
) -> tuple[str, Make, Sequence[str]]:
    """Member, maker and layers that may be kept, of a precision written into the graph."""
    if precision == "fp16":
        return FLOAT16, quantizer.float16, ()
    if name != "openvino":
        member = INT8_ONNXRUNTIME
    else:
        member = INT8 if precision == "int8" else INT8_BFLOAT16
    make: Make = partial(quantizer.int8, "s8" if name == "openvino" else "u8")
    return member, make, quantizer.parts.layers


def _share_or_refuse(candidate: Candidate, found: Iterable[Candidate]) -> None:
    """A graph that serves one runtime in one precision has to be faster than the others there.

    The same graph as that of another precision costs nothing: it is shared instead.
    """
    if candidate.variant.member not in (INT8_ONNXRUNTIME, INT8_BFLOAT16):
        return
    r = candidate.report
    same = [c for c in found if c.runtime and c.report.runtime == r.runtime]
    others = [c for c in same if c.report.precision != r.precision]
    for other in others:
        if other.graph == candidate.graph:
            candidate.variant = replace(candidate.variant, member=other.variant.member)
            return
    own = (r.ms_batch1, r.ms_batch8)
    for other in others:
        times = (other.report.ms_batch1, other.report.ms_batch8)
        if reason := _why_slower(own, times, other.report.precision):
            candidate.refuse(
                f"accurate enough, but {reason}; its graph is for {r.runtime} on CPUs alone, so "
                "the engine does not carry it"
            )
            return


def _why_slower(
    own: tuple[float, float], other: tuple[float, float], precision: str = "fp32"
) -> str:
    """A clause where neither of two times (at batch 1 and 8) is below the other's, or empty."""
    if min(own[0] / other[0], own[1] / other[1]) < 1.0:
        return ""
    named = "float32" if precision == "fp32" else precision
    return (
        f"no faster than {named} on this machine: {own[0]:.1f} against {other[0]:.1f} ms for one "
        f"image, {own[1]:.1f} against {other[1]:.1f} ms per image in a batch of {BATCH}"
    )


@dataclass(frozen=True)
class _Trial:
    """One runtime and precision against float32 of the same runtime."""

    name: RuntimeName
    precision: Precision
    reference: Reference
    threshold: float | None
    limits: Limits
    progress: Report | None
    weight_bits: int = 8
    # By runtime: what int8 found serves int8-bf16, which rounds the same layers the same way.
    rankings: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)

    def judge(self, member: str, make: Make, layers: Sequence[str]) -> Candidate:
        """Pass, or pass with layers kept, or a candidate that was refused with the first reason."""
        most = min(GROUPS, len(layers)) // 2  # with more than half kept nothing is gained
        counts = [2**i for i in range(most.bit_length())]
        trials = 1 + len(counts)
        found = first = self._try(member, make, ())
        reason = first.report.refused
        # no choice of layers helps where the images prove nothing
        if reason and counts and not too_few(first.report, self.limits, self.reference.images):
            # each layer kept takes speed: what is not faster now needs no search
            slower = self._slower(first)
            first.close()
            if slower:
                reason += (
                    f"; layers to leave in {rest_of(self.precision)} were not searched for, "
                    f"because even without them it is {slower}"
                )
            else:
                self._tell_trial(1, trials)
                found = self._search(member, make, layers, counts)
                reason += (
                    f"; with the {len(found.variant.kept)} most sensitive of {len(layers)} "
                    f"layers in {rest_of(self.precision)}: {found.report.refused}"
                )
        self._tell_trial(trials, trials)
        if not found.report.refused:
            return found
        first.refuse(reason)  # its report is the full one
        return first

    def _search(
        self, member: str, make: Make, layers: Sequence[str], counts: Sequence[int]
    ) -> Candidate:
        """One that passes with few groups kept, or the last one that was refused, closed.

        Between the first count that passes and the one before, the smallest is looked for.
        """
        if self.name not in self.rankings:
            self.rankings[self.name] = self._ranked(make, layers)
        ranked = self.rankings[self.name]

        def keep(count: int) -> Candidate:
            kept = {name for group in ranked[:count] for name in group}
            candidate = self._try(member, make, [n for n in layers if n in kept])
            if candidate.report.refused:
                candidate.close()
            return candidate

        failed = 0
        for trial, count in enumerate(counts, 2):
            found = keep(count)
            if not found.report.refused:
                break
            failed = count
            if trial <= len(counts):
                self._tell_trial(trial, 1 + len(counts))
        while not found.report.refused and count - failed > 1:
            middle = (count + failed) // 2
            try:
                fewer = keep(middle)
            except BaseException:  # Ctrl-C among others
                found.close()
                raise
            if fewer.report.refused:
                failed = middle
            else:
                found.close()
                found, count = fewer, middle
        return found

    def _slower(self, candidate: Candidate) -> str:
        """Why a search is not worth it, by a few interleaved runs, or empty."""
        if candidate.runtime is None:
            return ""
        runtimes = (candidate.runtime, self.reference.runtime)
        pixels = self.reference.images.pixels
        own, full = _ms_per_image(runtimes, pixels, QUICK_ROUNDS, QUICK_SECONDS)
        return _why_slower(own, full)

    def _tell_trial(self, done: int, total: int) -> None:
        what = f"{self.name} {self.precision}, trial {done} of {total}"
        _tell(self.progress, "gate", done, total, what)

    def _try(self, member: str, make: Make, kept: Sequence[str]) -> Candidate:
        """Judge one graph; one that the runtime does not take is refused with its reason.

        The first one, which keeps nothing, is measured in full for the report; a later one only as
        far as the first rule that it fails.
        """
        graph = make(kept)
        runtime: Runtime | None = None
        try:
            runtime = open_runtime(graph, self.name, self.precision, "cpu", cache=False)
            limits = self.limits if kept else None
            report = measure(runtime, self.reference, self.threshold, limits)
        except BaseException as error:
            if runtime is not None:
                runtime.close()
            if not isinstance(error, EngineError):
                raise
            runtime = None
            report = unusable(self.name, self.precision, self.reference.images, str(error))
        gate = (judge(report, self.limits, self.reference.images),)
        bits = self.weight_bits if self.precision.startswith("int8") else 8
        variant = Variant(member, self.precision, (), (self.name,), gate, tuple(kept), bits)
        return Candidate(runtime, variant, graph)

    def _ranked(self, make: Make, layers: Sequence[str]) -> list[tuple[str, ...]]:
        """Groups of neighbouring layers, first the one whose rounding alone moves maps most."""
        parts = np.array_split(np.array(layers, dtype=object), min(GROUPS, len(layers)))
        groups = [tuple(part.tolist()) for part in parts]
        pixels = self.reference.images.pixels
        step = max(1, len(pixels) // SEARCH_IMAGES)
        few = pixels[::step][:SEARCH_IMAGES]
        expected = self.reference.maps[::step][:SEARCH_IMAGES]
        errors = []
        for done, group in enumerate(groups, 1):
            graph = make([name for name in layers if name not in group])
            try:
                runtime = open_runtime(graph, self.name, self.precision, "cpu", cache=False)
                try:
                    difference = np.abs(runtime.run(few)[0] - expected)
                finally:
                    runtime.close()
                errors.append(float(np.nan_to_num(difference, nan=np.inf).mean()))
            except EngineError:  # the runtime has no kernel for this group alone
                errors.append(np.inf)
            _tell(self.progress, "sensitivity", done, len(groups), f"{self.name} {self.precision}")
        return [groups[i] for i in np.argsort(errors, kind="stable")[::-1]]


def _ms_per_image(
    runtimes: Sequence[Runtime],
    pixels: NDArray[np.uint8],
    rounds: int,
    seconds: float,
    report: Report | None = None,
) -> list[tuple[float, float]]:
    """Times at batch 1 and 8 of each runtime: medians of interleaved runs, so that load hits all.

    The limit of time is tested after every run; each combination runs once at least.
    """
    batches = (pixels[:1], np.resize(pixels, (BATCH, *pixels.shape[1:])))
    runs = [(i, k) for i in range(len(runtimes)) for k in range(len(batches))]
    spent: dict[tuple[int, int], list[float]] = {run: [] for run in runs}
    began = time.perf_counter()
    for runtime in runtimes:
        runtime.run(batches[0])  # warms up; the gate has run full batches
    for n, (i, k) in enumerate(runs * rounds, 1):
        start = time.perf_counter()
        runtimes[i].run(batches[k])
        end = time.perf_counter()
        spent[i, k].append((end - start) * 1e3 / len(batches[k]))
        if n >= len(runs) and end - began > seconds:
            break
        if n % len(runs) == 0 and n < rounds * len(runs):
            _tell(report, "timing", n // len(runs), rounds)
    _tell(report, "timing", rounds, rounds)
    medians = {run: float(np.median(values)) for run, values in spent.items()}
    return [(medians[i, 0], medians[i, 1]) for i in range(len(runtimes))]


def _tell(report: Report | None, stage: str, done: int, total: int, remark: str = "") -> None:
    if report:
        report(stage, done, total, remark)
