"""What `torch.onnx.export(model, (x,), file)` writes, in ONNX Runtime and in OpenVINO.

Float32 [1, 3, H, W] in, every option of exporter and runtime at its default except the number of
threads. Operators of fastad are written out in standard operators, as code without them has it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from fastad.export.to_onnx import add_functions
from numpy.typing import NDArray

from bench.peers.peer_torch import describe, resized
from bench.peers.worker import Peer, Setup, Verdict
from fastad.models.registry import Method
from fastad.training.checkpoint import load_checkpoint

Session = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def open_peer(setup: Setup) -> Peer:
    """Options: ``run``, a run folder; ``runtime``; ``precision``, "" for the runtime's own."""
    torch.set_num_threads(setup.threads)
    method = load_checkpoint(setup.options["run"]).method.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(method, path)
        return loaded(path, method, setup)


def export(method: Method, path: Path) -> None:
    """Write the plain ONNX file."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    H, W = method.input.size
    torch.onnx.export(method, (torch.zeros(1, 3, H, W),), path)
    model = onnx.load(path)
    add_functions(model)
    if model.functions:
        # They are written for another opset than the exporter's default.
        onnx.save(onnx.inliner.inline_local_functions(model, convert_version=True), path)


def loaded(path: Path, method: Method, setup: Setup) -> Peer:
    """The exported file in a runtime; ``method`` tells the preprocessing."""
    if setup.options["runtime"] == "openvino":
        session, used = openvino_session(path, setup.options["precision"], setup.threads)
    else:
        session, used = onnxruntime_session(path, setup.threads), "fp32"
    mean = np.array(method.input.mean, np.float32)
    std = np.array(method.input.std, np.float32)

    def predict(frame: NDArray[np.uint8]) -> Verdict:
        pixels = resized(frame, method.input.size).astype(np.float32) / np.float32(255.0)
        x = ((pixels - mean) / std).transpose(2, 0, 1)[None]
        anomaly_map, raw_score = session(np.ascontiguousarray(x))
        return anomaly_map[0], float(raw_score[0])

    return Peer(predict, describe(method) | {"precision": used})


def onnxruntime_session(path: Path, threads: int) -> Session:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def infer(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        anomaly_map, raw_score = session.run(None, {name: x})
        return anomaly_map, raw_score

    return infer


def openvino_session(path: Path, precision: str, threads: int) -> tuple[Session, str]:
    """The session and the precision it runs in: without a hint the CPU plugin chooses."""
    import openvino as ov

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    model: Any = ov.Core().compile_model(path, "CPU", config)
    used = model.get_property("INFERENCE_PRECISION_HINT").to_string()

    def infer(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = model(x)
        return found[0], found[1]

    return infer, {"f32": "fp32"}.get(used, used)
