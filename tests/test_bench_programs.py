"""The bench programs run to their result file, on small engines and few rounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    end_to_end,
    engines,
    fresh,
    matrix_peak,
    models,
    ops,
    precisions,
    readme,
    resize,
    soak,
    timing,
)
from fastad.engine.base import Precision
from fastad.engine.container import read_engine
from fastad.engine.openvino import why_unsupported
from fastad.engine.select import RUNTIMES
from fastad.engine.select import why_unsupported as runtime_lacks
from fastad.ops.grid_interpolate import cases as grid_cases
from fastad.spec import GateReport
from fastad.training.recipe import load_recipe

ENGINE = soak.ENGINE


def result(results: Path, suite: str) -> dict[str, Any]:
    """The one result file, which also has to make a table for the README."""
    (path,) = timing.version_folder(results).glob(f"{suite}--*.json")
    assert readme.section(suite, results).count("| --- |") >= 1
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_models_measures_every_way_in_every_batch(
    texture_run: Path, texture_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_peak, "measure", partial(matrix_peak.measure, (64,), 0.0))
    start = fresh.Start(first_s=3.0, again_s=2.0, peak_bytes={1: 5_000_000, 3: 6_000_000})
    started: list[tuple[Path, str, str]] = []

    def measured(path: Path, runtime: str, precision: str, *_: object) -> fresh.Start:
        started.append((path, runtime, precision))
        return start

    monkeypatch.setattr(fresh, "measure", measured)
    options = ["--results", str(tmp_path), "--rounds", "2", "--budget-s", "0"]
    options += ["--batch", "1", "--batch", "3"]
    assert models.main([str(texture_run), str(texture_engine), *options]) == 0
    found = result(tmp_path, "models")
    with read_engine(texture_engine) as engine:
        names = {way.name for way in models.ways(engine.manifest)}
    assert names >= {"openvino fp32", "onnxruntime fp32"}
    rows = found["rows"]
    assert {(row["runtime"], row["batch"]) for row in rows} == {
        (name, batch) for name in names | {models.BASELINE} for batch in (1, 3)
    }
    full = [row for row in rows if row["precision"] == "fp32"]
    assert all(row["map_max"] <= 1e-3 for row in full)
    numbers = ("p50_ms", "images_per_s", "times_limit", "gflop")
    assert all(row[name] > 0 for row in full for name in numbers)
    assert {(row["first_s"], row["again_s"]) for row in rows} == {(3.0, 2.0)}
    by = {(row["runtime"], row["batch"]): row for row in rows}
    one, three = by["openvino fp32", 1], by["openvino fp32", 3]
    assert three["gflop"] == pytest.approx(3 * one["gflop"])
    assert (one["peak_mb"], three["peak_mb"]) == (5.0, 6.0)
    assert (texture_run, "pytorch", "fp32") in started
    assert len(started) == len(names) + 1


def test_fresh_processes_give_start_and_peak_of_each_batch() -> None:
    found = fresh.measure(ENGINE, "onnxruntime", "fp32", [4, 1], "model.onnx")
    assert found.first_s > 0
    assert found.again_s > 0
    assert found.peak_bytes[4] >= found.peak_bytes[1] > 10_000_000


def test_fresh_opens_a_run_with_pytorch(
    texture_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fresh.main([str(texture_run), "--runtime", "pytorch", "--batch", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["first_result"] > 0
    assert set(told["peak_bytes"]) == {"2"}


def test_models_refuses_a_run_without_its_engine(
    texture_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        models.main([str(texture_run)])
    assert "expected pairs of RUN and ENGINE, got 1 paths" in capsys.readouterr().err


def test_models_shows_the_variants_of_the_engine() -> None:
    with read_engine(ENGINE) as engine:
        found = {way.name: way for way in models.ways(engine.manifest)}
    assert set(found) >= {"openvino fp32", "onnxruntime fp32"}
    assert ("openvino bf16" in found) == (why_unsupported("bf16") is None)
    assert all(way.gate is not None for way in found.values())


def test_models_runs_no_float32_graph_under_another_name() -> None:
    with read_engine(ENGINE) as engine:
        manifest = engine.manifest
    full = manifest.variants[0]
    reports = tuple(
        replace(r, precision="int8", refused="too far off") for r in full.gate if not r.refused
    )
    assert [report.runtime for report in reports] == list(RUNTIMES)
    refused = replace(full, precision="int8", gate=reports)
    held = replace(refused, member="model.int8.onnx", weight_bits=7)
    assert models.left_out(manifest) == []
    lacking = replace(manifest, variants=(*manifest.variants, refused))
    assert [way.name for way in models.ways(lacking)] == [w.name for w in models.ways(manifest)]
    assert models.left_out(lacking) == [f"{r.runtime} int8: too far off" for r in reports]
    holding = replace(manifest, variants=(full, held))
    here = [runtime for runtime in RUNTIMES if runtime_lacks(runtime, "int8") is None]
    assert "onnxruntime" in here
    ran = [(way.runtime, way.member) for way in models.ways(holding) if way.precision == "int8"]
    assert ran == [(runtime, held.member) for runtime in here]
    assert models.left_out(holding) == []


@pytest.mark.parametrize(
    ("precision", "refused", "expected"),
    [("fp32", "", "float32"), ("int8", "", "passed"), ("int8", "AUROC fell", "refused")],
)
def test_models_says_what_the_gate_said(precision: Precision, refused: str, expected: str) -> None:
    report = GateReport(
        "openvino", precision, 9, 0, 0.1, 0.01, 1.0, None, None, -0.2, None, None, 1, 1, refused
    )
    way = models.Way("model.onnx", "openvino", precision, report)
    said = models.judgement(way)
    assert said["gate"] == expected
    assert said.get("refused", "") == refused
    assert said.get("image_auroc_change") == (None if precision == "fp32" else -0.2)


def test_precisions_gives_no_figure_for_what_was_not_timed() -> None:
    with read_engine(ENGINE) as engine:
        manifest = engine.manifest
    full = manifest.variants[0]
    (report,) = (r for r in full.gate if r.runtime == "openvino")
    timed = [replace(r, ms_batch1=4.0, ms_batch8=2.0) for r in full.gate]
    refused = replace(report, ms_batch1=0.0, ms_batch8=0.0, refused="too far off")
    variants = (
        replace(full, gate=tuple(timed)),
        replace(full, precision="bf16", gate=(replace(refused, precision="bf16"),)),
        replace(full, precision="int8", gate=(replace(refused, precision="int8"),)),
    )
    told = replace(manifest, variants=variants)
    rows = precisions.table(told, (None, None, None))
    named = {(row["runtime"], row["precision"]): row for row in rows}
    ms = ("ms B1", "ms B8", "x B1", "x B8")
    one = named["openvino", "fp32"]
    assert [one[name] for name in ms] == [4.0, 2.0, 1.0, 1.0]
    shared, absent = named["openvino", "bf16 (refused)"], named["openvino", "int8 (refused)"]
    assert [row[name] for row in (shared, absent) for name in ms] == [None] * 8
    # bfloat16 runs the float32 graph; a refused int8 graph is not in the file
    assert shared["graph MB"] == one["graph MB"] is not None
    assert absent["graph MB"] is None
    times = [(kept["ms_batch1"], kept["ms_batch8"]) for kept in precisions.gate(told)]
    assert times == [(4.0, 2.0)] * len(timed) + [(None, None)] * 2


def test_resize_writes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "FRAMES", [(30, 40)])
    monkeypatch.setattr(resize, "SIDES", [8])
    monkeypatch.setattr(resize, "ROUNDS", 2)
    assert resize.main(["--results", str(tmp_path), "--name", "small"]) == 0
    rows = result(tmp_path, "resize-small")["rows"]
    assert {row["by"] for row in rows} >= {"Pillow", "fastad"}
    assert all(row["frame"] == "40x30" and row["p50_ms"] > 0 for row in rows)


def test_ops_writes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_cases, "BENCH", grid_cases.CASES[1:2])
    threads = torch.get_num_threads()
    options = ["--op", "grid_interpolate", "--rounds", "2", "--threads", "1"]
    try:
        assert ops.main([*options, "--results", str(tmp_path), "--name", "small"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = result(tmp_path, "ops-small")["rows"]
    assert {row["by"] for row in rows} >= {"eager", "fastad", "onnxruntime", "openvino"}
    assert all(row["p50_ms"] > 0 for row in rows)


def test_distance_to_the_limit_is_time_over_products_at_the_peak() -> None:
    row = {"precision": "fp32", "p50_ms": 30.0, "gflop": 2.0}
    # 2 GFLOP at 200 GFLOP/s take 10 ms
    assert models.times_limit(row, {"fp32": 200e9}) == pytest.approx(3.0)
    assert models.times_limit(row, {"int8": 200e9}) is None


def test_end_to_end_measures_stages_and_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "SIZE", (90, 160))
    options = ["--results", str(tmp_path), "--rounds", "2", "--frames", "20"]
    assert end_to_end.main([str(ENGINE), *options, "--precision", "fp32"]) == 0
    found = result(tmp_path, "end_to_end")
    rows = {row["input"]: row for row in found["rows"]}
    names = ["graph alone", "frame in memory", "the same, regions"]
    names += ["the same, regions, mask, map", "PNG file", "JPEG file"]
    names += ["H.264 video, decoded beside"]
    assert list(rows) == names
    for name in names[1:]:
        assert all(rows[name][stage] >= 0 for stage in end_to_end.STAGES)
    for name in names[1:6]:
        assert math.isfinite(rows[name]["rest"])
        assert math.isfinite(rows[name]["over graph"])
    assert [row["sources"] for row in found["streams"]] == [1, 4, 16]
    assert all(row["frames/s"] > 0 and row["age p50 ms"] >= 0 for row in found["streams"])


@pytest.mark.parametrize(("graph_ms", "allowed"), [(1.0, 0.3), (6.0, 0.3), (20.0, 1.0)])
def test_overhead_allowed_is_the_larger_of_share_and_constant(
    graph_ms: float, allowed: float
) -> None:
    assert end_to_end.allowed_ms(graph_ms) == pytest.approx(allowed)


@pytest.mark.parametrize("through", ["predict", "stream"])
def test_soak_counts_every_frame_and_samples_memory(through: str, tmp_path: Path) -> None:
    options = ["--frames", "60", "--every", "10", "--through", through]
    assert soak.main([*options, "--results", str(tmp_path)]) == 0
    found = result(tmp_path, "soak")
    assert [sample["frames"] for sample in found["samples"]] == list(range(10, 61, 10))
    assert all(sample["rss_bytes"] > 0 for sample in found["samples"])
    assert found["rows"][0]["frames"] == 60


def test_soak_refuses_too_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--frames", "3999"])
    assert "expected at least four samples" in capsys.readouterr().err


@pytest.mark.parametrize("name", engines.METHODS)
def test_methods_of_the_bench_are_recipes(name: str) -> None:
    recipe = load_recipe(name, engines.METHODS[name])
    assert recipe.train.epochs <= 8
