"""Runtimes: each one runs any batch, says why it cannot, and refuses by name."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from textures import MODEL_SIZE

from fastad.engine import onnxruntime, openvino, select
from fastad.engine.base import Outputs, Precision, Runtime, core_count
from fastad.engine.container import Golden, read_engine
from fastad.engine.select import PRECISIONS, RUNTIMES, RuntimeName, open_runtime, why_unsupported
from fastad.errors import EngineError, InputError, UnsupportedError

PAIRS = [(name, precision) for name in RUNTIMES for precision in PRECISIONS]
# refused on every machine, which is tested below
NEVER = {("onnxruntime", "bf16"), ("onnxruntime", "int8-bf16")}


@pytest.fixture(scope="module")
def graph(texture_engine: Path) -> bytes:
    with read_engine(texture_engine) as engine:
        return engine.member("model.onnx")


@pytest.fixture(scope="module")
def golden(texture_engine: Path) -> Golden:
    with read_engine(texture_engine) as engine:
        return engine.golden()


@pytest.fixture(params=[p for p in PAIRS if p not in NEVER], ids=lambda pair: "-".join(pair))
def runtime(request: pytest.FixtureRequest, graph: bytes) -> Runtime:
    """Each runtime and precision of this machine; skipped with the machine's own reason."""
    name, precision = request.param
    reason = why_unsupported(name, precision)
    if reason:
        pytest.skip(reason)
    return open_runtime(graph, name, precision, "cpu", threads=2)


def frames(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *MODEL_SIZE, 3), np.uint8)


def same(first: Outputs, second: Outputs) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_runs_any_batch(runtime: Runtime, batch: int) -> None:
    maps, scores = runtime.run(frames(batch))
    assert (maps.shape, maps.dtype) == ((batch, *MODEL_SIZE), np.float32)
    assert (scores.shape, scores.dtype) == ((batch,), np.float32)
    assert np.isfinite(maps).all()
    assert np.isfinite(scores).all()


def test_agrees_with_the_golden_outputs(runtime: Runtime, golden: Golden) -> None:
    maps, scores = runtime.run(golden.images)
    # bfloat16 keeps 8 bits: 2^-8 a rounding; float32 outputs are bound by the export's own limit.
    limit = 1e-3 if runtime.precision == "fp32" else 0.1
    bound = limit * float(np.ptp(golden.anomaly_map))
    np.testing.assert_allclose(maps, golden.anomaly_map, rtol=0, atol=bound)
    np.testing.assert_allclose(scores, golden.raw_score, rtol=0, atol=bound)


def test_outputs_belong_to_the_caller(runtime: Runtime) -> None:
    first = runtime.run(frames(2))
    kept = tuple(output.copy() for output in first)
    runtime.run(frames(2, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))
    first[0][:] = 0  # writable, and not the runtime's buffer
    assert np.array_equal(runtime.run(frames(2))[0], kept[0])


@pytest.mark.parametrize("form", ["read-only", "strided"])
def test_takes_arrays_as_they_come(runtime: Runtime, form: str) -> None:
    images = frames(3)
    given = images.copy()
    if form == "read-only":
        given.setflags(write=False)
    else:
        given = np.asfortranarray(given)
    assert same(runtime.run(given), runtime.run(images))


def test_threads_share_a_runtime(runtime: Runtime) -> None:
    batches = [frames(1 + seed % 3, seed) for seed in range(16)]
    expected = [runtime.run(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(runtime.run, batches))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_wrong_shapes_are_an_engine_error(runtime: Runtime) -> None:
    with pytest.raises(EngineError, match=f"{runtime.name}: run failed"):
        runtime.run(np.zeros((1, 8, 8, 4), np.uint8))
    runtime.run(frames(1))  # and the runtime still works


def test_closed_is_an_engine_error(runtime: Runtime) -> None:
    runtime.run(frames(1))
    runtime.close()
    with pytest.raises(EngineError, match="runtime is closed"):
        runtime.run(frames(1))
    runtime.close()


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    "data", [b"", b"not a graph", b"\x08\x07" * 40], ids=["empty", "text", "x"]
)
def test_refuses_what_is_no_graph(name: RuntimeName, data: bytes) -> None:
    if reason := why_unsupported(name, "fp32"):
        pytest.skip(reason)
    with pytest.raises(EngineError, match=f"{name}: refuses the graph"):
        open_runtime(data, name, "fp32", "cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_runs_the_precision_it_is_told(graph: bytes, precision: Precision) -> None:
    if reason := why_unsupported("openvino", precision):
        pytest.skip(reason)
    runtime = openvino.OpenVINORuntime(graph, precision, threads=1)
    assert runtime._single is not None
    chosen = runtime._single.model.get_property("INFERENCE_PRECISION_HINT")
    assert chosen.get_type_name() == ("bf16" if "bf16" in precision else "f32")
    assert runtime._single.model.get_property("INFERENCE_NUM_THREADS") == 1


def test_bf16_needs_the_instructions(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCore:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8", "BIN"]

    monkeypatch.setattr(openvino.ov, "Core", OldCore)
    with pytest.raises(UnsupportedError, match=r"no BF16 instructions .*use precision='fp32'"):
        openvino.OpenVINORuntime(graph, "bf16")


def test_int8_needs_the_instructions(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCore:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "BIN"]

    monkeypatch.setattr(openvino.ov, "Core", OldCore)
    with pytest.raises(UnsupportedError, match=r"no INT8 kernels.*use precision='fp32'"):
        openvino.OpenVINORuntime(graph, "int8")


@pytest.mark.parametrize(("has", "lacks"), [("INT8", "BF16"), ("BF16", "INT8")])
def test_int8_with_bf16_needs_both(
    has: str, lacks: str, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HalfCore:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", has]

    monkeypatch.setattr(openvino.ov, "Core", HalfCore)
    with pytest.raises(UnsupportedError, match=f"int8-bf16: this CPU has no {lacks} "):
        openvino.OpenVINORuntime(graph, "int8-bf16")


def test_auto_takes_openvino_in_float32(graph: bytes) -> None:
    runtime = open_runtime(graph, "auto", "auto", "auto")
    assert (runtime.name, runtime.precision) == ("openvino", "fp32")


def test_auto_takes_the_next_that_works(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_unsupported("onnxruntime", "fp32"):
        pytest.skip(reason)
    monkeypatch.setattr(openvino, "why_unsupported", lambda _: "openvino: out of order")
    assert open_runtime(graph, "auto", "fp32", "cpu").name == "onnxruntime"


def test_when_nothing_works_every_reason_is_given(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "why_unsupported", lambda _: "openvino: out of order")
    monkeypatch.setattr(onnxruntime, "find_spec", lambda _: None)
    with pytest.raises(
        UnsupportedError, match=r"openvino: out of order; onnxruntime: not installed; pip install"
    ):
        open_runtime(graph, "auto", "fp32", "cpu")


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (("tensorrt", "fp32", "cpu", 1), InputError, "runtime: expected auto, openvino"),
        (("auto", "int4", "cpu", 1), InputError, "precision: expected auto, fp32, bf16"),
        (("auto", "fp32", "cuda:0", 1), UnsupportedError, "device: expected auto or cpu"),
        (
            ("auto", "fp32", "cpu", -1),
            InputError,
            "threads: expected a whole number of at least 1, got -1",
        ),
    ],
)
def test_refuses_before_it_looks_at_the_graph(
    request_: tuple[str, str, str, int], error: type[Exception], message: str
) -> None:
    runtime, precision, device, threads = request_
    with pytest.raises(error, match=message):
        open_runtime(b"never read", runtime, precision, device, threads)


def test_reasons_are_the_same_by_name_and_in_the_diagnosis(graph: bytes) -> None:
    from fastad.doctor import diagnose

    rows = [row for row in diagnose().runtimes if row.device == "cpu"]
    found = {(row.runtime, row.precision): row.reason for row in rows}
    assert found == {(name, p): select.why_unsupported(name, p) for name, p in PAIRS}
    for precision in ("bf16", "int8-bf16"):
        reason = found["onnxruntime", precision]
        assert reason is not None
        assert precision in reason
        with pytest.raises(UnsupportedError, match=reason):
            open_runtime(graph, "onnxruntime", precision, "cpu")


def test_core_count_is_what_the_process_may_use() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from fastad.engine.base import core_count; print(core_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 1
    assert core_count() >= 1


def test_ctrl_c_while_a_node_is_translated_is_an_interrupt(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastad.engine.openvino_ops._hat", interrupt)
    monkeypatch.setattr("fastad.engine.openvino_ops._neighbours", interrupt)
    with pytest.raises(KeyboardInterrupt):
        openvino.OpenVINORuntime(graph, "fp32", cache=False)
