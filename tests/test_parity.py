"""Parity: engines compute what PyTorch computes, and a file that does not is caught."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from textures import Textures

from fastad.engine import onnxruntime
from fastad.engine.base import Outputs, Precision
from fastad.engine.container import Golden, read_engine, write_engine
from fastad.engine.opening import GPU_RUNTIMES
from fastad.engine.parity import MAP_LIMIT, check, compare, verify
from fastad.engine.select import RUNTIMES, RuntimeName, open_runtime, why_unsupported
from fastad.errors import EngineError
from fastad.evaluation import open_model
from fastad.predictor import load
from fastad.spec import ParityReport

AVAILABLE = [name for name in RUNTIMES if why_unsupported(name, "fp32") is None]


@pytest.mark.parametrize("name", AVAILABLE)
def test_exported_engines_carry_a_report_within_the_limit(
    texture_engine: Path, name: RuntimeName
) -> None:
    with read_engine(texture_engine) as engine:
        variant = engine.manifest.variants[0]
    (report,) = [r for r in variant.parity if r.runtime == name]
    assert report.precision == "fp32"
    assert report.images >= 8
    assert 0 <= report.map_mean <= report.map_max <= MAP_LIMIT
    assert report.score_max <= MAP_LIMIT
    assert report.decision_flips == 0


@pytest.mark.parametrize("name", AVAILABLE)
def test_engine_and_checkpoint_agree_on_images_the_export_never_saw(
    texture_engine: Path, texture_run: Path, textures: Textures, name: RuntimeName
) -> None:
    paths = textures.images()
    with open_model(texture_run) as trained, load(texture_engine, runtime=name) as shipped:
        expected, found = list(trained.iterate(paths)), list(shipped.iterate(paths))
    span = max(float(p.model_map.max()) for p in expected) - min(
        float(p.model_map.min()) for p in expected
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours.model_map - theirs.model_map).max() <= MAP_LIMIT * span
        assert abs(ours.raw_score - theirs.raw_score) <= MAP_LIMIT * span
        assert ours.pred_label == theirs.pred_label


def test_verify_reruns_the_golden_images(texture_engine: Path) -> None:
    reports, absent = verify(texture_engine)
    on_cpu = [report.runtime for report in reports][-len(AVAILABLE) :]
    assert on_cpu == AVAILABLE
    assert len(reports) + len(absent) == len(RUNTIMES) + len(GPU_RUNTIMES)
    with read_engine(texture_engine) as engine:
        assert {report.images for report in reports} == {len(engine.golden().images)}


def test_verify_says_which_runtime_is_not_here(
    texture_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "find_spec", lambda _: None)
    reports, absent = verify(texture_engine)
    assert reports[-1].runtime == "openvino"
    assert absent[-1] == "onnxruntime: not installed; pip install 'fastad[onnxruntime]'"


def rewritten(source: Path, target: Path, **changed: Any) -> Path:
    """A well-formed engine whose golden outputs are not what its graph computes."""
    with read_engine(source) as engine:
        manifest, golden = engine.manifest, engine.golden()
        members = {name: engine.member(name) for name in manifest.members}
    arrays = Golden(
        golden.images,
        changed.get("anomaly_map", golden.anomaly_map),
        changed.get("raw_score", golden.raw_score),
    )
    return write_engine(target, manifest, members | arrays.members())


@pytest.mark.parametrize("what", ["anomaly_map", "raw_score"])
def test_verify_catches_changed_golden_outputs(
    texture_engine: Path, tmp_path: Path, what: str
) -> None:
    with read_engine(texture_engine) as engine:
        golden = engine.golden()
    values: NDArray[np.float32] = getattr(golden, what).copy()
    values.flat[0] += 0.01 * np.ptp(golden.anomaly_map)
    changed = rewritten(texture_engine, tmp_path / "changed.engine", **{what: values})
    load(changed).close()  # whole as a file: only running it tells
    with pytest.raises(EngineError, match=r"parity: openvino fp32 differs .* allowed is 0\.001"):
        verify(changed)
    assert verify(rewritten(texture_engine, tmp_path / "same.engine"))[0]


def test_verify_catches_a_changed_byte(texture_engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.engine"
    shutil.copy(texture_engine, copy)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with pytest.raises(EngineError, match=r"copy\.engine"):
        verify(copy)


class Shifted:
    """A runtime that adds one value to single images and another to batches."""

    name = "shifted"
    precision: Precision = "fp32"

    def __init__(self, single: float, batch: float, score: float = 0.0) -> None:
        self.single, self.batch, self.score = single, batch, score

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        maps, scores = reference(images)
        shift = np.float32(self.single if len(images) == 1 else self.batch)
        return maps + shift, scores + np.float32(self.score)

    def close(self) -> None:
        pass


def reference(images: NDArray[np.uint8]) -> Outputs:
    maps = images[..., 0].astype(np.float32) / 51  # range 0..5
    return maps, maps.max(axis=(1, 2))


IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
IMAGES[1] = 102
IMAGES[2] = 255


@pytest.mark.parametrize(("single", "batch"), [(0.25, 0.0), (0.0, -0.25)])
def test_the_worse_of_single_and_batch_counts(single: float, batch: float) -> None:
    report = compare(Shifted(single, batch), IMAGES, reference(IMAGES), threshold=None)
    assert report.map_max == pytest.approx(0.25 / 5)
    assert report.map_mean == pytest.approx(0.25 / 5)
    assert (report.score_max, report.decision_flips, report.images) == (0.0, 0, 3)


def test_flips_are_counted_at_the_threshold() -> None:
    moved = Shifted(0.0, 0.0, score=0.5)
    assert compare(moved, IMAGES, reference(IMAGES), threshold=2.25).decision_flips == 1
    assert compare(moved, IMAGES, reference(IMAGES), threshold=3.25).decision_flips == 0


@pytest.mark.parametrize("field", ["map_max", "score_max"])
@pytest.mark.parametrize("value", [MAP_LIMIT * 1.01, float("nan"), float("inf")])
def test_check_refuses(field: str, value: float) -> None:
    fine = ParityReport("openvino", "fp32", 4, MAP_LIMIT, 0.0, MAP_LIMIT, 0)
    check(fine)
    with pytest.raises(EngineError, match="parity: openvino fp32 differs from PyTorch by"):
        check(replace(fine, **{field: value}))


def test_a_runtime_that_returns_nan_is_refused() -> None:
    report = compare(Shifted(float("nan"), 0.0), IMAGES, reference(IMAGES), threshold=None)
    with pytest.raises(EngineError, match="differs from PyTorch by nan"):
        check(report)


def test_a_graph_of_another_model_is_refused_by_its_golden_images(
    texture_engine: Path, tmp_path: Path
) -> None:
    """Weights swapped under a correct manifest: hashes agree, answers do not."""
    import onnx

    with read_engine(texture_engine) as engine:
        manifest = engine.manifest
        members = {name: engine.member(name) for name in manifest.members}
    model = onnx.load_from_string(members["model.onnx"])
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights = np.frombuffer(largest.raw_data, np.float32)
    largest.raw_data = (weights * np.float32(1.1)).tobytes()
    members["model.onnx"] = model.SerializeToString()
    changed = write_engine(tmp_path / "other.engine", manifest, members)
    open_runtime(members["model.onnx"], "openvino", "fp32", "cpu").close()
    with pytest.raises(EngineError, match="differs from PyTorch"):
        verify(changed)
