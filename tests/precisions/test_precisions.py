"""Precisions in an engine file: exported with their reports, verified, refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastad.export import export_engine
from fastad.export.engine import _gate_paths
from fastad.export.precision import AUTO, parse_precisions
from judged import ANY_LOSS, needs_quantizer
from textures import Outcome, Textures

from fastad.engine.base import Runtime
from fastad.engine.container import Golden, read_engine, write_engine
from fastad.engine.parity import compare, verify
from fastad.engine.select import why_unsupported
from fastad.errors import EngineError, FastadWarning, InputError, UnsupportedError
from fastad.predictor import load
from fastad.spec import InputSpec, Manifest, ModelSpec, ParityReport, from_json, to_json
from fastad.training.checkpoint import Record, checkpoint_folder, load_record, save_record
from fastad.training.folder import Sample

pytestmark = needs_quantizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", AUTO),
        ("fp32", ("fp32",)),
        ("int8,bf16", ("fp32", "bf16", "int8")),
        (["fp16"], ("fp32", "fp16")),
        ("int8-bf16,int8", ("fp32", "int8", "int8-bf16")),
    ],
)
def test_parses_lists_of_precisions(text: str | list[str], expected: tuple[str, ...]) -> None:
    assert parse_precisions(text) == expected


@pytest.mark.parametrize("text", ["int4", "", "auto,int8"])
def test_refuses_unknown_precisions_before_any_work(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision: expected auto or a list of fp32, bf16"):
        export_engine(tmp_path, tmp_path / "a.engine", precision=text)


def test_the_engine_holds_int8_with_its_reports(mixed: Path) -> None:
    with read_engine(mixed) as engine:
        manifest = engine.manifest
        assert "model.int8.onnx" in manifest.members
    full, *lower = manifest.variants
    assert {(r.runtime, r.refused) for r in full.gate} == {("openvino", ""), ("onnxruntime", "")}
    shared = next(v for v in lower if v.runtimes == ("openvino",))
    (report,) = shared.gate
    assert (shared.member, report.precision, report.refused) == ("model.int8.onnx", "int8", "")
    assert 0 < report.map_mean <= report.map_max
    assert report.normal_images == 8  # what training held out
    assert report.test_images == 0
    assert shared.parity[0].precision == "int8"
    own = next(v for v in lower if v.runtimes == ("onnxruntime",))
    if own.gate[0].refused:
        assert own.gate[0].refused.startswith("accurate enough, but no faster than float32 on")
        assert "model.int8-ort.onnx" not in manifest.members
    else:
        assert own.member in manifest.members
    assert from_json(Manifest, to_json(manifest), "manifest") == manifest


def test_verify_covers_every_variant(mixed: Path) -> None:
    found = {(r.runtime, r.precision) for r in verify(mixed)[0]}
    assert {("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "int8")} <= found


def test_verify_refuses_an_int8_graph_that_is_not_the_one_measured(
    mixed: Path, tmp_path: Path
) -> None:
    with read_engine(mixed) as engine:
        manifest, golden = engine.manifest, engine.golden()
        members = {name: engine.member(name) for name in manifest.members}
    full, *lower = manifest.variants
    close = [
        replace(v, parity=tuple(replace(p, map_max=0.0, score_max=0.0) for p in v.parity))
        for v in lower
    ]
    claimed = replace(manifest, variants=(full, *close))
    arrays = Golden(golden.images, golden.anomaly_map, golden.raw_score).members()
    path = write_engine(tmp_path / "claimed.engine", claimed, members | arrays)
    with pytest.raises(EngineError, match=r"openvino int8 differs .* allowed is 0\.001"):
        verify(path)


def test_few_held_out_images_refuse_with_their_count(
    texture_run: Path, textures: Textures, tmp_path: Path
) -> None:
    some = sorted(textures.calibration.rglob("*.png"))[:5]
    out = export_engine(texture_run, tmp_path / "few.engine", images=some, precision="int8")
    with read_engine(out) as engine:
        reports = [r for v in engine.manifest.variants[1:] for r in v.gate]
        assert "model.int8.onnx" not in engine.manifest.members
    assert reports
    assert all(r.refused.startswith("5 held-out normal images prove nothing") for r in reports)
    with pytest.raises(EngineError, match="5 held-out normal images prove nothing, 8 are needed"):
        load(out, precision="int8", runtime="openvino")
    load(out).close()


class Broken:
    """A lower precision that stops working, or gives NaN, once it is compared with PyTorch."""

    def __init__(self, answer: float | None) -> None:
        self.answer = answer

    def compare(self, runtime: Runtime, *rest: Any) -> ParityReport:
        report = compare(runtime, *rest)
        if runtime.precision == "fp32":
            return report
        if self.answer is None:
            raise EngineError("openvino: run failed: out of memory")
        return replace(report, map_max=self.answer)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "it failed when it was compared with PyTorch: openvino: run failed: out of memory"),
        (float("nan"), "it gives NaN or infinity on images that PyTorch was compared on"),
    ],
    ids=["fails", "nan"],
)
def test_a_precision_that_fails_parity_is_refused_and_float32_is_written(
    monkeypatch: pytest.MonkeyPatch,
    texture_run: Path,
    tmp_path: Path,
    answer: float | None,
    reason: str,
) -> None:
    if missing := why_unsupported("openvino", "int8"):
        pytest.skip(missing)
    monkeypatch.setattr("fastad.engine.parity.compare", Broken(answer).compare)
    monkeypatch.setattr("fastad.calibration.false_alarm_refusal", lambda *_: "")
    out = export_engine(texture_run, tmp_path / "a.engine", precision="int8", limits=ANY_LOSS)
    with read_engine(out) as engine:
        full, *lower = engine.manifest.variants
        assert "model.int8.onnx" not in engine.manifest.members
    assert {p.precision for p in full.parity} == {"fp32"}
    (shared,) = [v for v in lower if v.runtimes == ("openvino",)]
    assert (shared.gate[0].refused, shared.parity, shared.member) == (reason, (), "model.onnx")
    with pytest.raises(EngineError, match=re.escape(reason)):
        load(out, precision="int8", runtime="openvino")
    with load(out, runtime="openvino") as predictor:
        assert predictor.runtime.precision == "fp32"


@pytest.mark.parametrize("asked", ["int8", "fp16", "int8,fp16"])
def test_without_a_quantizer_a_named_precision_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str
) -> None:
    monkeypatch.setattr("fastad.engine.onnxruntime.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedError, match=r"the quantizer for .* is missing: onnxruntime: not installed"
    ):
        export_engine(tmp_path, tmp_path / "a.engine", precision=asked)


def test_without_a_quantizer_auto_leaves_int8_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch, texture_run: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastad.engine.onnxruntime.find_spec", lambda name: None)
    with pytest.warns(FastadWarning, match="the quantizer for int8, int8-bf16 is missing: onnxrun"):
        out = export_engine(texture_run, tmp_path / "a.engine", precision="auto")
    with read_engine(out) as engine:
        assert {v.precision for v in engine.manifest.variants} <= {"fp32", "bf16"}
        assert engine.manifest.variants[0].gate


@pytest.fixture
def all_trained(texture_run: Path, tmp_path: Path) -> Path:
    """The run as if training had held nothing out."""
    run = Path(shutil.copytree(texture_run, tmp_path / "all"))
    record = load_record(run)
    save_record(
        checkpoint_folder(run),
        replace(record, fit=(*record.fit, *record.holdout), holdout=()),
    )
    return run


@pytest.mark.parametrize("named", [False, True], ids=["held out", "images"])
def test_images_of_the_training_judge_no_precision(
    all_trained: Path, tmp_path: Path, named: bool
) -> None:
    record = load_record(all_trained)
    images = [Path(record.data_root) / name for name in record.fit[:20]] if named else None
    out = tmp_path / "a.engine"
    with pytest.raises(InputError, match=r"precision: int8 cannot be judged, training saw all the"):
        export_engine(all_trained, out, images=images, precision="int8")
    assert not out.exists()


def test_a_run_without_held_out_images_exports_float32(all_trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.engine"
    with pytest.warns(FastadWarning, match=r"pass --images with other .* holds float32 only"):
        export_engine(all_trained, out, precision="auto")
    with read_engine(out) as engine:
        (variant,) = engine.manifest.variants
        assert (variant.precision, variant.gate) == ("fp32", ())


def paths(folder: Path, *numbers: int) -> list[Path]:
    found = [folder / f"{number}.png" for number in numbers]
    for path in found:
        path.touch()
    return found


def test_ranges_and_gate_share_no_image(tmp_path: Path) -> None:
    spec = ModelSpec("grad", InputSpec((8, 8)), {})
    held = paths(tmp_path, *range(10, 20))
    fit = paths(tmp_path, *range(6))
    record = Record(spec, str(tmp_path), tuple(p.name for p in fit))
    assert _gate_paths(record, held, ()) == (held, fit)
    link = tmp_path / "x" / ".." / "3.png"
    (tmp_path / "x").mkdir()
    assert _gate_paths(record, [*held, fit[0], link], ()) == (held, fit)
    tested = [Sample(fit[1], "", False)]
    assert _gate_paths(record, held, tested) == (held, [fit[0], *fit[2:]])
    for path in fit:
        path.unlink()
    assert _gate_paths(record, held, ()) == (held[1::2], held[::2])
    assert _gate_paths(replace(record, fit=()), held, ()) == (held[1::2], held[::2])


def test_test_data_without_test_images_is_refused(
    texture_run: Path, textures: Textures, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="expected test images in"):
        export_engine(
            texture_run,
            tmp_path / "a.engine",
            precision="int8",
            test_data=textures.calibration / "grain" / "good",
        )


def test_the_command_line_shows_the_gate(
    cli: Callable[..., Outcome], texture_run: Path, textures: Textures, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "a.engine"
    shutil.copytree(texture_run, run)
    done = cli(
        *(
            "export",
            run,
            "--out",
            out,
            "--precision",
            "int8",
            "--int8-weight-bits",
            7,
            "--test-data",
            textures.root,
            "--json",
        )
    )
    document = json.loads(done.out)
    reports = {(r["runtime"], r["precision"]): r for r in document["gate"]}
    assert reports["openvino", "int8"]["test_images"] == 22
    assert reports["openvino", "int8"]["image_auroc_change"] is not None
    assert reports["openvino", "int8"]["aupro_change"] is not None
    assert document["auto"]["openvino"] in ("fp32", "int8")
    shown = cli("info", out).out
    assert "precisions against float32" in shown
    assert "22 labelled images" in shown
    assert json.loads(cli("verify", out, "--json").out)["verified"] is True
    with read_engine(out) as engine:
        lower = [v for v in engine.manifest.variants if v.precision == "int8"]
    assert lower and {v.weight_bits for v in lower} == {7}
