"""Which precision of an engine is loaded, and why not the others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from judged import needs_quantizer, variants
from textures import Textures

from fastad.engine import select
from fastad.engine.container import read_engine, write_engine
from fastad.engine.select import choose
from fastad.errors import EngineError, UnsupportedError
from fastad.predictor import load
from fastad.spec import Variant

pytestmark = needs_quantizer


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that runs everything, whatever this one can."""
    monkeypatch.setattr(select, "why_unsupported", lambda runtime, precision: None)
    monkeypatch.setattr("fastad._native.sums_int8_exactly", lambda: True)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"fp32": 10.0, "bf16": 6.0, "int8": 4.0}, "int8"),
        ({"fp32": 10.0, "bf16": 3.0, "int8": 4.0}, "bf16"),
        ({"fp32": 10.0, "bf16": 6.0, "int8": -4.0}, "bf16"),
        ({"fp32": 10.0, "bf16": 6.0, "int8": 7.0, "int8-bf16": 5.0}, "int8-bf16"),
        ({"fp32": 10.0, "bf16": 9.8, "int8": 11.0}, "fp32"),  # not worth it
        ({"fp32": 10.0}, "fp32"),
    ],
)
def test_auto_takes_the_fastest_that_passed(
    able: None, times: dict[str, float], expected: str
) -> None:
    chosen = choose(variants(**times), "openvino", "auto", "cpu")
    member = "model.onnx" if expected == "fp32" else f"model.{expected}.onnx"
    assert (chosen.precision, chosen.member) == (expected, member)


def test_auto_leaves_out_what_this_machine_cannot_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reason(runtime: str, name: str) -> str | None:
        return "openvino bf16: this CPU has no BF16" if name == "bf16" else None

    monkeypatch.setattr(select, "why_unsupported", reason)
    caplog.set_level(logging.INFO, "fastad")
    found = choose(variants(fp32=10.0, bf16=2.0, int8=-1.0), "auto", "auto", "auto")
    assert (found.runtime, found.precision) == ("openvino", "fp32")
    assert "not openvino bf16: openvino bf16: this CPU has no BF16" in caplog.text
    assert "refused by the gate: it lost 9 points" in caplog.text


def test_a_refused_precision_raises_the_gates_sentence(able: None) -> None:
    with pytest.raises(
        EngineError,
        match=r"openvino int8: refused by the gate: it lost 9 points; use precision='fp3",
    ):
        choose(variants(fp32=10.0, int8=-4.0), "auto", "int8", "cpu")
    assert choose(variants(fp32=10.0, int8=-4.0), "auto", "fp32", "cpu").member == "model.onnx"


def test_a_precision_that_is_not_in_the_file_names_the_way_out(able: None) -> None:
    with pytest.raises(UnsupportedError, match=r"exported without it; export it with --precision "):
        choose(variants(fp32=10.0, int8=4.0), "auto", "bf16", "cpu")


def test_engines_without_a_gate_run_float32_and_bf16_by_name(able: None) -> None:
    old = (Variant("model.onnx", "fp32", ()),)
    assert choose(old, "auto", "auto", "cpu").precision == "fp32"
    assert choose(old, "auto", "bf16", "cpu").member == "model.onnx"
    with pytest.raises(UnsupportedError, match="exported without it"):
        choose(old, "auto", "int8", "cpu")


def test_int8_predicts_by_name(mixed: Path, textures: Textures) -> None:
    paths = textures.images()[:3]
    with (
        load(mixed, precision="int8", runtime="openvino") as lower,
        load(mixed, precision="fp32", runtime="openvino") as full,
    ):
        assert (lower.runtime.name, lower.runtime.precision) == ("openvino", "int8")
        assert full.runtime.precision == "fp32"
        pairs = list(zip(lower.iterate(paths), full.iterate(paths), strict=True))
    assert any(a.raw_score != b.raw_score for a, b in pairs)


def test_auto_at_load_is_what_was_measured(mixed: Path, tmp_path: Path) -> None:
    with read_engine(mixed) as engine:
        manifest = engine.manifest
        members = {name: engine.member(name) for name in manifest.members}
    for factor, expected in ((0.5, "int8"), (2.0, "fp32")):
        full, *lower = manifest.variants
        ms = {r.runtime: r.ms_batch1 for r in full.gate}
        timed = [
            replace(v, gate=tuple(replace(r, ms_batch1=ms[r.runtime] * factor) for r in v.gate))
            for v in lower
        ]
        changed = replace(manifest, variants=(full, *timed))
        engine_path = write_engine(tmp_path / f"{expected}.engine", changed, members)
        with load(engine_path, runtime="openvino") as predictor:
            assert predictor.runtime.precision == expected
