"""The operators in ONNX: a node and a function that mean the same in every runtime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from fastad.export import to_onnx
from fastad.export.to_onnx import OPSET, add_functions
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, numpy_helper
from test_methods import TINY
from torch import Tensor, nn

from fastad.engine.openvino import OpenVINORuntime
from fastad.engine.openvino_ops import read_model, translations
from fastad.models.deployed import DeployedGraph
from fastad.models.registry import Method, build
from fastad.ops.case import Case
from fastad.ops.grid_interpolate import cases as interpolate_cases
from fastad.ops.grid_interpolate import grid_interpolate
from fastad.ops.grid_interpolate.op import MAX_HAT_NODES
from fastad.ops.neighbor_attention import cases as attention_cases
from fastad.ops.neighbor_attention import neighbor_attention

ELEMENTS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
RUNTIMES = ["onnxruntime", "openvino"]
# Beyond the shared cases: the form that reads corners, in every combination.
GATHERS = [
    interpolate_cases._case("gather 1-D", (300,), 5, (20,)),
    interpolate_cases._case("gather 2-D", (20, 17), 6, (2, 5, 4)),
    interpolate_cases._case("gather 4-D", (5, 4, 6, 3), 8, (3, 7)),
    interpolate_cases._case("gather, table per image", (18, 15), 4, (3, 6, 2), per_image=True),
    interpolate_cases._case("gather, point per image", (18, 15), 4, (3,), per_image=True),
    interpolate_cases._case("point per image", (4, 3), 24, (3,), per_image=True),
    interpolate_cases._case("grid per image", (4, 3), 24, (2, 3, 5), per_image=True),
]
# The shared float32 bound is for positions of up to 12 node units, rounded to 24 bits of that; only
# an axis of more than 256 nodes makes the 1-D form read corners.
LONG_AXIS = {("gather 1-D", torch.float32): 300 / 12}
ATTENTION = [c for c in attention_cases.CASES if c.name not in ("large", "head 64", "head 128")]
INTERPOLATE = [c for c in interpolate_cases.CASES if c.name != "grad global"] + GATHERS


def node_graph(
    name: str,
    attributes: dict[str, Any],
    inputs: dict[str, Tensor],
    static: Sequence[str],
    out: Sequence[int],
) -> bytes:
    """A graph of one node; the first axis of inputs is dynamic, ``static`` ones are constants."""
    element = ELEMENTS[next(iter(inputs.values())).dtype]
    node = helper.make_node(
        name, list(inputs), ["out"], domain="fastad", plugin_namespace="fastad", **attributes
    )
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, element, ["B", *t.shape[1:]])
            for n, t in inputs.items()
            if n not in static
        ],
        [helper.make_tensor_value_info("out", element, ["B", *out[1:]])],
        [numpy_helper.from_array(inputs[n].numpy(), n) for n in static],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("fastad", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    add_functions(model)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def run(runtime: str, graph: bytes, feed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    if runtime == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
        return np.asarray(session.run(None, feed)[0])
    core = ov.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(read_model(core, graph), "CPU", config)
    return np.asarray(model(feed)[0])


def attention_graph(arguments: dict[str, Any]) -> tuple[bytes, dict[str, NDArray[Any]]]:
    tensors = {n: t.contiguous() for n, t in arguments.items() if isinstance(t, Tensor)}
    (height, width), (window_height, window_width) = arguments["grid"], arguments["window"]
    attributes = {"grid_height": height, "grid_width": width}
    attributes |= {"window_height": window_height, "window_width": window_width}
    attributes |= {"scale": float(tensors["q"].shape[-1]) ** -0.5}
    static = [n for n in tensors if n.endswith("position")]
    name = "NeighborAttention" + "".join(n[0].upper() for n in static)
    graph = node_graph(name, attributes, tensors, static, tensors["q"].shape)
    return graph, {n: tensors[n].numpy() for n in "qkv"}


def interpolate_graph(arguments: dict[str, Any]) -> tuple[bytes, dict[str, NDArray[Any]]]:
    table, coords, per_image = (arguments[n] for n in ("table", "coords", "per_image"))
    many = table.shape[per_image:-1].numel() > MAX_HAT_NODES
    name = f"GridInterpolate{coords.shape[-1]}D" + "PerImage" * per_image + "Gather" * many
    static = [] if per_image else ["table"]
    tensors = {"table": table, "coords": coords}
    graph = node_graph(name, {}, tensors, static, (*coords.shape[:-1], table.shape[-1]))
    return graph, {n: t.numpy() for n, t in tensors.items() if n not in static}


def check(op: Any, make_graph: Any, case: Case, dtype: torch.dtype, runtime: str) -> None:
    arguments = case.make(dtype)
    for key in ("tiles", "tile", "form", "channels_first"):
        arguments.pop(key, None)
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in arguments.items()}
    graph, feed = make_graph(arguments)
    found = run(runtime, graph, feed)
    rtol, atol = op.TOLERANCE[dtype]
    atol *= LONG_AXIS.get((case.name, dtype), 1.0)
    expected = op.judge(**wide).numpy()
    assert found.dtype == (np.float32 if dtype == torch.float32 else np.float16)
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", list(ELEMENTS), ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: c.name)
def test_attention_is_its_reference(case: Case, dtype: torch.dtype, runtime: str) -> None:
    check(attention_cases, attention_graph, case, dtype, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", list(ELEMENTS), ids=str)
@pytest.mark.parametrize("case", INTERPOLATE, ids=lambda c: c.name)
def test_interpolation_is_its_reference(case: Case, dtype: torch.dtype, runtime: str) -> None:
    check(interpolate_cases, interpolate_graph, case, dtype, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_function_serves_windows_of_every_kind(runtime: str) -> None:
    """One form, three nodes: with blind rows, with none, without a window."""
    q = torch.randn(1, 1, 16, 8, generator=torch.Generator().manual_seed(0))
    windows = [(7, 7), (3, 3), (0, 0)]
    grid = {"grid_height": 4, "grid_width": 4, "scale": 8**-0.5, "plugin_namespace": "fastad"}
    nodes = [
        helper.make_node(
            "NeighborAttention",
            ["q"] * 3,
            [f"out_{i}"],
            domain="fastad",
            **grid,
            window_height=window[0],
            window_width=window[1],
        )
        for i, window in enumerate(windows)
    ]
    nodes.append(helper.make_node("Concat", [n.output[0] for n in nodes], ["out"], axis=0))
    shape = ["B", *q.shape[1:]]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("q", "out")]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("fastad", 1)]
    graph = helper.make_graph(nodes, "three", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    add_functions(model)
    assert [f.name for f in model.functions] == ["NeighborAttention"]
    found = run(runtime, model.SerializeToString(), {"q": q.numpy()})
    expected = [neighbor_attention(q, q, q, grid=(4, 4), window=window) for window in windows]
    assert not expected[0].any()  # every query is blind
    np.testing.assert_allclose(found, torch.cat(expected), rtol=0, atol=4e-6)


@pytest.fixture(scope="module", params=["uniad", "grad"])
def exported(request: pytest.FixtureRequest) -> tuple[Method, onnx.ModelProto]:
    torch.manual_seed(0)
    config = TINY.get(request.param, {}) | (
        {"feature_scale": 1.0} if request.param == "grad" else {}
    )
    built = build(request.param, config, weights="random").eval()
    return built, onnx.load_from_string(to_onnx(built))


def fastad_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "fastad"]


def test_operators_are_nodes_with_functions(exported: tuple[Method, onnx.ModelProto]) -> None:
    built, model = exported
    expected = {
        "uniad": ["NeighborAttentionK", "NeighborAttentionQK", "NeighborAttentionQK"],
        "grad": ["GridInterpolate2D"] * 2,
    }[built.name]
    nodes = fastad_nodes(model)
    assert sorted(node.op_type for node in nodes) == expected
    assert sorted({(f.domain, f.name) for f in model.functions}) == sorted(
        {("fastad", name) for name in expected}
    )
    assert {o.domain: o.version for o in model.opset_import} == {"": OPSET, "fastad": 1}
    for function in model.functions:
        assert {o.domain: o.version for o in function.opset_import} == {"": OPSET}
        assert all(node.domain == "" for node in function.node)
    onnx.checker.check_model(model, full_check=True)


def test_attributes_are_numbers_and_the_namespace(
    exported: tuple[Method, onnx.ModelProto],
) -> None:
    for node in fastad_nodes(exported[1]):
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert found.pop("plugin_namespace") == b"fastad"
        assert all(isinstance(value, int | float) for value in found.values())
        if node.op_type.startswith("NeighborAttention"):
            assert (found["grid_height"], found["window_height"]) == (10, 7)


def test_positions_and_tables_are_constants(exported: tuple[Method, onnx.ModelProto]) -> None:
    model = exported[1]
    constants = {initializer.name for initializer in model.graph.initializer}
    for node in fastad_nodes(model):
        fixed = node.input[3:] if node.op_type.startswith("N") else node.input[:1]
        assert len(fixed) >= 1
        assert constants.issuperset(fixed)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_stays_dynamic(
    exported: tuple[Method, onnx.ModelProto], runtime: str, batch: int
) -> None:
    built, model = exported
    size = (batch, *built.input.size, 3)
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    found = run(runtime, model.SerializeToString(), {"image": images})
    with torch.no_grad():
        expected = DeployedGraph(built)(torch.from_numpy(images))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.ptp(expected))


def test_graphs_of_standard_operators_load_as_before(
    exported: tuple[Method, onnx.ModelProto],
) -> None:
    """What engines of earlier versions hold: no node of fastad, no function."""
    built, model = exported
    old = inliner.inline_local_functions(model)
    assert not fastad_nodes(old)
    assert not old.functions
    images = np.random.default_rng(0).integers(0, 256, (2, *built.input.size, 3), np.uint8)
    maps = [
        OpenVINORuntime(m.SerializeToString(), "fp32", 1, cache=False).run(images)[0]
        for m in (old, model)
    ]
    np.testing.assert_allclose(maps[0], maps[1], rtol=0, atol=1e-4 * np.ptp(maps[1]))


def test_openvino_needs_neither_functions_nor_the_onnx_package(
    exported: tuple[Method, onnx.ModelProto], tmp_path: Path
) -> None:
    built, model = exported
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    (tmp_path / "a.onnx").write_bytes(bare.SerializeToString())
    script = (
        "import sys; sys.modules['onnx'] = sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from fastad.engine.openvino import OpenVINORuntime\n"
        "graph = open(sys.argv[1], 'rb').read()\n"
        "size = tuple(map(int, sys.argv[2:4]))\n"
        "runtime = OpenVINORuntime(graph, 'fp32', 1, cache=False)\n"
        "print(runtime.run(np.zeros((1, *size, 3), np.uint8))[0].shape)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "a.onnx", *map(str, built.input.size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str((1, *built.input.size))


def test_openvino_moves_no_pixels_before_the_first_layer(
    exported: tuple[Method, onnx.ModelProto],
) -> None:
    model = exported[1]
    read = read_model(ov.Core(), model.SerializeToString())
    read.reshape([1, *exported[0].input.size, 3])
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(read, "CPU", hint)
    kinds = [op.get_rt_info()["layerType"] for op in compiled.get_runtime_model().get_ordered_ops()]
    before = kinds[: kinds.index("Convolution")]
    assert before and "Transpose" not in before


def test_names_are_no_standard_operators() -> None:
    """NVIDIA's parser ignores domains, and overloads run the first body."""
    ours = [name.lower() for name in translations()]
    assert len(set(ours)) == len(ours)
    assert not {schema.name.lower() for schema in onnx.defs.get_all_schemas()} & set(ours)


class Everything(nn.Module):
    """Each form once: what export emits, OpenVINO has to know."""

    def forward(self, q: Tensor, position: Tensor, table: Tensor, coords: Tensor) -> list[Tensor]:
        grid, window = (3, 4), (3, 3)
        found = [
            neighbor_attention(q, q, q, grid=grid, window=window, q_position=a, k_position=b)
            for a in (None, position)
            for b in (None, position)
        ]
        found.append(grid_interpolate(table[0], coords))
        found.append(grid_interpolate(table, coords, per_image=True))
        large = table.repeat(1, 5, 5, 1)  # 300 nodes
        found.append(grid_interpolate(large[0], coords))
        found.append(grid_interpolate(large, coords, per_image=True))
        return found


@pytest.fixture(scope="module")
def everything() -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 2, 12, 8), "position": (2, 12, 8), "table": (2, 4, 3, 5)}
    shapes["coords"] = (2, 6, 2)
    tensors = {n: torch.rand(*s, generator=random) for n, s in shapes.items()}
    program = torch.onnx.export(
        Everything().eval(), tuple(tensors.values()), dynamo=True, opset_version=OPSET,
        input_names=list(tensors), verbose=False,
    )  # fmt: skip
    assert program is not None
    model = program.model_proto  # a new one with every access
    add_functions(model)
    return model, tensors


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_form_is_emitted_and_known(
    everything: tuple[onnx.ModelProto, dict[str, Tensor]], runtime: str
) -> None:
    model, tensors = everything
    names = {node.op_type for node in fastad_nodes(model)}
    two_d = {f"GridInterpolate2D{form}" for form in ("", "Gather", "PerImage", "PerImageGather")}
    assert names == {f"NeighborAttention{form}" for form in ("", "Q", "K", "QK")} | two_d
    assert names <= set(translations())
    feed = {n: t.numpy() for n, t in tensors.items()}
    graph = model.SerializeToString()
    if runtime == "onnxruntime":
        found = onnxruntime.InferenceSession(graph).run(None, feed)
    else:
        core = ov.Core()
        compiled = core.compile_model(
            read_model(core, graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        found = list(compiled(feed).values())
    for got, want in zip(found, Everything()(*tensors.values()), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
