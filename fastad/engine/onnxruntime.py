"""ONNX Runtime on CPUs: the alternative runtime, and the second opinion of parity reports."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Mode, Outputs, Precision, core_count
from fastad.engine.streams import Streams
from fastad.errors import EngineError, UnsupportedError


def why_unsupported(precision: Precision) -> str | None:
    """Why this machine cannot run ``precision`` here, or None if it can."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime: not installed; pip install 'fastad[onnxruntime]'"
    if precision in ("bf16", "int8-bf16"):
        return f"onnxruntime {precision}: its CPU provider has no bfloat16 kernels"
    return None


class ONNXRuntime:
    """An inference session; its `run` may be called from several threads.

    Args:
        graph: ONNX bytes with input ``image`` and outputs ``anomaly_map``, ``raw_score``.
        precision: ``fp32``; int8 and float16 are written into the graph.
        threads: Cores to use; None takes all that the process may use.
        mode: ``latency``: all cores share each run. ``throughput``: one core for each image, as
            many images at once as there are cores.

    Raises:
        UnsupportedError: the package or the precision is not available.
        EngineError: ONNX Runtime refuses the graph.
    """

    name = "onnxruntime"

    def __init__(
        self,
        graph: bytes,
        precision: Precision,
        threads: int | None = None,
        *,
        mode: Mode = "latency",
    ) -> None:
        reason = why_unsupported(precision)
        if reason:
            raise UnsupportedError(reason)
        import onnxruntime as ort

        self.precision: Precision = precision
        cores = threads or core_count()
        self.concurrency = cores if mode == "throughput" else 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores // self.concurrency  # 1 is the caller's own thread
        options.inter_op_num_threads = 1
        # Spinning workers starve whatever else runs on a line PC.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exception classes live in a private module
            raise EngineError(f"onnxruntime: refuses the graph: {error}") from error
        self._streams = Streams(cores) if self.concurrency > 1 else None

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch; see `fastad.engine.base.Runtime`."""
        return self._streams.run(self._infer, images) if self._streams else self._infer(images)

    def _infer(self, images: NDArray[np.uint8]) -> Outputs:
        session = self._session
        if session is None:
            raise EngineError("onnxruntime: the runtime is closed; load the engine again")
        try:
            anomaly_map, raw_score = session.run(
                ["anomaly_map", "raw_score"], {"image": np.ascontiguousarray(images)}
            )
        except Exception as error:  # its exception classes live in a private module
            raise EngineError(f"onnxruntime: run failed: {error}") from error
        return anomaly_map, raw_score

    def close(self) -> None:
        """Drop the session, after what is in flight."""
        if self._streams:
            self._streams.close()
        self._session = None
