"""Which runtime serves a request on this machine, and why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from fastad import _native
from fastad.engine import onnxruntime, openvino
from fastad.engine.base import Precision, Runtime, check_mode, check_threads
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.spec import GateReport, Variant

log = logging.getLogger(__name__)

RuntimeName = Literal["openvino", "onnxruntime"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)  # in the order that "auto" tries them
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# A lower precision has to be this much faster than float32 to be taken unasked: timing on a shared
# machine varies by a few percent, and float32 is what the thresholds were calibrated in.
WORTH = 0.95


@dataclass(frozen=True)
class Choice:
    """One variant of an engine on one runtime."""

    member: str
    runtime: RuntimeName
    precision: Precision


def why_unsupported(runtime: RuntimeName, precision: Precision) -> str | None:
    """Why a runtime cannot serve a precision on this machine, or None if it can."""
    if runtime == "openvino":
        return openvino.why_unsupported(precision)
    return onnxruntime.why_unsupported(precision)


def why_inexact(variant: Variant) -> str | None:
    """Why a variant's sums would not be those that its gate judged, or None if they are."""
    if not variant.precision.startswith("int8") or variant.weight_bits < 8:
        return None
    if _native.sums_int8_exactly():
        return None
    return (
        f"{variant.precision}: this CPU has no dot products of int8 (AVX512-VNNI or AVX-VNNI), and "
        "sums of 8-bit weights would saturate; export with --int8-weight-bits 7, as is done by "
        "itself on such a CPU"
    )


def choose(variants: Sequence[Variant], runtime: str, precision: str, device: str) -> Choice:
    """Which graph of an engine to load, on which runtime, in which precision.

    ``auto`` takes the first runtime that works here and its fastest precision among those that the
    accuracy gate passed at export, by the times measured then; float32 without a gate.

    Args:
        variants: Of the manifest; the first one is float32.
        runtime: A name of `RUNTIMES`, or ``auto``.
        precision: A name of `PRECISIONS`, or ``auto``.
        device: ``auto`` or ``cpu``.

    Raises:
        InputError: a name that does not exist.
        UnsupportedError: the engine or this machine does not have what was asked for.
        EngineError: the gate refused the precision that was asked for.
    """
    _check_names(runtime, precision, device)
    names = RUNTIMES if runtime == "auto" else (cast(RuntimeName, runtime),)
    full = variants[0].member
    reasons = []
    if precision in ("auto", "fp32"):
        for name in names:
            if reason := why_unsupported(name, "fp32"):
                reasons.append(reason)
            else:
                auto = precision == "auto"
                return _fastest(variants, name) if auto else Choice(full, name, "fp32")
        raise UnsupportedError("; ".join(reasons))
    wanted = cast(Precision, precision)
    refusal: EngineError | None = None
    for name in names:
        held = [v for v in variants[1:] if v.precision == wanted and name in v.runtimes]
        if reason := why_unsupported(name, wanted):
            reasons.append(reason)
        elif not held and wanted == "bf16" and not any(v.gate for v in variants):
            return Choice(full, name, wanted)  # exported without a gate: the caller compares
        elif not held:
            reasons.append(
                f"{name} {wanted}: the engine was exported without it; export it with "
                f"--precision {wanted}, or use precision='fp32'"
            )
        elif sentence := _refusal(held[0], name):
            refusal = refusal or EngineError(sentence)
        elif reason := why_inexact(held[0]):
            reasons.append(f"{name} {reason}")
        else:
            return Choice(held[0].member, name, wanted)
    raise refusal or UnsupportedError("; ".join(reasons))


def _gate(variant: Variant, runtime: str) -> GateReport | None:
    found = [report for report in variant.gate if report.runtime == runtime]
    return found[0] if found else None


def _refusal(variant: Variant, runtime: str) -> str:
    """Why the gate keeps a variant from running, or empty."""
    report = _gate(variant, runtime)
    reason = report.refused if report else "it carries no report of the accuracy gate"
    if not reason:
        return ""
    return (
        f"{runtime} {variant.precision}: refused by the gate: {reason}; use precision='fp32' or "
        "'auto', or export again with other images or layers"
    )


def _fastest(variants: Sequence[Variant], runtime: RuntimeName) -> Choice:
    """The fastest passed precision of a runtime that works here, by batch 1."""
    best = Choice(variants[0].member, runtime, "fp32")
    full = _gate(variants[0], runtime)
    if full is None:
        log.debug("%s: fp32, the engine has no accuracy gate for it", runtime)
        return best
    least = WORTH * full.ms_batch1
    for variant in variants[1:]:
        report = _gate(variant, runtime)
        if report is None or runtime not in variant.runtimes:
            continue
        precision = cast(Precision, variant.precision)
        if reason := _refusal(variant, runtime) or why_unsupported(runtime, precision):
            log.info("auto: not %s %s: %s", runtime, precision, reason)
        elif reason := why_inexact(variant):  # it was fast where it was exported
            log.warning("auto: not %s %s", runtime, reason)
        elif report.ms_batch1 > least:
            log.info(
                "auto: not %s %s: %.2f ms at export, fp32 took %.2f",
                *(runtime, precision, report.ms_batch1, full.ms_batch1),
            )
        else:
            best, least = Choice(variant.member, runtime, precision), report.ms_batch1
    log.info("auto: %s %s", runtime, best.precision)
    return best


def _check_names(runtime: str, precision: str, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise UnsupportedError(
            f"device: expected auto or cpu, got {device!r}; fastad.load opens engines on GPUs"
        )
    if runtime != "auto" and runtime not in RUNTIMES:
        raise InputError(f"runtime: expected auto, {', '.join(RUNTIMES)}, got {runtime!r}")
    if precision != "auto" and precision not in PRECISIONS:
        raise InputError(f"precision: expected auto, {', '.join(PRECISIONS)}, got {precision!r}")


def open_runtime(
    graph: bytes,
    runtime: str,
    precision: str,
    device: str,
    threads: int | None = None,
    *,
    mode: str = "latency",
    cache: bool = True,
) -> Runtime:
    """Load a graph into a runtime.

    Args:
        graph: ONNX bytes.
        runtime: A name of `RUNTIMES`, or ``auto`` for the first that works.
        precision: A name of `PRECISIONS`, or ``auto`` for fp32, the one that needs no accuracy
            gate. For ``int8`` and ``fp16`` the graph itself has to be in that precision.
        device: ``auto`` or ``cpu``.
        threads: Cores to use; None takes all.
        mode: ``latency`` or ``throughput``.
        cache: Let a runtime keep what it compiled on disk; False for a graph that runs once.

    Raises:
        InputError: a name that does not exist.
        UnsupportedError: nothing on this machine serves the request; the message says why not.
    """
    _check_names(runtime, precision, device)
    threads = check_threads(threads)
    set_for = check_mode(mode)
    chosen = cast(Precision, "fp32" if precision == "auto" else precision)
    names = RUNTIMES if runtime == "auto" else (cast(RuntimeName, runtime),)
    reasons = []
    for name in names:
        reason = why_unsupported(name, chosen)
        if reason is None:
            if name == "openvino":
                return openvino.OpenVINORuntime(graph, chosen, threads, mode=set_for, cache=cache)
            return onnxruntime.ONNXRuntime(graph, chosen, threads, mode=set_for)
        reasons.append(reason)
    raise UnsupportedError("; ".join(reasons))
