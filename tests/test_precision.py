"""Precisions of an engine: tried and judged at export, chosen at load, verified afterwards."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from fastad.export import Limits, export_engine, precision
from fastad.export.engine import _gate_paths
from fastad.export.gate import GateImages, measure, refer
from fastad.export.precision import AUTO, Candidate, _Trial, parse_precisions, try_precisions
from fastad.export.quantize import Quantizer
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from textures import FALSE_ALARM_RATE, Outcome, Textures

from fastad.engine import select
from fastad.engine.base import Outputs, Precision, Runtime
from fastad.engine.container import Golden, read_engine, write_engine
from fastad.engine.parity import compare, verify
from fastad.engine.select import choose, open_runtime, why_unsupported
from fastad.errors import EngineError, FastadWarning, InputError, UnsupportedError
from fastad.evaluation import calibrate_model
from fastad.predictor import load
from fastad.spec import (
    GateReport,
    InputSpec,
    Manifest,
    ModelSpec,
    ParityReport,
    Variant,
    from_json,
    to_json,
)
from fastad.training.checkpoint import Record, checkpoint_folder, load_record, save_record
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
    """An engine with float32 and int8, which any change of maps, scores and alarms passes.

    How far int8 is off depends on the CPU's instructions; what is tested here must not.
    """
    out = tmp_path_factory.mktemp("mixed") / "mixed.engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastad.calibration.false_alarm_refusal", lambda *_: "")
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


def trial(graph: bytes, images: GateImages, limits: Limits) -> _Trial:
    reference = refer(open_runtime(graph, "onnxruntime", "fp32", "cpu", threads=1), images)
    return _Trial("onnxruntime", "int8", reference, None, limits, None)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runtimes that are timed together, the first takes half of the others' time."""
    monkeypatch.setattr(
        precision,
        "_ms_per_image",
        lambda runtimes, *_: [(1.0, 1.0) if i == 0 else (2.0, 2.0) for i in range(len(runtimes))],
    )


def test_a_damaged_layer_is_found_kept_and_then_it_passes(
    fast: None, graph: bytes, images: GateImages
) -> None:
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
    first = measure(open_runtime(damaged(), "onnxruntime", "int8", "cpu"), tried.reference, None)
    assert first.map_mean > limits.map_mean
    found = tried.judge("model.int8-ort.onnx", damaged, layers)
    assert found.report.refused == ""
    assert broken in found.variant.kept
    assert 0 < len(found.variant.kept) <= len(layers) / 2
    assert found.report.map_mean <= limits.map_mean
    found.close()


def test_what_never_passes_is_refused_with_both_reasons(
    fast: None, graph: bytes, images: GateImages
) -> None:
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
    # none, one and two groups kept
    assert [step for step in steps if step[0] == "gate"] == [("gate", i, 3) for i in (1, 2, 3)]


def search_of_16(
    monkeypatch: pytest.MonkeyPatch, tried: _Trial, passes: Callable[[int], bool]
) -> tuple[list[int], Callable[[], Candidate]]:
    """A search over 16 layers, the last the most sensitive: counts kept that closed, and its run.

    ``passes`` says of a count of layers kept whether the gate lets it through.
    """
    layers = [f"layer{i:02}" for i in range(16)]
    closed: list[int] = []

    def judged(_: _Trial, member: str, make: object, kept: tuple[str, ...]) -> Candidate:
        refused = "" if passes(len(kept)) else "too little"
        runtime = SimpleNamespace(close=lambda: closed.append(len(kept)))
        report = gate("onnxruntime", "int8", 0.0, refused)
        variant = Variant(member, "int8", (), ("onnxruntime",), (report,), tuple(kept))
        return Candidate(cast(Runtime, runtime), variant, b"")

    monkeypatch.setattr(precision, "GROUPS", 16)
    monkeypatch.setattr(_Trial, "_try", judged)
    monkeypatch.setattr(_Trial, "_ranked", lambda *_: [(name,) for name in layers[::-1]])
    return closed, lambda: tried.judge("model.int8.onnx", lambda kept: b"", layers)


@pytest.mark.parametrize("needed", range(1, 9))
def test_no_more_groups_are_kept_than_it_takes(
    needed: int, monkeypatch: pytest.MonkeyPatch, fast: None, graph: bytes, images: GateImages
) -> None:
    tried = trial(graph, images, NO_LOSS)
    closed, run = search_of_16(monkeypatch, tried, lambda kept: kept >= needed)
    assert run().variant.kept == tuple(f"layer{i:02}" for i in range(16 - needed, 16))
    assert needed not in closed
    assert len(closed) == len(set(closed))


def test_an_interrupted_search_closes_what_had_passed(
    monkeypatch: pytest.MonkeyPatch, fast: None, graph: bytes, images: GateImages
) -> None:
    def passes(kept: int) -> bool:
        if kept == 3:
            raise KeyboardInterrupt
        return kept == 4

    closed, run = search_of_16(monkeypatch, trial(graph, images, NO_LOSS), passes)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(closed) == [0, 1, 2, 4]


def test_a_slow_int8_is_refused_before_the_search(
    monkeypatch: pytest.MonkeyPatch, graph: bytes, images: GateImages
) -> None:
    monkeypatch.setattr(precision, "_ms_per_image", lambda *_: [(3.0, 2.0), (1.5, 2.0)])
    made: list[object] = []
    steps: list[tuple[str, int, int]] = []
    quantizer = Quantizer(graph, images.pixels)

    def make(kept: Collection[str]) -> bytes:
        made.append(kept)
        return quantizer.int8("u8", kept)

    tried = replace(
        trial(graph, images, NO_LOSS),
        progress=lambda s, done, total, _="": steps.append((s, done, total)),
    )
    found = tried.judge("model.int8-ort.onnx", make, quantizer.parts.layers)
    assert len(made) == 1
    assert steps == [("gate", 3, 3)]
    assert found.runtime is None
    assert found.report.refused.startswith("scores of normal images correlate")
    assert found.report.refused.endswith(
        "; layers to leave in float32 were not searched for, because even without them it is no "
        "faster than float32 on this machine: 3.0 against 1.5 ms for one image, 2.0 against 2.0 ms "
        "per image in a batch of 8"
    )


class Sleeper:
    """A runtime whose every run takes ten seconds of a clock that nobody waits for."""

    name = "sleeper"
    precision: Precision = "int8"
    now = 0.0

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        Sleeper.now += 10.0
        self.runs.append(len(images))
        return np.zeros(images.shape[:3], np.float32), np.zeros(len(images), np.float32)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [(5.0, ([1, 1, 8], [1, 1, 8])), (65.0, ([1, 1, 8, 1], [1, 1, 8])), (1e9, None)],
)
def test_timing_stops_after_the_run_that_passes_the_limit_and_ends_at_its_total(
    monkeypatch: pytest.MonkeyPatch, seconds: float, runs: tuple[list[int], list[int]] | None
) -> None:
    clock = SimpleNamespace(perf_counter=lambda: Sleeper.now)
    monkeypatch.setattr(precision, "time", clock)
    steps: list[tuple[str, int, int]] = []
    both = (Sleeper(), Sleeper())
    found = precision._ms_per_image(
        both,
        np.zeros((3, 4, 4, 3), np.uint8),
        4,
        seconds,
        lambda s, done, total, _="": steps.append((s, done, total)),
    )
    assert found == [(10000.0, 1250.0)] * 2
    expected = runs or ([1] + [1, 8] * 4,) * 2
    assert (both[0].runs, both[1].runs) == expected
    assert steps[-1] == ("timing", 4, 4)
    assert len(steps) == len(set(steps)) == (4 if runs is None else len(steps))


def test_a_graph_that_a_runtime_does_not_take_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, graph: bytes, images: GateImages
) -> None:
    opened: list[Any] = []

    def only_float32(data: bytes, name: str, wanted: str, *rest: Any, **more: Any) -> Runtime:
        if (name, wanted) == ("onnxruntime", "int8"):
            raise EngineError("onnxruntime: refuses the graph: no kernel")
        opened.append(open_runtime(data, name, wanted, *rest, **more))
        return cast(Runtime, opened[-1])

    monkeypatch.setattr(precision, "open_runtime", only_float32)
    found = try_precisions(graph, ("int8",), images.pixels, images, None, ANY_LOSS)
    reports = {(c.report.runtime, c.report.precision): c for c in found}
    refused = reports["onnxruntime", "int8"]
    assert refused.report.refused.startswith("onnxruntime: refuses the graph: no kernel")
    assert (refused.runtime, refused.variant.member) == (None, "model.onnx")
    assert reports["openvino", "int8"].report.refused == ""
    for candidate in found:
        candidate.close()


def test_an_interrupted_trial_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, graph: bytes, images: GateImages
) -> None:
    opened: list[Any] = []

    def recorded(*rest: Any, **more: Any) -> Runtime:
        opened.append(open_runtime(*rest, **more))
        return cast(Runtime, opened[-1])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(precision, "open_runtime", recorded)
    monkeypatch.setattr(precision, "_ms_per_image", stop)
    with pytest.raises(KeyboardInterrupt):
        try_precisions(graph, ("int8",), images.pixels, images, None, ANY_LOSS)
    assert len(opened) == 4
    for runtime in opened:
        with pytest.raises(EngineError, match="the runtime is closed"):
            runtime.run(images.pixels[:1])


def test_a_run_that_fails_refuses_and_closes(
    monkeypatch: pytest.MonkeyPatch, graph: bytes, images: GateImages
) -> None:
    class Failing(Sleeper):
        closed = False

        def run(self, images: NDArray[np.uint8]) -> Outputs:
            raise EngineError("run failed")

        def close(self) -> None:
            self.closed = True

    failing = Failing()
    monkeypatch.setattr(precision, "open_runtime", lambda *_, **__: failing)
    found = trial(graph, images, ANY_LOSS).judge("model.int8-ort.onnx", lambda kept: b"", ())
    assert (found.report.refused, found.runtime, failing.closed) == ("run failed", None, True)


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


def test_int8_with_bf16_shares_the_graph_and_the_ranking_of_int8(
    fast: None, graph: bytes, images: GateImages
) -> None:
    for name in ("int8", "int8-bf16"):
        if reason := why_unsupported("openvino", cast(Precision, name)):
            pytest.skip(reason)
    precisions: tuple[Precision, ...] = ("int8", "int8-bf16")
    passed = try_precisions(graph, precisions, images.pixels, images, None, ANY_LOSS)
    both = [c for c in passed if c.report.runtime == "openvino" and c.report.precision != "fp32"]
    assert [c.report.precision for c in both] == ["int8", "int8-bf16"]
    assert {c.variant.member for c in both} == {"model.int8.onnx"}
    maps = [c.runtime.run(images.pixels[:2])[0] for c in both if c.runtime]
    assert (maps[0] != maps[1]).any()  # the rest runs in another precision
    ranked: list[str] = []
    refused = try_precisions(
        *(graph, precisions, images.pixels, images, None, NO_LOSS),
        lambda stage, done, total, about="": (
            ranked.append(about) if stage == "sensitivity" and done == total else None
        ),
    )
    assert ranked == ["openvino int8", "onnxruntime int8"]
    reasons = {c.report.precision: c.report.refused for c in refused if c.report.refused}
    assert "layers in float32: " in reasons["int8"]
    assert "layers in bfloat16: " in reasons["int8-bf16"]
    for candidate in (*passed, *refused):
        candidate.close()


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (4.0, {"bf16": 5.0, "int8": 6.0}, ""),
        (4.0, {"bf16": 4.0, "int8": 6.0}, "no faster than bf16 on this machine: 4.0 against 4.0"),
        (7.0, {"bf16": -1.0, "int8": 6.0}, "no faster than int8 on this machine: 7.0 against 6.0"),
        (7.0, {"bf16": -1.0, "int8": -1.0}, ""),
    ],
)
def test_a_graph_of_its_own_has_to_be_the_fastest(
    own: float, others: dict[str, float], expected: str
) -> None:
    """A negative time stands for a refused precision."""
    times = {"fp32": 10.0, **others, "int8-bf16": own}
    found = [
        Candidate(
            None if times[v.precision] < 0 else cast(Runtime, SimpleNamespace(close=lambda: None)),
            v,
            v.precision.encode(),
        )
        for v in variants(**times)
    ]
    precision._share_or_refuse(found[-1], found)
    assert found[-1].report.refused[: len("accurate enough, but ")] == (
        "accurate enough, but " if expected else ""
    )
    assert expected in found[-1].report.refused
    assert found[-1].variant.member == ("model.onnx" if expected else "model.int8-bf16.onnx")


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
        assert own.gate[0].refused.startswith("accurate enough, but no faster than float32 on")
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
