"""Precisions as the export tries, searches, judges and times them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from fastad.export import Limits, precision
from fastad.export.gate import GateImages, measure, refer
from fastad.export.precision import Candidate, _Trial, try_precisions
from fastad.export.quantize import Quantizer
from judged import ANY_LOSS, NO_LOSS, gate, needs_quantizer, variants
from numpy.typing import NDArray
from onnx import numpy_helper

from fastad.engine.base import Outputs, Precision, Runtime
from fastad.engine.select import open_runtime, why_unsupported
from fastad.errors import EngineError
from fastad.spec import Variant

pytestmark = needs_quantizer


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
