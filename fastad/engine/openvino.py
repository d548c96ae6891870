"""OpenVINO on CPUs: the base runtime, and the fastest measured there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from fastad.engine import openvino_cache
from fastad.engine.base import Mode, Outputs, Precision, core_count
from fastad.engine.openvino_ops import read_model
from fastad.engine.streams import Streams
from fastad.errors import EngineError, UnsupportedError

# int8 and fp16 are written into the graph; the hint is for what they leave over.
_HINTS: dict[Precision, str] = {
    "fp32": "f32",
    "bf16": "bf16",
    "fp16": "f32",
    "int8": "f32",
    "int8-bf16": "bf16",
}
_BF16 = ("BF16", "BF16 instructions (AVX512-BF16 or AMX)")
_INT8 = ("INT8", "INT8 kernels")  # every x86 CPU has some; `select.why_inexact` says which saturate
_NEEDS = {"bf16": (_BF16,), "int8": (_INT8,), "int8-bf16": (_INT8, _BF16)}


def why_unsupported(precision: Precision) -> str | None:
    """Why this machine cannot run ``precision`` here, or None if it can."""
    for capability, named in _NEEDS.get(precision, ()):
        if capability not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return f"openvino {precision}: this CPU has no {named}"
    return None


class _Compiled:
    """A compiled model and one inference request per concurrent caller."""

    def __init__(self, model: ov.CompiledModel) -> None:
        self.model = model
        self._requests: queue.LifoQueue[ov.InferRequest] = queue.LifoQueue()

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch of a size that the model takes."""
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = self.model.create_infer_request()
        try:
            # Looking at an argument of `infer` takes the wrapper 0.1 ms, and it copies what is not
            # shared. A shared tensor has to be writable, though nothing writes to it.
            shared = ov.Tensor(np.require(images, requirements=("C", "W")), shared_memory=True)
            request.set_input_tensor(shared)
            request.infer(share_outputs=True)
            anomaly_map = request.get_tensor("anomaly_map").data.copy()
            raw_score = request.get_tensor("raw_score").data.copy()
        except RuntimeError as error:
            raise EngineError(f"openvino: run failed: {_last_line(error)}") from error
        finally:
            self._requests.put(request)
        return anomaly_map, raw_score


class OpenVINORuntime:
    """Two compiled models: one for single images, and one for any batch from the first batch on.

    Where the batch is known, OpenVINO plans memory and folds shapes ahead: a single image takes
    0.75 to 0.85 of the time it takes in the model for any batch (quick recipes, 2026.4). Owns the
    models, their requests and, until both are compiled, the graph; `close` drops all. The precision
    is always stated: OpenVINO would choose bfloat16 by itself where the CPU has it.

    Args:
        graph: ONNX bytes with input ``image`` and outputs ``anomaly_map``, ``raw_score``; nodes of
            fastad are translated (`openvino_ops`), functions in the file are not needed.
        precision: ``fp32`` or ``bf16``; ``int8``, ``int8-bf16`` and ``fp16`` for graphs that hold
            them.
        threads: Cores to use; None takes all that the process may use.
        mode: ``latency``: all cores share each run, and runs follow each other. ``throughput``: one
            core for each image, as many images at once as there are cores.
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
        mode: Mode = "latency",
        weights: bytes = b"",
        cache: bool = True,
    ) -> None:
        reason = why_unsupported(precision)
        if reason:
            raise UnsupportedError(f"{reason}; use precision='fp32'")
        self.precision: Precision = precision
        cores = threads or core_count()
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": mode.upper(),
            "INFERENCE_NUM_THREADS": cores,
        }
        if mode == "throughput":
            config["NUM_STREAMS"] = cores
        compile_for = partial(_compiled, graph, weights, config, cache)
        self._single: _Compiled | None = compile_for(1)
        self._batches: _Compiled | None = None
        self._compiling = threading.Lock()
        model = self._single.model
        self.concurrency: int = model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        many = mode == "throughput" and self.concurrency > 1
        self._streams = Streams(self.concurrency) if many else None
        # Streams run one image each.
        self._compile_for: Callable[[int | None], _Compiled] | None = None if many else compile_for

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch; see `fastad.engine.base.Runtime`."""
        return self._streams.run(self._infer, images) if self._streams else self._infer(images)

    def _infer(self, images: NDArray[np.uint8]) -> Outputs:
        compiled = self._single if len(images) == 1 else self._for_batches()
        if compiled is None:
            raise EngineError("openvino: the runtime is closed; load the engine again")
        return compiled.infer(images)

    def _for_batches(self) -> _Compiled | None:
        """The model for any batch, compiled at its first use; None once closed."""
        with self._compiling:
            if self._compile_for is not None:
                self._batches = self._compile_for(None)
                self._compile_for = None
            return self._batches

    def close(self) -> None:
        """Drop all requests, the compiled models and the graph, after what is in flight."""
        if self._streams:
            self._streams.close()
        with self._compiling:
            self._single = self._batches = self._compile_for = None


def _compiled(
    graph: bytes, weights: bytes, config: dict[str, Any], cache: bool, batch: int | None
) -> _Compiled:
    """The graph compiled for one batch size, or for all.

    Raises:
        EngineError: OpenVINO refuses the graph.
    """
    core = ov.Core()
    about = config | {"batch": batch}
    path = openvino_cache.blob_path(core, graph + weights, about) if cache else None
    compiled = openvino_cache.load(core, path, config) if path else None
    if compiled is None:
        try:
            model = read_model(core, graph, weights)
            if batch is not None:
                _, *size = model.input(0).partial_shape
                model.reshape(ov.PartialShape([batch, *size]))
            compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            # Ctrl-C within one of our translations comes back as OpenVINO's own error.
            if "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from None
            raise EngineError(f"openvino: refuses the graph: {_last_line(error)}") from error
        if path:
            openvino_cache.store(path, compiled)
    return _Compiled(compiled)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
