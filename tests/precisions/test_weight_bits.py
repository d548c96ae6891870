"""int8 where CPUs lack dot products of int8: 8-bit weights do not run, those of 7 bits do."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from fastad.export import export_engine
from fastad.export.engine import _weight_bits
from fastad.export.gate import GateImages
from fastad.export.precision import try_precisions
from fastad.export.quantize import Quantizer
from judged import ANY_LOSS, needs_quantizer, variants
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from textures import FALSE_ALARM_RATE, Textures

from fastad import _native
from fastad.engine import select
from fastad.engine.container import read_engine, write_engine
from fastad.engine.parity import verify
from fastad.engine.select import choose, open_runtime
from fastad.errors import FastadWarning, InputError, UnsupportedError
from fastad.evaluation import calibrate_model
from fastad.spec import Variant

pytestmark = needs_quantizer


def sums(monkeypatch: pytest.MonkeyPatch, *, exactly: bool) -> None:
    """From here on, a CPU with or without dot products of int8."""
    monkeypatch.setattr("fastad._native.sums_int8_exactly", lambda: exactly)


def of_bits(bits: int, **ms: float) -> tuple[Variant, ...]:
    return tuple(replace(variant, weight_bits=bits) for variant in variants(**ms))


@pytest.mark.parametrize("precision", ["int8", "int8-bf16"])
@pytest.mark.parametrize(
    ("bits", "exactly", "runs"), [(8, True, True), (8, False, False), (7, False, True)]
)
def test_auto_leaves_out_weights_whose_sums_would_saturate(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    bits: int,
    exactly: bool,
    runs: bool,
) -> None:
    caplog.set_level(logging.WARNING, "fastad")
    monkeypatch.setattr(select, "why_unsupported", lambda *_: None)
    sums(monkeypatch, exactly=exactly)
    found = choose(of_bits(bits, **{"fp32": 10.0, precision: 4.0}), "openvino", "auto", "cpu")
    assert found.precision == (precision if runs else "fp32")
    assert ("sums of 8-bit weights would saturate" in caplog.text) is not runs


def test_by_name_they_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sums(monkeypatch, exactly=False)
    with pytest.raises(UnsupportedError, match=r"openvino int8: .*export with --int8-weight-bits "):
        choose(of_bits(8, fp32=10.0, int8=4.0), "auto", "int8", "cpu")
    assert choose(of_bits(7, fp32=10.0, int8=4.0), "auto", "int8", "cpu").precision == "int8"
    assert choose(of_bits(8, fp32=10.0, int8=4.0), "auto", "fp32", "cpu").precision == "fp32"


@pytest.mark.parametrize(
    ("asked", "exactly", "bits"), [(None, True, 8), (None, False, 7), (7, True, 7), (8, True, 8)]
)
def test_export_makes_weights_that_its_cpu_can_judge(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, exactly: bool, bits: int
) -> None:
    sums(monkeypatch, exactly=exactly)
    assert _weight_bits(asked) == bits


def test_an_engine_says_how_many_bits_its_weights_have(mixed: Path) -> None:
    with read_engine(mixed) as engine:
        made = [v for v in engine.manifest.variants if v.precision == "int8" and v.parity]
        graphs = [onnx.load_from_string(engine.member(v.member)) for v in made]
    bits = 8 if _native.sums_int8_exactly() else 7
    assert made and {v.weight_bits for v in made} == {bits}
    weights = [
        numpy_helper.to_array(constant)
        for graph in graphs
        for constant in graph.graph.initializer
        if constant.data_type == TensorProto.INT8 and len(constant.dims) > 1
    ]
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) == (127 if bits == 8 else 64)


def test_only_int8_has_weights_of_7_bits(graph: bytes, images: GateImages) -> None:
    found = try_precisions(
        *(graph, ("int8", "fp16"), images.pixels, images, None, ANY_LOSS), weight_bits=7
    )
    bits = {(c.variant.precision, c.variant.weight_bits) for c in found}
    for candidate in found:
        candidate.close()
    assert bits == {("fp32", 8), ("int8", 7), ("fp16", 8)}


def test_export_refuses_weights_that_its_cpu_cannot_judge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sums(monkeypatch, exactly=False)
    with pytest.raises(UnsupportedError, match=r"8-bit weights saturate here.*pass 7"):
        export_engine(tmp_path, tmp_path / "a.engine", precision="int8", weight_bits=8)


@pytest.mark.parametrize("asked", [6, True, 7.5])
def test_export_refuses_other_numbers_of_bits(asked: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weight_bits: expected 7 or 8"):
        export_engine(tmp_path, tmp_path / "a.engine", weight_bits=asked)  # type: ignore[arg-type]


@pytest.fixture
def of_8_bits(mixed: Path, tmp_path: Path) -> Path:
    """An engine as a CPU with dot products of int8 exports it."""
    with read_engine(mixed) as engine:
        manifest = engine.manifest
        members = {name: engine.member(name) for name in manifest.members}
    changed = tuple(replace(v, weight_bits=8) for v in manifest.variants)
    return write_engine(tmp_path / "8.engine", replace(manifest, variants=changed), members)


def test_verify_leaves_out_what_cannot_be_judged_here(
    monkeypatch: pytest.MonkeyPatch, of_8_bits: Path
) -> None:
    sums(monkeypatch, exactly=False)
    reports, absent = verify(of_8_bits)
    assert {report.precision for report in reports} == {"fp32"}
    with read_engine(of_8_bits) as engine:
        lower = [r for v in engine.manifest.variants for r in v.parity]
    expected = [f"{r.runtime} int8" for r in lower if r.precision == "int8"]
    told = [each for each in absent if "would saturate" in each]
    assert expected and [each.partition(":")[0] for each in told] == expected


def test_a_calibration_refuses_what_cannot_be_judged_here(
    monkeypatch: pytest.MonkeyPatch, of_8_bits: Path, textures: Textures, tmp_path: Path
) -> None:
    sums(monkeypatch, exactly=False)
    copy = Path(shutil.copy(of_8_bits, tmp_path / "copy.engine"))
    with pytest.warns(FastadWarning, match="int8 is refused from now on: .* would saturate"):
        calibrate_model(copy, data=textures.calibration, false_alarm_rate=FALSE_ALARM_RATE)


def wide_sums() -> bytes:
    """A convolution of 64 channels whose weights are all equal, so that int8 makes them largest."""
    constants = [
        numpy_helper.from_array(np.ones((64, 3, 1, 1), np.float32), "w0"),
        numpy_helper.from_array(np.ones((32, 64, 3, 3), np.float32), "w1"),
        numpy_helper.from_array(np.ones((1, 32, 1, 1), np.float32), "w2"),
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w0"], ["y"]),
        helper.make_node("Conv", ["y", "w1"], ["z"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["z", "w2"], ["planes"]),
        helper.make_node("Squeeze", ["planes", "one"], ["anomaly_map"]),
        helper.make_node("ReduceMax", ["anomaly_map", "sides"], ["raw_score"], keepdims=0),
    ]
    constants += [
        numpy_helper.from_array(np.array([1]), "one"),
        numpy_helper.from_array(np.array([1, 2]), "sides"),
    ]
    graph = helper.make_graph(
        nodes,
        "wide sums",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 32, 32, 3])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["B", 32, 32]),
            helper.make_tensor_value_info("raw_score", TensorProto.FLOAT, ["B"]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("form", ["s8", "u8"])
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_sums_of_7_bit_weights_are_exact_on_this_cpu(runtime: str, form: str) -> None:
    images = np.random.default_rng(0).integers(200, 256, (4, 32, 32, 3), dtype=np.uint8)
    graph = Quantizer(wide_sums(), images, 7).int8(form)  # type: ignore[arg-type]
    expected, _ = ReferenceEvaluator(graph).run(None, {"image": images})
    found, _ = open_runtime(graph, runtime, "int8", "cpu", cache=False).run(images)
    np.testing.assert_allclose(found, expected, rtol=1e-2)  # an output's own rounding to 8 bits


def test_sums_of_8_bit_weights_are_exact_where_we_say_so() -> None:
    images = np.random.default_rng(0).integers(200, 256, (4, 32, 32, 3), dtype=np.uint8)
    graph = Quantizer(wide_sums(), images, 8).int8()
    expected, _ = ReferenceEvaluator(graph).run(None, {"image": images})
    found, _ = open_runtime(graph, "openvino", "int8", "cpu", cache=False).run(images)
    exact = bool(np.allclose(found, expected, rtol=1e-2))
    assert exact is _native.sums_int8_exactly()
