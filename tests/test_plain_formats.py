"""Plain model files: any program can load them, and their description is enough to feed them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
from fastad.export import plain, to_tensorrt
from fastad.export.plain import export_plain
from numpy.typing import NDArray
from PIL import Image

from fastad.engine.base import Outputs
from fastad.engine.parity import MAP_LIMIT
from fastad.engine.plans import Machine, Plan
from fastad.engine.pytorch import PyTorchRuntime
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.training.checkpoint import load_checkpoint

FORMATS = {"onnx": "a.onnx", "openvino": "a.xml"}


@pytest.fixture(scope="module")
def folder(texture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    for format_, name in FORMATS.items():
        assert export_plain(texture_run, out / name, format_) == out / name
    return out


@pytest.fixture(scope="module")
def frames(texture_run: Path) -> NDArray[np.uint8]:
    size = load_checkpoint(texture_run).method.input.size
    return np.random.default_rng(7).integers(0, 256, (3, *size, 3), np.uint8)


def sidecar(folder: Path, format_: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{FORMATS[format_]}.json").read_text())
    return found


def agrees(found: list[NDArray[Any]], run: Path, frames: NDArray[np.uint8]) -> None:
    anomaly_map, raw_score = PyTorchRuntime(load_checkpoint(run).method).run(frames)
    bound = MAP_LIMIT * float(np.ptp(anomaly_map))
    np.testing.assert_allclose(found[0], anomaly_map, rtol=0, atol=bound)
    np.testing.assert_allclose(found[1], raw_score, rtol=0, atol=bound)


def test_writes_these_files_and_no_others(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        *("a.bin", "a.onnx", "a.onnx.json", "a.xml", "a.xml.json"),
    ]


def test_onnx_passes_the_checker_with_nodes_and_functions(folder: Path) -> None:
    model = onnx.load(folder / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert "fastad" in {node.domain for node in model.graph.node}
    assert {f.name for f in model.functions} == {
        node.op_type for node in model.graph.node if node.domain == "fastad"
    }


def test_onnx_runs_in_a_bare_onnxruntime(
    folder: Path, texture_run: Path, frames: NDArray[np.uint8]
) -> None:
    session = onnxruntime.InferenceSession(folder / "a.onnx", providers=["CPUExecutionProvider"])
    agrees(session.run(["anomaly_map", "raw_score"], {"image": frames}), texture_run, frames)


def test_ir_runs_in_a_bare_openvino(
    folder: Path, texture_run: Path, frames: NDArray[np.uint8]
) -> None:
    model = ov.Core().compile_model(
        folder / "a.xml", "CPU", sidecar(folder, "openvino")["precision"]["openvino"]
    )
    found = model({"image": frames})
    agrees([found["anomaly_map"], found["raw_score"]], texture_run, frames)


def test_ir_loads_where_fastad_is_not(folder: Path) -> None:
    script = (
        "import sys; sys.modules['fastad'] = None\n"
        "import openvino as ov\n"
        "model = ov.Core().compile_model(sys.argv[1], 'CPU')\n"
        "print([o.get_any_name() for o in model.outputs], model.inputs[0].get_any_name())\n"
    )
    command = [sys.executable, "-c", script, folder / "a.xml"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['anomaly_map', 'raw_score'] image"


@pytest.mark.parametrize("format_", FORMATS)
def test_digests_are_of_the_files_written(folder: Path, format_: str) -> None:
    files = sidecar(folder, format_)["files"]
    assert sorted(files) == {"onnx": ["a.onnx"], "openvino": ["a.bin", "a.xml"]}[format_]
    for name, about in files.items():
        data = (folder / name).read_bytes()
        assert about == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("format_", FORMATS)
def test_the_description_is_the_models(folder: Path, format_: str, texture_run: Path) -> None:
    found, checkpoint = sidecar(folder, format_), load_checkpoint(texture_run)
    spec, calibration = checkpoint.record.spec, checkpoint.record.calibration
    assert calibration is not None
    H, W = spec.input.size
    assert found["input"]["shape"] == ["batch", H, W, 3]
    assert (found["input"]["name"], found["input"]["dtype"]) == ("image", "uint8")
    assert found["input"]["normalization"]["mean"] == list(spec.input.mean)
    assert found["outputs"]["anomaly_map"]["shape"] == ["batch", H, W]
    assert found["outputs"]["raw_score"]["rule"] == spec.score_rule
    assert found["calibration"]["pooled"]["value"] == calibration.pooled.value
    assert found["calibration"]["map_scale"] == list(calibration.map_scale)
    assert set(found["calibration"]["per_category"]) == set(calibration.per_category)
    assert found["categories"] == list(spec.categories)
    assert {r["runtime"] for r in found["parity"]} >= {"openvino"}
    assert all(r["map_max"] <= MAP_LIMIT for r in found["parity"])
    if format_ == "onnx":
        assert found["graph"]["opset"] == 18
        assert found["graph"]["domains"] == {"ai.onnx": 18, "fastad": 1}
        assert found["graph"]["functions"] == ["fastad::GridInterpolate2D"]
    else:
        assert all(domain.startswith("opset") for domain in found["graph"]["domains"])


def test_the_resize_in_words_is_the_resize(folder: Path) -> None:
    """The sidecar's text, written down as code, against Pillow."""
    words = sidecar(folder, "onnx")["input"]["resize"]["words"]
    for part in ("2^22", "2^21", ">> 22", "horizontal pass first", "(i + 0.5) * scale"):
        assert part in words

    def one_pass(pixels: NDArray[np.int64], n_out: int) -> NDArray[np.int64]:
        n_in = pixels.shape[0]
        scale = n_in / n_out
        support = max(scale, 1.0)
        out = np.empty((n_out, *pixels.shape[1:]), np.int64)
        for i in range(n_out):
            center = (i + 0.5) * scale
            first = max(int(center - support + 0.5), 0)
            last = min(int(center + support + 0.5), n_in)
            weight = np.array(
                [max(0, 1 - abs(j + 0.5 - center) / support) for j in range(first, last)]
            )
            fixed = np.int64(0.5 + weight / weight.sum() * 2**22)
            total = 2**21 + np.tensordot(fixed, pixels[first:last], 1)
            out[i] = np.clip(total >> 22, 0, 255)
        return out

    image = np.random.default_rng(1).integers(0, 256, (37, 50, 3), np.uint8)
    across = one_pass(image.astype(np.int64).swapaxes(0, 1), 23).swapaxes(0, 1)
    expected = np.asarray(Image.fromarray(image).resize((23, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(one_pass(across, 64), expected)


@pytest.mark.parametrize(
    ("name", "format_", "message"),
    [
        ("a.engine", "onnx", r"out: expected a name ending in \.onnx"),
        ("a.onnx", "openvino", r"out: expected a name ending in \.xml"),
        ("a.onnx", "tensorrt", "format: expected onnx, openvino, plan, got 'tensorrt'"),
        ("a.engine", "plan", r"out: expected a name ending in \.plan"),
        ("missing/a.onnx", "onnx", "the folder .* does not exist; create it first"),
    ],
)
def test_refuses_before_any_work(tmp_path: Path, name: str, format_: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_plain("there is no run", tmp_path / name, format_)


def test_a_file_that_differs_is_not_written(
    texture_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.onnx").write_text("the file before")
    monkeypatch.setattr(plain.parity, "MAP_LIMIT", -1.0)
    monkeypatch.setattr(plain.parity.check, "__defaults__", (-1.0,))
    with pytest.raises(EngineError, match="parity: openvino fp32 differs"):
        export_plain(texture_run, tmp_path / "a.onnx", "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_text() == "the file before"


def test_a_failed_write_leaves_no_description(
    texture_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.onnx.json").write_text("{}")

    def full(*_: object) -> None:
        raise EngineError("cannot be written (No space left on device)")

    monkeypatch.setattr(plain, "write_bytes", full)
    with pytest.raises(EngineError, match="No space left"):
        export_plain(texture_run, tmp_path / "a.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


class Pretended:
    """Stands for a plan that TensorRT loaded: what PyTorch gives, and ``error`` of its range."""

    name = "tensorrt"
    precision = "fp32"
    error = 0.0
    run_folder = Path()

    def __init__(self, data: bytes, plan: Plan, device: str) -> None:
        assert (data, plan.gpu, device) == (b"a plan", H200.gpu, "cuda")

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        maps, scores = PyTorchRuntime(load_checkpoint(self.run_folder).method).run(images)
        return maps + np.float32(self.error * np.ptp(maps)), scores

    def close(self) -> None:
        pass


H200 = Machine("NVIDIA H200", (9, 0), "11.4.0.106")


@pytest.fixture
def built_from(texture_run: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A pretended H200 whose builder answers ``a plan``; receives the graphs it was given."""
    graphs: list[bytes] = []

    def serialise(_: object, graph: bytes, *rest: object, **more: object) -> bytes:
        graphs.append(graph)
        return b"a plan"

    monkeypatch.setattr(Pretended, "run_folder", texture_run)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setattr(plain.tensorrt, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(plain.tensorrt, "this_machine", lambda _: H200)
    monkeypatch.setattr(plain.tensorrt, "TensorRTRuntime", Pretended)
    monkeypatch.setattr(to_tensorrt, "register", lambda: {"GridInterpolate": "GridInterpolate_0"})
    monkeypatch.setattr(to_tensorrt, "serialise", serialise)
    return graphs


def test_a_plan_is_built_compared_and_described(
    built_from: list[bytes], texture_run: Path, tmp_path: Path
) -> None:
    assert export_plain(texture_run, tmp_path / "a.plan", "plan") == tmp_path / "a.plan"
    assert (tmp_path / "a.plan").read_bytes() == b"a plan"
    (graph,) = built_from
    assert "GridInterpolate_0" in {n.op_type for n in onnx.load_from_string(graph).graph.node}
    found = json.loads((tmp_path / "a.plan.json").read_text())
    assert found["files"]["a.plan"]["sha256"] == hashlib.sha256(b"a plan").hexdigest()
    assert found["graph"]["tensorrt"] == H200.tensorrt
    assert (found["graph"]["gpu"], found["graph"]["compute_capability"]) == (H200.gpu, [9, 0])
    assert found["graph"]["max_batch"] == 8
    assert [report["runtime"] for report in found["parity"]] == ["tensorrt"]
    assert found["input"]["name"] == "image"


def test_a_plan_that_differs_is_not_written(
    built_from: list[bytes], texture_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretended, "error", 0.01)
    with pytest.raises(EngineError, match="parity: tensorrt fp32 differs"):
        export_plain(texture_run, tmp_path / "a.plan", "plan")
    assert len(built_from) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_tensorrt_a_plan_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastad.engine.cuda.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedError,
        match=r"tensorrt: tensorrt not installed; .* built on the machine that will run it",
    ):
        export_plain("there is no run", tmp_path / "a.plan", "plan")
