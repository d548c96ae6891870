"""Which plan a machine loads, how plans enter an engine file, and every refusal: no TensorRT."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fastad.export import to_tensorrt
from fastad.export.to_tensorrt import BuildSettings, build_plans

from fastad.engine import tensorrt as runtime_module
from fastad.engine.base import Outputs
from fastad.engine.container import MODEL, read_engine
from fastad.engine.plans import Machine, Plan, choose, plan_name, read_plans, why_no_plan
from fastad.errors import EngineError, InputError, UnsupportedError

HERE = Machine("NVIDIA H200", (9, 0), "11.4.0.106")
DIGESTS = {"model.onnx": "aa", "plans/a.plan": "bb"}
PLAN = Plan(
    member="plans/a.plan",
    graph="model.onnx",
    graph_sha256="aa",
    precision="fp32",
    gpu=HERE.gpu,
    capability=HERE.capability,
    tensorrt=HERE.tensorrt,
    hardware="exact",
    version_compatible=False,
    max_batch=8,
    plugins=(),
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"gpu": "NVIDIA A100", "capability": (8, 0)}, r"built for NVIDIA A100 \(8.0\), found NVI"),
        ({"gpu": "NVIDIA H100"}, r"built for NVIDIA H100 \(9.0\), found NVIDIA H200 \(9.0\)"),
        ({"gpu": "NVIDIA H100", "hardware": "same-capability"}, None),
        ({"capability": (8, 0), "hardware": "same-capability"}, "built for"),
        ({"gpu": "NVIDIA A100", "capability": (8, 0), "hardware": "ampere-plus"}, None),
        ({"tensorrt": "11.3.0.1"}, "built by TensorRT 11.3.0.1, this machine has 11.4.0.106"),
        ({"tensorrt": "11.3.0.1", "version_compatible": True}, None),
        ({"tensorrt": "11.5.0.1", "version_compatible": True}, "built by TensorRT 11.5"),
        ({"tensorrt": "10.13.0.1", "version_compatible": True}, "built by TensorRT 10.13"),
        ({"graph_sha256": "cc"}, "built from another model.onnx; build it again"),
        ({"member": "plans/lost.plan"}, "plans/lost.plan: built from another"),
    ],
)
def test_a_plan_that_does_not_fit_is_named_and_skipped(
    changes: dict[str, Any], reason: str | None
) -> None:
    plan = dataclasses.replace(PLAN, **changes)
    choice = choose((plan,), HERE, "fp32", DIGESTS)
    sentence = why_no_plan(choice, HERE, "fp32")
    if reason is None:
        assert (choice.plan, choice.skipped, sentence) == (plan, (), None)
    else:
        assert choice.plan is None and sentence is not None
        with pytest.raises(UnsupportedError, match=reason):
            raise UnsupportedError(sentence)
        assert "run `fastad build` on this machine (NVIDIA H200)" in sentence


def test_old_gpus_have_no_portable_plan() -> None:
    plan = dataclasses.replace(PLAN, hardware="ampere-plus")
    old = Machine("Tesla T4", (7, 5), HERE.tensorrt)
    assert (
        "for compute capability 8.0 and newer" in choose((plan,), old, "fp32", DIGESTS).skipped[0]
    )


def test_the_most_exact_plan_wins() -> None:
    wide = dataclasses.replace(PLAN, hardware="ampere-plus", member="plans/0.plan")
    old = dataclasses.replace(
        PLAN, version_compatible=True, tensorrt="11.0.0.0", member="plans/1.plan"
    )
    digests = DIGESTS | {"plans/0.plan": "0", "plans/1.plan": "1"}
    assert choose((wide, old, PLAN), HERE, "fp32", digests).plan is PLAN
    assert choose((old, wide), HERE, "fp32", digests).plan is wide


def test_other_precisions_are_no_substitute() -> None:
    choice = choose((PLAN,), HERE, "fp16", DIGESTS)
    sentence = why_no_plan(choice, HERE, "fp16")
    assert sentence is not None and "the engine holds no fp16 plan" in sentence


def test_names_are_members() -> None:
    machine = Machine("NVIDIA RTX 6000 Ada / Gen*", (8, 9), "10.13.3.9.post1")
    name = plan_name(machine, "int8")
    assert name == "plans/nvidia-rtx-6000-ada-gen-10.13.3.9.post1-int8.plan"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp8"}, InputError, "precision: expected auto, fp32, fp16, int8, got 'fp8'"),
        ({"precision": "bf16"}, UnsupportedError, "bf16 has no graph"),
        ({"settings": BuildSettings(max_batch=0)}, InputError, "max_batch: expected 1 to 1024"),
        ({"settings": BuildSettings(level=6)}, InputError, "level: expected 0 to 5, got 6"),
        (
            {"settings": BuildSettings(hardware="any")},  # type: ignore[arg-type]  # refused
            InputError,
            "hardware: expected exact, same-capability, ampere-plus, got 'any'",
        ),
        ({"device": "tpu"}, InputError, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cpu"}, UnsupportedError, "runs on NVIDIA GPUs only"),
    ],
)
def test_refuses_before_any_work(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_plans("never read.engine", **changes)


def test_a_machine_without_tensorrt_says_what_to_install(
    texture_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastad.engine import cuda

    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    expected = r"tensorrt: tensorrt not installed; pip install 'fastad\[tensorrt\]'"
    with pytest.raises(UnsupportedError, match=expected):
        build_plans(texture_engine)
    with read_engine(texture_engine) as file:
        reason = runtime_module.why_engine_unsupported(file, "fp32")
        with pytest.raises(UnsupportedError, match=expected):
            runtime_module.open_plan(file, "fp32")
    assert reason == runtime_module.why_unsupported("fp32")


class Agreeing:
    """Stands for a loaded plan: answers golden images with golden outputs, off by ``error``."""

    name = "tensorrt"
    error = 0.0
    golden: Any = None

    def __init__(self, data: bytes, plan: Plan, device: str) -> None:
        assert data == b"a plan" and device == "cuda"
        self.precision = plan.precision

    def run(self, images: Any) -> Outputs:
        known = [int(np.flatnonzero((self.golden.images == i).all((1, 2, 3)))[0]) for i in images]
        maps = self.golden.anomaly_map[known]
        return maps + np.float32(self.error * np.ptp(maps)), self.golden.raw_score[known]

    def close(self) -> None:
        pass


@pytest.fixture
def engine(texture_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, on a pretended H200 whose builder answers ``a plan``."""
    path = tmp_path / "a.engine"
    shutil.copy(texture_engine, path)
    with read_engine(path) as file:
        monkeypatch.setattr(Agreeing, "golden", file.golden())
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setattr(to_tensorrt, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(to_tensorrt, "this_machine", lambda _: HERE)
    monkeypatch.setattr(to_tensorrt, "register", lambda: NAMES)
    monkeypatch.setattr(to_tensorrt, "serialise", lambda *_, **__: b"a plan")
    monkeypatch.setattr(to_tensorrt, "TensorRTRuntime", Agreeing)
    return path


NAMES = {"NeighborAttention": "NeighborAttention_0", "GridInterpolate": "GridInterpolate_0"}


def test_a_built_plan_is_compared_and_kept(engine: Path) -> None:
    with read_engine(engine) as file:
        before = {name: file.member(name) for name in file.manifest.members}
    (plan,) = build_plans(engine)
    assert plan.parity is not None and plan.parity.runtime == "tensorrt"
    with read_engine(engine) as file:
        assert read_plans(file) == (plan,)
        assert file.member(plan.member) == b"a plan"
        assert {name: file.member(name) for name in before} == before
        choice = runtime_module.choose_plan(file, "fp32", HERE)
    assert choice.plan == plan
    assert build_plans(engine) == (plan,)  # building again replaces it


def test_the_engine_still_runs_elsewhere(engine: Path) -> None:
    import fastad

    build_plans(engine)
    with fastad.load(engine, runtime="openvino") as predictor:
        assert predictor.runtime.name == "openvino"


def test_a_plan_that_differs_is_not_kept(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreeing, "error", 0.01)
    before = engine.read_bytes()
    with pytest.raises(
        EngineError, match=r"parity: tensorrt fp32 differs from PyTorch by 1\.00e-02"
    ):
        build_plans(engine)
    assert engine.read_bytes() == before


def test_plans_of_other_machines_stay(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_plans(engine)
    monkeypatch.setattr(to_tensorrt, "this_machine", lambda _: Machine("A", (8, 0), "11.4.0.106"))
    build_plans(engine)
    with read_engine(engine) as file:
        assert {plan.gpu for plan in read_plans(file)} == {"A", "NVIDIA H200"}


def test_a_precision_without_graph_says_how_to_get_one(engine: Path) -> None:
    with pytest.raises(UnsupportedError, match="holds no int8 graph; export it with --precision"):
        build_plans(engine, precision="int8")
    assert [plan.precision for plan in build_plans(engine, precision="auto")] == ["fp32"]


def test_a_damaged_description_is_named(engine: Path) -> None:
    from fastad.engine.container import write_engine

    (plan,) = build_plans(engine)
    with read_engine(engine) as file:
        members = {name: file.member(name) for name in file.manifest.members}
        manifest = file.manifest
    record = plan.member.replace(".plan", ".json")
    write_engine(engine, manifest, members | {record: b"{}"})
    with (
        read_engine(engine) as file,
        pytest.raises(EngineError, match=r"plans/nvidia-h200-11\.4\.0\.106-fp32\.json: member"),
    ):
        read_plans(file)


def test_graphs_ask_for_plugins_by_field_order(engine: Path) -> None:
    import onnx
    from fastad.export.onnx_plugins import operators, to_plugins

    with read_engine(engine) as file:
        graph = file.member(MODEL)
    assert operators(graph) == ("GridInterpolate2D",)
    changed = onnx.load_from_string(to_plugins(graph, NAMES, 90))
    nodes = [node for node in changed.graph.node if node.domain == "fastad"]
    assert {node.op_type for node in nodes} == {"GridInterpolate_0"}
    names = ["per_image", "capability", "plugin_namespace", "plugin_version", "aot"]
    assert [a.name for a in nodes[0].attribute] == names
    assert not [f for f in changed.functions if f.domain == "fastad"]
    readers = [node.op_type for node in changed.graph.node if "image" in node.input]
    assert readers == ["Cast"]
