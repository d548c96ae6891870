"""Lower precisions are judged again when thresholds change."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from judged import needs_quantizer
from onnx import helper, numpy_helper
from textures import FALSE_ALARM_RATE, Textures

from fastad.engine.container import read_engine, write_engine
from fastad.errors import EngineError, FastadWarning
from fastad.evaluation import calibrate_model
from fastad.predictor import load
from fastad.spec import GateReport, Variant

pytestmark = needs_quantizer


def with_int8(engine_path: Path, out: Path, change: float, calibrated: bool) -> Path:
    """The engine with ``change`` added to the scores of its shared int8 graph."""
    with read_engine(engine_path) as engine:
        manifest = engine.manifest
        members = {name: engine.member(name) for name in manifest.members}
    model = onnx.load_from_string(members["model.int8.onnx"])
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == "raw_score":
                node.output[i] = "score_before"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(change), "score_change"))
    last = helper.make_node("Add", ["score_before", "score_change"], ["raw_score"], name="added")
    model.graph.node.append(last)
    members["model.int8.onnx"] = model.SerializeToString()
    if not calibrated:
        gates = [
            tuple(replace(r, false_alarm_rate=None, false_alarm_interval=None) for r in v.gate)
            for v in manifest.variants
        ]
        variants = [replace(v, gate=g) for v, g in zip(manifest.variants, gates, strict=True)]
        manifest = replace(manifest, calibration=None, variants=tuple(variants))
    return write_engine(out, manifest, members)


def int8_of(engine_path: Path) -> tuple[Variant, GateReport]:
    with read_engine(engine_path) as engine:
        (variant,) = [
            v
            for v in engine.manifest.variants
            if (v.precision, v.runtimes) == ("int8", ("openvino",))
        ]
    return variant, variant.gate[0]


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "uncalibrated"])
def test_calibrating_an_engine_judges_its_precisions_again(
    mixed: Path, textures: Textures, tmp_path: Path, calibrated: bool
) -> None:
    off = with_int8(mixed, tmp_path / "off.engine", 1e3, calibrated)
    assert int8_of(off)[1].refused == ""
    with pytest.warns(FastadWarning, match="openvino int8 is refused from now on: 100.00% false"):
        calibrate_model(off, data=textures.calibration, false_alarm_rate=FALSE_ALARM_RATE)
    variant, report = int8_of(off)
    assert report.refused.startswith("100.00% false alarms on 48 normal images")
    assert report.false_alarm_rate == 1.0
    assert report.false_alarm_interval is not None
    with read_engine(off) as engine:
        (full,) = [r for r in engine.manifest.variants[0].gate if r.runtime == "openvino"]
    assert full.false_alarm_interval == report.false_alarm_interval
    assert full.false_alarm_rate is not None
    assert variant.parity[0].decision_flips == round(48 * (1 - full.false_alarm_rate))
    with load(off, runtime="openvino") as predictor:
        assert predictor.runtime.precision == "fp32"
    with pytest.raises(EngineError, match=r"100\.00% false alarms"):
        load(off, runtime="openvino", precision="int8")


def test_a_precision_refused_by_a_calibration_may_pass_the_next(
    mixed: Path, textures: Textures, tmp_path: Path
) -> None:
    off = with_int8(mixed, tmp_path / "off.engine", 1e3, True)
    with pytest.warns(FastadWarning, match="is refused from now on"):
        calibrate_model(off, data=textures.calibration, false_alarm_rate=FALSE_ALARM_RATE)
    back = with_int8(off, tmp_path / "back.engine", 0.0, True)
    with read_engine(mixed) as engine:
        graph = engine.member("model.onnx")
    with read_engine(back) as engine:
        manifest = engine.manifest
        members = {name: engine.member(name) for name in manifest.members}
    members["model.int8.onnx"] = graph  # float32 itself has float32's alarms
    write_engine(back, manifest, members)
    calibrate_model(back, data=textures.calibration, false_alarm_rate=FALSE_ALARM_RATE)
    assert int8_of(back)[1].refused == ""
    assert int8_of(back)[0].parity[0].decision_flips == 0


def test_a_precision_that_this_machine_cannot_judge_is_refused(
    mixed: Path, textures: Textures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(mixed, tmp_path / "copy.engine"))

    def why(wanted: str) -> str | None:
        return "openvino int8: not on this CPU" if wanted == "int8" else None

    monkeypatch.setattr("fastad.engine.openvino.why_unsupported", why)
    with pytest.warns(FastadWarning, match="is refused from now on"):
        calibrate_model(copy, data=textures.calibration, false_alarm_rate=FALSE_ALARM_RATE)
    report = int8_of(copy)[1]
    assert report.refused.startswith("the threshold changed after the gate; export again: openvino")
    assert (report.false_alarm_rate, report.false_alarm_interval) == (None, None)
