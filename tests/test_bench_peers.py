"""`bench.peers`: the protocol, the turns and the table, with workers that only pretend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from bench.peers import __main__ as bench_peers
from bench.peers import environments, peer_fastad, peer_onnx, peer_torch
from bench.peers.environments import Environment, prepare, versions
from bench.peers.process import Worker, WorkerError
from bench.peers.rows import BASELINE, OURS, Row, rows, selected
from bench.peers.turns import Measured, score_difference, summary, take_turns
from bench.peers.worker import Setup
from fastad.engine.container import read_engine
from fastad.errors import EngineError, InputError
from fastad.models.registry import Method
from fastad.training.checkpoint import load_checkpoint

PYTHON = Path(sys.executable)

# A peer whose score is the first value of the image; it prints, as real packages do.
FAKE = """
import os, sys
import numpy as np
from bench.peers.worker import Peer

def open_peer(setup):
    print("a banner on the output that carries the answers")
    if setup.options.get("refuses"):
        raise RuntimeError("no weights here")
    if setup.options.get("crashes"):
        print("a native library says goodbye", file=sys.stderr)
        os._exit(3)

    def predict(frame):
        print("predicting")
        if setup.options.get("fails at") == int(frame.flat[0]):
            raise ValueError("this image")
        return np.zeros((2, 2), np.float32), float(frame.flat[0])

    threads = [os.environ["OMP_NUM_THREADS"], setup.threads]
    weights = setup.options.get("weights", "run")
    return Peer(predict, {"network": "fake", "size": [2, 2], "weights": weights, "t": threads})
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that a worker can import."""
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_peer"


def setup_of(folder: Path, **options: object) -> Setup:
    images = np.arange(3, dtype=np.uint8).repeat(12).reshape(3, 2, 2, 3)
    np.save(folder / "golden.npy", images)
    return Setup({"golden": str(folder / "golden.npy")}, 1, options)


def test_a_worker_answers_over_whatever_its_packages_print(fake: str, tmp_path: Path) -> None:
    worker = Worker(PYTHON, fake, setup_of(tmp_path), tmp_path)
    try:
        assert worker.about["t"] == ["1", 1]
        assert worker.about["load_s"] >= 0
        answer = worker.run(4, "golden", start=2)
        assert answer["scores"] == [2.0, 0.0, 1.0, 2.0]
        assert len(answer["times_ms"]) == 4 and min(answer["times_ms"]) > 0
    finally:
        worker.close()
        worker.close()
    assert "a banner" in (tmp_path / "stderr.log").read_text()


def test_a_peer_that_refuses_says_why(fake: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="RuntimeError: no weights here"):
        Worker(PYTHON, fake, setup_of(tmp_path, refuses=True), tmp_path)


def test_a_process_that_dies_leaves_its_last_words(fake: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="ended with code 3: a native library says goodbye"):
        Worker(PYTHON, fake, setup_of(tmp_path, crashes=True), tmp_path)


def test_a_module_that_is_not_there_is_a_reason(fake: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="No module named 'absent_peer'"):
        Worker(PYTHON, "absent_peer", setup_of(tmp_path), tmp_path)


def test_a_failure_while_running_is_a_reason(fake: str, tmp_path: Path) -> None:
    options = {"fails at": 1}
    worker = Worker(PYTHON, fake, setup_of(tmp_path, **options), tmp_path)
    try:
        with pytest.raises(WorkerError, match="ValueError: this image"):
            worker.run(2, "golden", start=0)
        with pytest.raises(WorkerError, match="ended"):
            worker.run(1, "golden", start=0)
    finally:
        worker.close()


class Clock:
    """A worker without a process: each image takes ``ms``; the n-th call fails if it says so."""

    def __init__(self, name: str, ms: float, calls: list[str], fails_at: int = -1) -> None:
        self.name, self.ms, self.calls, self.fails_at = name, ms, calls, fails_at

    def run(self, count: int, images: str, start: int) -> dict[str, list[float]]:
        if sum(call.startswith(self.name) for call in self.calls) == self.fails_at:
            raise WorkerError("it fell over")
        self.calls.append(f"{self.name} {images} {start}")
        return {"times_ms": [self.ms] * count, "scores": [float(start + i) for i in range(count)]}


def test_workers_take_turns_on_the_same_images() -> None:
    calls: list[str] = []
    workers = {"a": Clock("a", 2.0, calls), "b": Clock("b", 1.0, calls)}
    found = take_turns(workers, {"golden": 3}, rounds=3, count=2, budget_s=1e9)
    assert calls == [
        *("a golden 0", "b golden 0"),
        *("a golden 2", "b golden 2"),
        *("a golden 1", "b golden 1"),
    ]
    assert found["a"].times_ms == {"golden": [[2.0, 2.0]] * 3}
    assert found["b"].scores == {"golden": [0.0, 1.0, 2.0]}


def test_a_spent_budget_ends_after_three_rounds() -> None:
    calls: list[str] = []
    take_turns({"a": Clock("a", 1.0, calls)}, {"golden": 1}, rounds=9, count=1, budget_s=0.0)
    assert len(calls) == 3


def test_a_worker_that_fails_is_left_out_and_the_others_go_on() -> None:
    calls: list[str] = []
    workers = {"a": Clock("a", 1.0, calls), "b": Clock("b", 1.0, calls, fails_at=1)}
    found = take_turns(workers, {"golden": 1}, rounds=3, count=1, budget_s=1e9)
    assert [call[0] for call in calls] == ["a", "b", "a", "a"]
    assert found["b"] == Measured(reason="it fell over")
    assert len(found["a"].times_ms["golden"]) == 3


def test_ratios_are_formed_within_a_round() -> None:
    # The machine is ten times as slow in the last round, for both.
    baseline, own = [[4.0, 4.0], [6.0, 6.0], [40.0, 40.0]], [[2.0, 2.0], [2.0, 2.0], [20.0, 20.0]]
    found = summary(own, baseline, [[1.0], [1.0], [10.0]])
    expected = {"p50_ms": 2.0, "p90_ms": 20.0, "runs": 6, "ratio": 2.0, "ours_ratio": 2.0}
    assert found == expected
    assert summary(own, None, None) == expected | {"ratio": None, "ours_ratio": None}


def test_score_differences_are_relative_to_the_largest_score() -> None:
    assert score_difference([1.0, 3.5], [1.0, 4.0]) == 0.125
    assert score_difference([], []) is None


def test_all_rows_of_an_engine_include_ours_that_are_slower(
    texture_run: Path, texture_engine: Path
) -> None:
    found = {row.name: row for row in rows(texture_run, texture_engine)}
    assert {BASELINE, "pytorch-compile", "plain-onnxruntime", "plain-openvino-default"} <= set(
        found
    )
    assert {OURS, "fastad-openvino-fp32", "fastad-onnxruntime-fp32"} <= set(found)
    with read_engine(texture_engine) as engine:
        judged = [(report, v) for v in engine.manifest.variants[1:] for report in v.gate]
    for report, variant in judged:
        passed = not report.refused and report.runtime in variant.runtimes
        assert (f"fastad-{report.runtime}-{report.precision}" in found) == passed
    assert {name for name, row in found.items() if row.environment} == {
        *("anomalib-rd-torch", "anomalib-rd-openvino"),
        *("anomalib-efficientad-torch", "anomalib-efficientad-openvino"),
    }


def test_only_keeps_what_rows_are_compared_with() -> None:
    available = [
        Row(name, "m") for name in (BASELINE, "plain-onnxruntime", "anomalib-rd-torch", OURS)
    ]
    assert selected(available, []) == available
    names = [row.name for row in selected(available, ["anomalib-*"])]
    assert names == [BASELINE, "anomalib-rd-torch", OURS]
    with pytest.raises(InputError, match=r"--only: expected one of pytorch-eager, .*'rd'"):
        selected(available, ["rd"])


def test_rows_refuse_what_is_no_engine(texture_run: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no such file"):
        rows(texture_run, tmp_path / "absent.engine")


def test_an_environment_without_room_names_the_way_out(tmp_path: Path) -> None:
    large = Environment("large", "absent", ("absent",), (), free_gb=1e9)
    with pytest.raises(WorkerError, match=r"large needs 1000000000 GB .* --environments"):
        prepare(large, tmp_path / "peers")
    assert not (tmp_path / "peers" / "large").exists()


def test_an_environment_without_network_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(place: Path, **_: object) -> None:
        python = place / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\necho ERROR: nothing found for $5 >&2\necho bye >&2\nexit 1\n")
        python.chmod(0o755)

    monkeypatch.setattr(environments.venv, "create", pretend)
    absent = Environment("absent", "not-a-package", ("not-a-package",), (), free_gb=0.0)
    reason = "pip install not-a-package failed: ERROR: nothing found for not-a-package$"
    with pytest.raises(WorkerError, match=reason):
        prepare(absent, tmp_path / "peers")


def test_a_complete_environment_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "own" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    monkeypatch.setattr(environments, "versions", lambda *_: {"package": "1.0"})
    own = Environment("own", "package", ("package",), (), free_gb=1e9)
    assert prepare(own, tmp_path) == python


def test_versions_leave_out_what_is_not_there(tmp_path: Path) -> None:
    found = versions(PYTHON, ("numpy", "not-a-package"))
    assert found == {"numpy": np.__version__}
    assert versions(tmp_path / "python", ("numpy",)) == {}


def golden_of(engine: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with read_engine(engine) as opened:
        golden = opened.golden()
    return golden.images, golden.anomaly_map, golden.raw_score


def test_our_row_and_eager_give_the_same_verdict(texture_run: Path, texture_engine: Path) -> None:
    images, maps, scores = golden_of(texture_engine)
    asked = {"engine": str(texture_engine), "runtime": "auto", "precision": "fp32"}
    ours = peer_fastad.open_peer(Setup({}, 1, asked))
    eager = peer_torch.open_peer(Setup({}, 1, {"run": str(texture_run), "compile": False}))
    span = float(np.ptp(maps))
    for peer in (ours, eager):
        anomaly_map, score = peer.predict(images[0])
        # 1e-3 of the range is what an export allows between runtimes.
        np.testing.assert_allclose(anomaly_map, maps[0], rtol=0, atol=1e-3 * span)
        assert abs(score - scores[0]) <= 1e-3 * span
        assert peer.about["precision"] == "fp32" and peer.about["weights"] == "run"


@pytest.fixture(scope="module")
def plain(texture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method]:
    """A plain export, and the model that it came from."""
    method = load_checkpoint(texture_run).method.eval()
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    peer_onnx.export(method, path)
    return path, method


def test_the_plain_export_needs_nothing_of_fastad(plain: tuple[Path, Method]) -> None:
    model = onnx.load(plain[0])
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", ""), ("openvino", "f32")])
def test_the_plain_export_gives_the_same_verdict(
    runtime: str, precision: str, plain: tuple[Path, Method], texture_engine: Path
) -> None:
    images, maps, scores = golden_of(texture_engine)
    setup = Setup({}, 1, {"runtime": runtime, "precision": precision})
    peer = peer_onnx.loaded(*plain, setup)
    anomaly_map, score = peer.predict(images[0])
    span = float(np.ptp(maps))
    np.testing.assert_allclose(anomaly_map, maps[0], rtol=0, atol=1e-3 * span)
    assert abs(score - scores[0]) <= 1e-3 * span
    assert peer.about["precision"] == "fp32"


def test_the_bench_goes_on_without_a_row_and_writes_why(
    fake: str,
    texture_run: Path,
    texture_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = Environment("absent", "not-a-package", ("not-a-package",), (), free_gb=1e9)
    pretended = [
        Row(BASELINE, fake),
        Row("refuses", fake, {"refuses": True}),
        Row("far away", fake, environment=absent),
        Row("random", fake, {"weights": "random"}),
        Row(OURS, fake),
    ]
    monkeypatch.setattr(bench_peers, "rows", lambda *_: pretended)
    arguments = [texture_run, texture_engine, "--environments", tmp_path / "peers"]
    arguments += ["--results", tmp_path / "results", "--name", "test", "--rounds", 2]
    assert bench_peers.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "refuses: RuntimeError: no weights here" in printed
    assert "far away: " in printed and "GB of disk" in printed
    (path,) = (tmp_path / "results").rglob("peers-test--*.json")
    document = json.loads(path.read_text())
    by_name = {row["row"]: row for row in document["rows"]}
    assert list(by_name) == [row.name for row in pretended]
    assert by_name["refuses"] == {
        "row": "refuses",
        "reason": "RuntimeError: no weights here",
    }
    assert by_name[BASELINE]["frame"]["ratio"] == by_name[OURS]["frame"]["ours_ratio"] == 1.0
    assert by_name[BASELINE]["score_difference"] == 0.0
    assert by_name["random"]["golden"]["runs"] == 2 * bench_peers.COUNT
    assert "score_difference" not in by_name["random"]


def test_a_wrong_row_name_stops_before_any_work(
    texture_run: Path, texture_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_peers.main([str(texture_run), str(texture_engine), "--only", "tensorflow"]) == 2
    assert "got 'tensorflow'" in capsys.readouterr().err
