"""ONNX Runtime's CUDA class: options, buffers and refusals; the session needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastad.engine import cuda, onnxruntime_cuda
from fastad.engine.base import Precision
from fastad.engine.container import read_engine
from fastad.engine.onnxruntime_cuda import (
    ONNXRuntimeCUDA,
    check_frames,
    graph_size,
    plan_buffers,
    provider_options,
    why_unsupported,
)
from fastad.errors import EngineError, InputError, UnsupportedError

ort = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_options_are_strings_and_never_allow_tf32(cuda_graph: bool) -> None:
    options = provider_options(2, cuda_graph=cuda_graph)
    assert all(isinstance(v, str) for pair in options.items() for v in pair)
    assert options["use_tf32"] == "0"
    assert options["device_id"] == "2"
    assert options["enable_cuda_graph"] == str(int(cuda_graph))


@pytest.mark.parametrize("bucket", cuda.BUCKETS)
def test_buffers_hold_a_batch(bucket: int) -> None:
    image, anomaly_map, raw_score = plan_buffers(bucket, (48, 64))
    assert [b.name for b in (image, anomaly_map, raw_score)] == ["image", *onnxruntime_cuda.OUTPUTS]
    assert np.empty(image.shape, image.dtype).nbytes == bucket * 48 * 64 * 3
    assert np.empty(anomaly_map.shape, anomaly_map.dtype).nbytes == bucket * 48 * 64 * 4
    assert np.empty(raw_score.shape, raw_score.dtype).nbytes == bucket * 4


def test_buffers_fit_an_exported_graph(texture_engine: Path) -> None:
    """Bound and run on the CPU: the names, shapes and dtypes of the plan are the graph's own."""
    with read_engine(texture_engine) as engine:
        graph, golden = engine.member("model.onnx"), engine.golden()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    size = graph_size(session.get_inputs()[0].shape)
    assert size == golden.images.shape[1:3]
    image, *outputs = (
        ort.OrtValue.ortvalue_from_shape_and_type(b.shape, b.dtype, "cpu", 0)
        for b in plan_buffers(2, size)
    )
    binding = session.io_binding()
    binding.bind_ortvalue_input("image", image)
    for name, value in zip(onnxruntime_cuda.OUTPUTS, outputs, strict=True):
        binding.bind_ortvalue_output(name, value)
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", onnxruntime_cuda.NO_GRAPH)
    image.update_inplace(np.ascontiguousarray(golden.images[:2]))
    session.run_with_iobinding(binding, options)
    bound = 1e-3 * float(np.ptp(golden.anomaly_map))  # the export's own limit
    np.testing.assert_allclose(outputs[0].numpy(), golden.anomaly_map[:2], rtol=0, atol=bound)
    np.testing.assert_allclose(outputs[1].numpy(), golden.raw_score[:2], rtol=0, atol=bound)


@pytest.mark.parametrize(
    "shape", [[1, 64, 64, 3], ["B", 3, 64, 64], ["B", "H", 64, 3], ["B", 64, 64], []]
)
def test_refuses_graphs_of_another_form(shape: list[Any]) -> None:
    with pytest.raises(EngineError, match=r"expected a graph with input image \[B, H, W, 3\]"):
        graph_size(shape)


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("fp32", "cpu", "onnxruntime fp32 on cpu: this is the runtime of NVIDIA GPUs; use runtime"),
        ("bf16", "cuda", "onnxruntime bf16 on cuda: its CUDA provider has no bfloat16 convolution"),
        ("int8", "cuda:1", "onnxruntime int8 on cuda:1: its CUDA provider has no int8 convolution"),
    ],
)
def test_says_what_it_does_not_run(precision: Precision, device: str, message: str) -> None:
    reason = why_unsupported(precision, device)
    assert reason is not None
    assert reason.startswith(message)
    with pytest.raises(UnsupportedError, match=message):
        ONNXRuntimeCUDA(b"never read", precision, device)


def test_says_that_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", no_library)
    with pytest.raises(UnsupportedError, match="fp32 on cuda: no NVIDIA driver on this machine"):
        ONNXRuntimeCUDA(b"never read", "fp32")


def test_says_that_the_package_is_the_one_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: name)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match="this onnxruntime is built without CUDA; uninstall"):
        ONNXRuntimeCUDA(b"never read", "fp16", "cuda:1")


def test_refuses_unknown_devices() -> None:
    with pytest.raises(InputError, match="device: expected cpu, cuda or cuda:N, got 'gpu'"):
        ONNXRuntimeCUDA(b"never read", "fp32", "gpu")


class Frames:
    """A device array's outside: enough to be refused, nothing to be read."""

    def __init__(self, device: tuple[int, int], dtype: str, *shape: int) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self) -> None:
        raise AssertionError("refused frames are not read")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "expected an object with __dlpack__, got list; use run"),
        (Frames((1, 0), "uint8", 1, 8, 8, 3), "expected them on cuda:0, got DLPack device 1"),
        (Frames((2, 1), "uint8", 1, 8, 8, 3), "got DLPack device 2, number 1"),
        (Frames((2, 0), "float32", 1, 8, 8, 3), r"expected uint8 \[B, 8, 8, 3\], got float32"),
        (Frames((2, 0), "torch.uint8", 1, 9, 8, 3), "does not resize on the GPU, runtime='pyt"),
        (Frames((2, 0), "uint8", 8, 8, 3), r"got uint8 \[8, 8, 3\]"),
        (Frames((2, 0), "uint8", 0, 8, 8, 3), r"got uint8 \[0, 8, 8, 3\]"),
    ],
)
def test_refuses_frames_it_would_have_to_change(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_frames(given, (8, 8), 0)


@pytest.mark.parametrize("dtype", ["uint8", "torch.uint8"])
def test_accepts_frames_that_fit(dtype: str) -> None:
    check_frames(Frames((2, 0), dtype, 5, 8, 8, 3), (8, 8), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 35])
def test_gpu_agrees_with_the_golden_outputs(texture_engine: Path, count: int) -> None:
    if reason := why_unsupported("fp32", "cuda"):
        pytest.skip(reason)
    with read_engine(texture_engine) as engine:
        graph, golden = engine.member("model.onnx"), engine.golden()
    runtime = ONNXRuntimeCUDA(graph, "fp32")
    which = np.arange(count) % len(golden.images)
    bound = 1e-3 * float(np.ptp(golden.anomaly_map))
    for _ in range(3):  # plain, captured, replayed
        maps, scores = runtime.run(golden.images[which])
        np.testing.assert_allclose(maps, golden.anomaly_map[which], rtol=0, atol=bound)
        np.testing.assert_allclose(scores, golden.raw_score[which], rtol=0, atol=bound)
