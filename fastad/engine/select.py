"""Which runtime serves a request on this machine, and why the others do not."""

from __future__ import annotations

from typing import Literal, cast, get_args

from fastad.engine import onnxruntime, openvino
from fastad.engine.base import Precision, Runtime
from fastad.errors import InputError, UnsupportedError

RuntimeName = Literal["openvino", "onnxruntime"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)  # in the order that "auto" tries them
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def why_unsupported(runtime: RuntimeName, precision: Precision) -> str | None:
    """Why a runtime cannot serve a precision on this machine, or None if it can."""
    if runtime == "openvino":
        return openvino.why_unsupported(precision)
    return onnxruntime.why_unsupported(precision)


def open_runtime(
    graph: bytes, runtime: str, precision: str, device: str, threads: int | None = None
) -> Runtime:
    """Load a graph into a runtime.

    Args:
        graph: ONNX bytes.
        runtime: A name of `RUNTIMES`, or ``auto`` for the first that works.
        precision: ``fp32``, ``bf16``, or ``auto`` for fp32, the one that needs no accuracy gate.
        device: ``auto`` or ``cpu``.
        threads: Cores to use; None takes all.

    Raises:
        InputError: a name that does not exist.
        UnsupportedError: nothing on this machine serves the request; the message says why not.
    """
    if device not in ("auto", "cpu"):
        raise UnsupportedError(
            f"device: expected auto or cpu, got {device!r}; this build runs CPUs"
        )
    if runtime != "auto" and runtime not in RUNTIMES:
        raise InputError(f"runtime: expected auto, {', '.join(RUNTIMES)}, got {runtime!r}")
    if precision != "auto" and precision not in PRECISIONS:
        raise InputError(f"precision: expected auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if threads is not None and threads < 1:
        raise InputError(f"threads: expected at least 1, got {threads}")
    chosen = cast(Precision, "fp32" if precision == "auto" else precision)
    names = RUNTIMES if runtime == "auto" else (cast(RuntimeName, runtime),)
    reasons = []
    for name in names:
        reason = why_unsupported(name, chosen)
        if reason is None:
            kind = openvino.OpenVINORuntime if name == "openvino" else onnxruntime.ONNXRuntime
            return kind(graph, chosen, threads)
        reasons.append(reason)
    raise UnsupportedError("; ".join(reasons))
