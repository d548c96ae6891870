"""Compiled models on disk: never stale, never trusted blindly, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from fastad.engine import openvino, openvino_cache
from fastad.engine.openvino import OpenVINORuntime
from fastad.engine.select import why_unsupported

SIZE = (8, 8)


def graph(weight: float = 2.0) -> bytes:
    """The smallest graph of the contract: map = mean of the colours times a weight."""
    model = parser.parse_model(
        """
<ir_version: 8, opset_import: ["" : 18]>
tiny (uint8[B, 8, 8, 3] image) => (float[B, 8, 8] anomaly_map, float[B] raw_score) {
  x = Cast <to = 1> (image)
  last = Constant <value_ints = [-1]> ()
  grey = ReduceMean <keepdims = 0> (x, last)
  anomaly_map = Mul (grey, weight)
  both = Constant <value_ints = [1, 2]> ()
  raw_score = ReduceMax <keepdims = 0> (anomaly_map, both)
}"""
    )
    values = np.full(SIZE, weight, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "weight"))
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(
        "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", f"{tmp_path}"
    )
    return tmp_path / "fastad" / "openvino"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Graphs that were compiled rather than imported."""
    seen: list[bytes] = []
    read = openvino.read_model

    def spy(core: object, graph: bytes, weights: bytes = b"") -> object:
        seen.append(graph)
        return read(core, graph, weights)

    monkeypatch.setattr(openvino, "read_model", spy)
    return seen


def run(graph_: bytes, **settings: Any) -> NDArray[np.float32]:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(1, 8, 8, 3)
    runtime = OpenVINORuntime(graph_, settings.pop("precision", "fp32"), 1, **settings)
    try:
        return runtime.run(image)[0]
    finally:
        runtime.close()


def blobs(place: Path) -> list[Path]:
    return sorted(place.glob("*.blob"))


def test_the_second_start_compiles_nothing(place: Path, compiled: list[bytes]) -> None:
    first = run(graph())
    assert (len(compiled), len(blobs(place))) == (1, 1)
    assert np.array_equal(run(graph()), first)
    assert len(compiled) == 1
    assert os.name == "nt" or place.stat().st_mode & 0o077 == 0


def test_another_graph_never_meets_an_old_blob(place: Path, compiled: list[bytes]) -> None:
    two, three = run(graph(2.0)), run(graph(3.0))
    np.testing.assert_allclose(three, 1.5 * two, rtol=1e-6)
    assert (len(compiled), len(blobs(place))) == (2, 2)


def test_another_precision_has_its_own_blob(place: Path, compiled: list[bytes]) -> None:
    if reason := why_unsupported("openvino", "bf16"):
        pytest.skip(reason)
    run(graph())
    run(graph(), precision="bf16")
    assert (len(compiled), len(blobs(place))) == (2, 2)


@pytest.mark.parametrize("what", ["version", "threads"])
def test_another_openvino_or_setting_compiles_again(
    what: str, compiled: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(graph())
    if what == "version":
        monkeypatch.setattr(openvino_cache.ov, "get_version", lambda: "2099.1")
        run(graph())
    else:
        OpenVINORuntime(graph(), "fp32", 2).close()
    assert len(compiled) == 2


def test_switched_off_leaves_no_trace(place: Path, compiled: list[bytes]) -> None:
    run(graph(), cache=False)
    assert not place.exists()
    run(graph())
    run(graph(), cache=False)
    assert len(compiled) == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text", "weights"])
def test_a_damaged_blob_is_replaced(place: Path, compiled: list[bytes], damage: str) -> None:
    expected = run(graph())
    [path] = blobs(place)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:middle],
            "empty": b"",
            "text": b"not a blob",
            "weights": whole.replace(np.float32(2).tobytes() * 4, np.float32(9).tobytes() * 4),
        }[damage]
    )
    assert path.read_bytes() != whole
    assert np.array_equal(run(graph()), expected)
    assert len(compiled) == 2
    assert np.array_equal(run(graph()), expected)
    assert len(compiled) == 2  # the blob is whole again


def test_a_blob_that_openvino_refuses_is_replaced(place: Path, compiled: list[bytes]) -> None:
    import hashlib

    expected = run(graph())
    [path] = blobs(place)
    other = b"of another version" * 100
    path.write_bytes(hashlib.sha256(other).digest() + other)
    assert np.array_equal(run(graph()), expected)
    assert len(compiled) == 2


@pytest.mark.parametrize("obstacle", ["file", "read-only", "full disk", "no home"])
def test_what_cannot_be_written_is_no_error(
    obstacle: str, tmp_path: Path, compiled: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "file":
        (tmp_path / "fastad").write_text("in the way")
    elif obstacle == "read-only":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
    elif obstacle == "full disk":

        def full(*_: object, **__: object) -> None:
            raise openvino_cache.EngineError("cannot be written (No space left on device)")

        monkeypatch.setattr(openvino_cache, "write_whole", full)
    else:
        monkeypatch.setattr(openvino_cache, "folder", lambda: None)
    first = run(graph())
    assert np.array_equal(run(graph()), first)
    assert len(compiled) == 2


def test_the_folder_stays_below_its_limit(
    place: Path, compiled: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(graph(4.0))
    [oldest] = blobs(place)
    os.utime(oldest, (1, 1))
    left_over = place / ".0123.partial"
    left_over.write_bytes(b"x")
    os.utime(left_over, (1, 1))
    monkeypatch.setattr(openvino_cache, "MAX_BYTES", int(oldest.stat().st_size * 2.5))
    run(graph(2.0))
    assert oldest in blobs(place)
    assert not left_over.exists()
    os.utime(oldest, (1, 1))
    run(graph(3.0))
    assert len(blobs(place)) == 2
    assert oldest not in blobs(place)


def test_processes_start_at_once(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(graph())
    script = (
        "import sys, numpy as np\n"
        "from fastad.engine.openvino import OpenVINORuntime\n"
        "graph = open(sys.argv[1], 'rb').read()\n"
        "for _ in range(3):\n"
        "    runtime = OpenVINORuntime(graph, 'fp32', 1)\n"
        "    print(float(runtime.run(np.full((1, 8, 8, 3), 7, np.uint8))[1][0]))\n"
    )
    command = [sys.executable, "-c", script, str(file)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        for _ in range(3)
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, out.split()) == (0, ["14.0"] * 3)
    assert len(blobs(place)) == 1
    assert not list(place.glob(".*.partial"))


def test_a_relative_cache_home_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("the rule of XDG_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/somewhere")
    assert openvino_cache.folder() == Path("/somewhere/.cache/fastad/openvino")
