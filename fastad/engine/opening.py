"""From an engine file to a loaded runtime: a GPU where one can serve, else the CPU.

Nothing here imports a GPU framework before the driver and the packages are known to be there.
None of the GPU runtimes has been run on hardware yet.
"""

from __future__ import annotations

import logging
from typing import Literal, cast, get_args

from fastad.engine import cuda, onnxruntime_cuda, tensorrt
from fastad.engine.base import Precision, Runtime, check_mode, check_threads
from fastad.engine.container import WEIGHTS, EngineFile
from fastad.engine.select import PRECISIONS, RUNTIMES, choose, open_runtime
from fastad.errors import EngineError, InputError, UnsupportedError

log = logging.getLogger(__name__)

GPURuntime = Literal["tensorrt", "pytorch", "onnxruntime"]
GPU_RUNTIMES: tuple[GPURuntime, ...] = get_args(GPURuntime)  # in the order that "auto" tries them
NAMES: tuple[str, ...] = tuple(dict.fromkeys((*GPU_RUNTIMES, *RUNTIMES)))


def why_unsupported(runtime: GPURuntime, precision: Precision, device: str = "cuda") -> str | None:
    """Why a runtime cannot serve a precision on a GPU of this machine, or None if it can."""
    if runtime == "tensorrt":
        return tensorrt.why_unsupported(precision, device)
    if runtime == "onnxruntime":
        return onnxruntime_cuda.why_unsupported(precision, device)
    reason = cuda.why_absent("pytorch", ("torch", "timm", "safetensors"), "gpu", device)
    if reason:
        return reason
    from fastad.engine import pytorch  # the bridge to torch

    return pytorch.why_unsupported(precision, device)


def why_engine_unsupported(
    engine: EngineFile, runtime: GPURuntime, precision: Precision, device: str
) -> str | None:
    """Why this engine cannot run so: what the machine lacks, or the file."""
    if runtime == "tensorrt":
        return tensorrt.why_engine_unsupported(engine, precision, device)
    if runtime == "pytorch" and WEIGHTS not in engine.manifest.members:
        return "pytorch: the engine holds no weights; export it with --weights"
    if reason := why_unsupported(runtime, precision, device):
        return reason
    if runtime == "onnxruntime" and _graph(engine, precision) is None:
        return f"onnxruntime {precision}: not in the engine; export it with --precision {precision}"
    return None


def open_engine(
    engine: EngineFile,
    runtime: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    mode: str = "latency",
) -> Runtime:
    """Load what an engine holds into the runtime that serves the request best.

    ``auto`` tries a GPU first: a TensorRT plan that fits, then PyTorch, then ONNX Runtime, all in
    float32 unless told otherwise, because the accuracy gate of an export judges CPUs.

    Args:
        engine: An open engine file.
        runtime: ``auto`` or a name of `NAMES`.
        precision: ``auto`` or a name of `PRECISIONS`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU cores to use; None takes all.
        mode: ``latency`` or ``throughput``: how a CPU's cores share the work. A GPU runs in one
            way, and larger batches are its throughput.

    Raises:
        InputError: a name that does not exist.
        UnsupportedError: nothing here serves the request; the message says why.
        EngineError: the gate refused the precision, or a runtime refuses what it should take.
    """
    if runtime != "auto" and runtime not in NAMES:
        raise InputError(f"runtime: expected auto, {', '.join(NAMES)}, got {runtime!r}")
    if precision != "auto" and precision not in PRECISIONS:
        raise InputError(f"precision: expected auto, {', '.join(PRECISIONS)}, got {precision!r}")
    check_mode(mode)
    threads = check_threads(threads)
    on_gpu = "cuda" if device == "auto" else device
    if device != "auto":
        cuda.device_index(device)
    only_gpu = device.startswith("cuda") or runtime in ("tensorrt", "pytorch")
    if runtime != "openvino" and (device != "cpu" or runtime in ("tensorrt", "pytorch")):
        wanted = cast(Precision, "fp32" if precision == "auto" else precision)
        names = GPU_RUNTIMES if runtime == "auto" else (cast(GPURuntime, runtime),)
        reasons = []
        for name in names:
            reason = why_engine_unsupported(engine, name, wanted, on_gpu)
            if reason is None:
                try:
                    return _open(engine, name, wanted, on_gpu, threads)
                except (EngineError, UnsupportedError) as error:
                    if runtime != "auto":
                        raise
                    # Half an installation, or a full GPU, must not stop what a CPU can do.
                    reason = str(error)
                    log.warning("auto: %s should run and does not: %s", name, reason)
            reasons.append(reason)
        if only_gpu:
            raise UnsupportedError("; ".join(reasons))
        log.info("auto: no GPU serves: %s", "; ".join(reasons))
    elif only_gpu:
        raise UnsupportedError(f"openvino: runs on CPUs here, got device {device!r}; use auto")
    chosen = choose(engine.manifest.variants, runtime, precision, "cpu")
    graph = engine.member(chosen.member)
    return open_runtime(graph, chosen.runtime, chosen.precision, "cpu", threads, mode=mode)


def _open(
    engine: EngineFile, runtime: GPURuntime, precision: Precision, device: str, threads: int | None
) -> Runtime:
    if precision != "fp32":
        log.warning("%s %s: no accuracy gate has judged it; compare first", runtime, precision)
    if runtime == "tensorrt":
        return tensorrt.open_plan(engine, precision, device)
    if runtime == "onnxruntime":
        graph = _graph(engine, precision)
        assert graph is not None
        return onnxruntime_cuda.ONNXRuntimeCUDA(engine.member(graph), precision, device)
    from fastad.engine import pytorch

    weights = engine.member(WEIGHTS)
    return pytorch.PyTorchEngineRuntime(engine.manifest, weights, precision, device, threads)


def _graph(engine: EngineFile, precision: Precision) -> str | None:
    """Member of the first graph in a precision that its gate did not refuse."""
    for variant in engine.manifest.variants:
        refused = [report.refused for report in variant.gate]
        if variant.precision == precision and not (refused and all(refused)):
            return variant.member
    return None
