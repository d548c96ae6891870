"""Transposed convolutions of an exported graph become a convolution and a spread of its pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fastad.export.onnx_upsample import spread
from fastad.export.to_onnx import to_onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fastad.models.registry import build

C_IN, C_OUT, H, W = 3, 2, 4, 5


def model(
    side: int, *, bias: bool = True, groups: int = 1, is_constant: bool = True, **attributes: Any
) -> onnx.ModelProto:
    """One ConvTranspose of random weights between two ReLUs."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((C_IN * groups, C_OUT, side, side)).astype(np.float32)
    shift = rng.standard_normal(C_OUT * groups).astype(np.float32)
    names = ["x", "w", "b"][: 2 + bias]
    free = ["n", None, None, None]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, free)]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(shift, "b")]
    if not is_constant:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, list(weight.shape)))
    nodes = [
        helper.make_node("Relu", ["image"], ["x"]),
        helper.make_node("ConvTranspose", names, ["y"], "up", group=groups, **attributes),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, free)]
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, constants[bool(not is_constant) : 1 + bias]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def run(graph: onnx.ModelProto, groups: int = 1) -> NDArray[np.float32]:
    image = np.random.default_rng(1).standard_normal((2, C_IN * groups, H, W)).astype(np.float32)
    found: NDArray[np.float32] = ReferenceEvaluator(graph).run(None, {"image": image})[0]
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_result_is_the_same(side: int, bias: bool) -> None:
    before = model(side, bias=bias, strides=[side, side])
    after = onnx.ModelProto()
    after.CopyFrom(before)
    spread(after)
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == ["Relu", "Conv", "DepthToSpace", "Relu"]
    expected = run(before)
    assert expected.shape == (2, C_OUT, H * side, W * side)
    np.testing.assert_allclose(run(after), expected, rtol=1e-6, atol=1e-6)


def test_stated_defaults_are_no_obstacle() -> None:
    stated = {"pads": [0, 0, 0, 0], "dilations": [1, 1], "output_padding": [0, 0]}
    graph = model(2, strides=[2, 2], auto_pad="NOTSET", **stated)
    expected = run(graph)
    spread(graph)
    assert "ConvTranspose" not in {node.op_type for node in graph.graph.node}
    np.testing.assert_allclose(run(graph), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"side": 3},  # blocks overlap
        {"side": 1},  # gaps between them
        {"strides": [2, 1]},
        {"pads": [1, 1, 1, 1]},
        {"dilations": [2, 2]},
        {"output_padding": [1, 1]},
        {"auto_pad": "SAME_UPPER"},
        {"output_shape": [H * 2, W * 2]},
        {"groups": 2},
        {"is_constant": False},
    ],
    ids=str,
)
def test_what_is_no_spread_stays_as_it_is(change: dict[str, Any]) -> None:
    graph = model(**({"side": 2, "strides": [2, 2]} | change))
    before = graph.SerializeToString()
    spread(graph)
    assert graph.SerializeToString() == before


def test_a_graph_of_reverse_distillation_has_no_transposed_convolution() -> None:
    method = build(
        "rd4ad",
        {"size": [64, 64], "backbone": {"name": "resnet18", "taps": [1, 2, 3]}},
        weights="random",
    )
    graph = onnx.load_from_string(to_onnx(method)).graph
    kinds = [node.op_type for node in graph.node]
    assert "ConvTranspose" not in kinds
    assert kinds.count("DepthToSpace") == 6
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read  # nor its weights
