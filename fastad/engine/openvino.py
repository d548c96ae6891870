"""OpenVINO on CPUs: the base runtime, and the fastest measured there."""

from __future__ import annotations

import contextlib
import queue
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from fastad.engine import openvino_cache
from fastad.engine.base import Outputs, Precision, core_count
from fastad.engine.openvino_ops import read_model
from fastad.errors import EngineError, UnsupportedError

# int8 and fp16 are written into the graph; what they leave over runs in float32.
_HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32", "fp16": "f32"}
_NEEDS = {
    "bf16": ("BF16", "BF16 instructions (AVX512-BF16 or AMX)"),
    "int8": ("INT8", "INT8 instructions (AVX512-VNNI, AVX-VNNI or AMX)"),
}


def why_unsupported(precision: Precision) -> str | None:
    """Why this machine cannot run ``precision`` here, or None if it can."""
    if precision in _NEEDS:
        capability, named = _NEEDS[precision]
        if capability not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return f"openvino {precision}: this CPU has no {named}"
    return None


class OpenVINORuntime:
    """A compiled model with one inference request per concurrent caller.

    Owns the requests and their buffers; `close` drops them. The precision is always stated:
    OpenVINO would choose bfloat16 by itself where the CPU has it.

    Args:
        graph: ONNX bytes with input ``image`` and outputs ``anomaly_map``, ``raw_score``; nodes of
            fastad are translated (`openvino_ops`), functions in the file are not needed.
        precision: ``fp32`` or ``bf16``; ``int8`` and ``fp16`` for graphs that hold them.
        threads: Cores to use; None takes all that the process may use.
        weights: The ``.bin`` of an IR; ``graph`` is then its XML.
        cache: Keep the compiled model on disk and start from it next time (`openvino_cache`).

    Raises:
        UnsupportedError: this CPU cannot run the precision.
        EngineError: OpenVINO refuses the graph.
    """

    name = "openvino"

    def __init__(
        self,
        graph: bytes,
        precision: Precision,
        threads: int | None = None,
        *,
        weights: bytes = b"",
        cache: bool = True,
    ) -> None:
        reason = why_unsupported(precision)
        if reason:
            raise UnsupportedError(f"{reason}; use precision='fp32'")
        self.precision: Precision = precision
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or core_count(),
        }
        try:
            model = _compiled(graph, weights, config, cache)
        except RuntimeError as error:
            # Ctrl-C within one of our translations comes back as OpenVINO's own error.
            if "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from None
            raise EngineError(f"openvino: refuses the graph: {_last_line(error)}") from error
        self._model: ov.CompiledModel | None = model
        self._requests: queue.LifoQueue[ov.InferRequest] = queue.LifoQueue()

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch; see `fastad.engine.base.Runtime`."""
        model = self._model
        if model is None:
            raise EngineError("openvino: the runtime is closed; load the engine again")
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = model.create_infer_request()
        try:
            request.infer([np.ascontiguousarray(images)], share_inputs=True)
            anomaly_map = request.get_tensor("anomaly_map").data.copy()
            raw_score = request.get_tensor("raw_score").data.copy()
        except RuntimeError as error:
            raise EngineError(f"openvino: run failed: {_last_line(error)}") from error
        finally:
            self._requests.put(request)
        return anomaly_map, raw_score

    def close(self) -> None:
        """Drop all requests and the compiled model."""
        self._model = None
        with contextlib.suppress(queue.Empty):
            while True:
                self._requests.get_nowait()


def _compiled(
    graph: bytes, weights: bytes, config: dict[str, Any], cache: bool
) -> ov.CompiledModel:
    core = ov.Core()
    path = openvino_cache.blob_path(core, graph + weights, config) if cache else None
    model = openvino_cache.load(core, path, config) if path else None
    if model is None:
        model = core.compile_model(read_model(core, graph, weights), "CPU", config)
        if path:
            openvino_cache.store(path, model)
    return model


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
