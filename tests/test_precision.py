"""Precisions of an engine: tried and judged at export, chosen at load, verified afterwards."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from fastad.export import Limits, export_engine, precision
from fastad.export.gate import GateImages, measure
from fastad.export.precision import AUTO, _Trial, parse_precisions, try_precisions
from fastad.export.quantize import Quantizer
from onnx import numpy_helper
from textures import Outcome, Textures

from fastad.engine import select
from fastad.engine.container import Golden, read_engine, write_engine
from fastad.engine.parity import verify
from fastad.engine.select import choose, open_runtime, why_unsupported
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.predictor import load
from fastad.spec import GateReport, Manifest, Variant, from_json, to_json
from fastad.training.folder import Sample

pytestmark = pytest.mark.skipif(
    why_unsupported("onnxruntime", "fp32") is not None, reason="the quantizer is onnxruntime's"
)
NO_LOSS = Limits(0.0, 0.0, 1.1, 0.0)  # a rank correlation above 1 does not exist
ANY_LOSS = Limits(1e3, 1e3, -2.0, 1e3)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TIMED_ROUNDS", 3)
    monkeypatch.setattr(precision, "GROUPS", 4)


@pytest.fixture(scope="module")
def mixed(texture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with float32 and int8, which any change of the maps passes."""
    out = tmp_path_factory.mktemp("mixed") / "mixed.engine"
    return export_engine(texture_run, out, precision="int8", limits=ANY_LOSS)


@pytest.fixture(scope="module")
def graph(mixed: Path) -> bytes:
    with read_engine(mixed) as engine:
        return engine.member("model.onnx")


@pytest.fixture(scope="module")
def images(mixed: Path) -> GateImages:
    with read_engine(mixed) as engine:
        first = engine.golden().images
    rng = np.random.default_rng(0)
    noise = rng.integers(-20, 20, (8, *first.shape[1:]))
    pixels = np.clip(np.resize(first, noise.shape).astype(int) + noise, 0, 255).astype(np.uint8)
    samples = tuple(Sample(Path(f"{i}.png"), "", False) for i in range(8))
    return GateImages(pixels, samples, 8)


def gate(runtime: str, name: str, ms: float, refused: str = "") -> GateReport:
    return GateReport(
        runtime, name, 8, 0, 0.1, 0.01, 0.99, None, None, None, None, None, ms, ms, refused
    )


def variants(**ms: float) -> tuple[Variant, ...]:
    """Variants for openvino with these times; a negative one is refused."""
    return tuple(
        Variant(
            "model.onnx" if name == "fp32" else f"model.{name}.onnx",
            *(name, (), ("openvino",)),
            (gate("openvino", name, abs(time), "it lost 9 points" if time < 0 else ""),),
        )
        for name, time in ms.items()
    )


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that runs everything, whatever this one can."""
    monkeypatch.setattr(select, "why_unsupported", lambda runtime, precision: None)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"fp32": 10.0, "bf16": 6.0, "int8": 4.0}, "int8"),
        ({"fp32": 10.0, "bf16": 3.0, "int8": 4.0}, "bf16"),
        ({"fp32": 10.0, "bf16": 6.0, "int8": -4.0}, "bf16"),
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
    assert "refused at export: it lost 9 points" in caplog.text


def test_a_refused_precision_raises_the_gates_sentence(able: None) -> None:
    with pytest.raises(
        EngineError, match=r"openvino int8: refused at export: it lost 9 points; use precision='fp3"
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", AUTO),
        ("fp32", ("fp32",)),
        ("int8,bf16", ("fp32", "bf16", "int8")),
        (["fp16"], ("fp32", "fp16")),
    ],
)
def test_parses_lists_of_precisions(text: str | list[str], expected: tuple[str, ...]) -> None:
    assert parse_precisions(text) == expected


@pytest.mark.parametrize("text", ["int4", "", "auto,int8"])
def test_refuses_unknown_precisions_before_any_work(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision: expected auto or a list of fp32, bf16"):
        export_engine(tmp_path, tmp_path / "a.engine", precision=text)


def trial(graph: bytes, images: GateImages, limits: Limits) -> _Trial:
    reference = open_runtime(graph, "onnxruntime", "fp32", "cpu", threads=1)
    return _Trial("onnxruntime", "int8", reference, images, None, limits, None)


def test_a_damaged_layer_is_found_kept_and_then_it_passes(graph: bytes, images: GateImages) -> None:
    quantizer = Quantizer(graph, images.pixels)
    layers = quantizer.parts.layers
    broken = layers[len(layers) // 2]

    def damaged(kept: tuple[str, ...] = ()) -> bytes:
        """The int8 graph with one layer's weights blown up, unless that layer is kept."""
        data = quantizer.int8("u8", kept)
        if broken in kept:
            return data
        model = onnx.load_from_string(data)
        (node,) = [n for n in model.graph.node if n.name == broken]
        (weight,) = [n for n in model.graph.node if n.output[0] == node.input[1]]
        (scale,) = [i for i in model.graph.initializer if i.name == weight.input[1]]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 50, scale.name))
        return model.SerializeToString()

    limits = Limits(rank_correlation=-2.0, map_mean=0.03)
    tried = trial(graph, images, limits)
    first = measure(
        open_runtime(damaged(), "onnxruntime", "int8", "cpu"), tried.reference, images, None
    )
    assert first.map_mean > limits.map_mean
    found = tried.judge("model.int8-ort.onnx", damaged, layers)
    assert found.report.refused == ""
    assert broken in found.variant.kept
    assert 0 < len(found.variant.kept) <= len(layers) / 2
    assert found.report.map_mean <= limits.map_mean
    found.close()


def test_what_never_passes_is_refused_with_both_reasons(graph: bytes, images: GateImages) -> None:
    steps: list[tuple[str, int, int]] = []
    tried = replace(
        trial(graph, images, NO_LOSS),
        progress=lambda s, done, total, _="": steps.append((s, done, total)),
    )
    quantizer = Quantizer(graph, images.pixels)
    found = tried.judge(
        "model.int8-ort.onnx", lambda k: quantizer.int8("u8", k), quantizer.parts.layers
    )
    assert found.runtime is None
    assert (found.variant.member, found.variant.kept) == ("model.onnx", ())
    assert found.report.refused.startswith("scores of normal images correlate")
    assert "most sensitive of" in found.report.refused
    assert [step for step in steps if step[0] == "sensitivity"] == [
        ("sensitivity", i, 4) for i in range(1, 5)
    ]
    assert len([step for step in steps if step[0] == "gate"]) == 3  # none, one and two groups kept


def test_bf16_has_no_layers_to_keep(graph: bytes, images: GateImages) -> None:
    if reason := why_unsupported("openvino", "bf16"):
        pytest.skip(reason)
    found = try_precisions(graph, ("bf16",), images.pixels, images, None, NO_LOSS)
    (bf16,) = [c for c in found if c.variant.precision == "bf16"]
    assert bf16.runtime is None
    assert "most sensitive" not in bf16.report.refused
    (full,) = [c for c in found if c.report.runtime == "openvino" and c is not bf16]
    assert full.report.refused == ""
    assert full.report.ms_batch1 > 0
    for candidate in found:
        candidate.close()


def test_float16_is_a_variant_of_its_own_when_asked_for(graph: bytes, images: GateImages) -> None:
    found = try_precisions(graph, ("fp16",), images.pixels, images, None, ANY_LOSS)
    made = {(c.report.runtime, c.variant.precision): c for c in found}
    assert made["onnxruntime", "fp16"].variant.member == "model.fp16.onnx"
    assert 0 < made["onnxruntime", "fp16"].report.map_max < 0.01
    assert len(made["onnxruntime", "fp16"].graph) < len(graph)
    for candidate in found:
        candidate.close()


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
        assert own.gate[0].refused.startswith("slower than float32 here")
        assert "model.int8-ort.onnx" not in manifest.members
    else:
        assert own.member in manifest.members
    assert from_json(Manifest, to_json(manifest), "manifest") == manifest


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
