"""Which runtime an engine gets: the GPU where one can serve, else the CPU, and why not the rest."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fastad.export import export_engine

from fastad.engine import cuda, opening
from fastad.engine.container import WEIGHTS, read_engine
from fastad.engine.opening import GPU_RUNTIMES, open_engine
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.predictor import load


@pytest.fixture(scope="module")
def engine_with_weights(texture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "w.engine"
    return export_engine(texture_run, out, weights=True)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without an NVIDIA GPU, whatever this one has."""

    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", refuse)


@pytest.mark.usefixtures("no_driver")
def test_auto_falls_back_to_the_cpu_and_says_why(
    texture_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastad"), read_engine(texture_engine) as engine:
        runtime = open_engine(engine)
    assert runtime.name == "openvino"
    assert "auto: no GPU serves: tensorrt" in caplog.text


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("runtime", ["auto", *GPU_RUNTIMES])
def test_a_gpu_that_is_not_there_is_refused(texture_engine: Path, runtime: str) -> None:
    with pytest.raises(UnsupportedError, match=r"not installed|no NVIDIA driver|holds no weights"):
        load(texture_engine, device="cuda", runtime=runtime)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"runtime": "tensorflow"}, "runtime: expected auto, tensorrt, pytorch, onnxruntime"),
        ({"precision": "int4"}, "precision: expected auto, fp32"),
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_unknown_names_are_refused(
    texture_engine: Path, request_: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(texture_engine, **request_)


def test_openvino_runs_no_gpu(texture_engine: Path) -> None:
    with pytest.raises(UnsupportedError, match="openvino: runs on CPUs here"):
        load(texture_engine, device="cuda", runtime="openvino")


def test_tensorrt_needs_a_gpu(texture_engine: Path) -> None:
    with pytest.raises(UnsupportedError, match="runs on NVIDIA GPUs only"):
        load(texture_engine, device="cpu", runtime="tensorrt")


def test_pytorch_needs_weights_in_the_file(texture_engine: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"holds no weights; export it with --weights"):
        load(texture_engine, device="cpu", runtime="pytorch")


def test_pytorch_from_the_file_agrees_with_its_golden_images(engine_with_weights: Path) -> None:
    with read_engine(engine_with_weights) as engine:
        assert WEIGHTS in engine.manifest.members
        golden = engine.golden()
        runtime = open_engine(engine, "pytorch", "fp32", "cpu")
    maps, scores = runtime.run(golden.images)
    bound = 1e-3 * float(np.ptp(golden.anomaly_map))
    np.testing.assert_allclose(maps, golden.anomaly_map, rtol=0, atol=bound)
    np.testing.assert_allclose(scores, golden.raw_score, rtol=0, atol=bound)


def test_auto_goes_on_where_a_gpu_runtime_breaks(
    texture_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise EngineError("pytorch: cuDNN is missing")

    monkeypatch.setattr(opening, "why_engine_unsupported", lambda *_: None)
    monkeypatch.setattr(opening, "_open", broken)
    with caplog.at_level(logging.WARNING, "fastad"), load(texture_engine) as predictor:
        assert predictor.runtime.name == "openvino"
    assert "should run and does not: pytorch: cuDNN is missing" in caplog.text
    with pytest.raises(UnsupportedError, match="cuDNN is missing"):
        load(texture_engine, device="cuda")


@pytest.mark.parametrize("runtime", GPU_RUNTIMES)
@pytest.mark.usefixtures("no_driver")
def test_says_why_not_before_importing_anything_large(runtime: opening.GPURuntime) -> None:
    reason = opening.why_unsupported(runtime, "fp32")
    assert reason is not None
    assert reason.startswith(runtime)
