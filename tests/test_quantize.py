"""Lower precisions of a graph: what is quantised, what is not, and that the files are sound."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from fastad.export import to_onnx
from fastad.export.quantize import OP_TYPES, Quantizer
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import PercentileCalibrater
from test_methods import TINY

from fastad.engine.select import open_runtime, why_unsupported
from fastad.models import methods
from fastad.models.registry import build

DISTANCE = {"Sqrt", "Pow", "ReduceL2", "ReduceSum", "ReduceMax"}


def frames(size: tuple[int, int], count: int = 4) -> NDArray[np.uint8]:
    """Smooth images: what convolutions make of noise says little."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 220, (count, 8, 8, 3)).astype(np.uint8)
    return coarse.repeat(size[0] // 8, axis=1).repeat(size[1] // 8, axis=2)


@dataclasses.dataclass
class Made:
    """One method's float32 graph and its lower precisions."""

    graph: bytes
    images: NDArray[np.uint8]
    quantizer: Quantizer
    s8: bytes


@pytest.fixture(scope="module", params=methods())
def made(request: pytest.FixtureRequest) -> Made:
    torch.manual_seed(0)
    method = build(request.param, TINY.get(request.param, {}), weights="random")
    if request.param == "grad":
        method.config = dataclasses.replace(method.config, feature_scale=1.0)
    graph, images = to_onnx(method), frames(method.input.size)
    quantizer = Quantizer(graph, images)
    return Made(graph, images, quantizer, quantizer.int8())


def producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def quantised(model: ModelProto) -> list[NodeProto]:
    made = producers(model)
    return [
        node
        for node in model.graph.node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
        and any(name in made and made[name].op_type == "DequantizeLinear" for name in node.input)
    ]


def test_int8_passes_the_checker_with_standard_operators_only(made: Made) -> None:
    model = onnx.load_from_string(made.s8)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["anomaly_map", "raw_score"]


def test_int8_is_symmetric(made: Made) -> None:
    model = onnx.load_from_string(made.s8)
    values = {i.name: i for i in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = values[node.input[2]]
        assert zero.data_type == TensorProto.INT8  # no int32 bias either
        assert not numpy_helper.to_array(zero).any()


def test_only_four_operators_are_quantised_and_all_chosen_ones_are(made: Made) -> None:
    found = quantised(onnx.load_from_string(made.s8))
    assert {node.op_type for node in found} <= set(OP_TYPES)
    assert {node.name for node in found} == set(made.quantizer.parts.layers)


def test_weights_are_quantised_per_channel(made: Made) -> None:
    model = onnx.load_from_string(made.s8)
    sizes = {i.name: int(np.prod(i.dims)) for i in model.graph.initializer}
    scales = [
        sizes[n.input[1]]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in sizes
    ]
    assert scales
    assert max(scales) > 1


def test_distances_map_and_attention_stay_float32(made: Made) -> None:
    model = onnx.load_from_string(made.s8)
    made_by = producers(model)
    names = {node.name for node in quantised(model)}
    constants = {i.name for i in model.graph.initializer}
    reached, waiting = set(), ["anomaly_map", "raw_score"]
    while waiting:  # back from the outputs up to the first quantised node
        node = made_by.get(waiting.pop())
        if node is None or node.name in reached:
            continue
        reached.add(node.name)
        if node.op_type != "DequantizeLinear":
            waiting.extend(node.input)
    parts = made.quantizer.parts
    assert set(parts.head) <= reached
    assert not names & {*parts.head, *parts.last}
    assert DISTANCE & {node.op_type for node in model.graph.node if node.name in parts.head}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name in names:  # neither attention nor a fixed map
            weight = made_by[node.input[1]]
            while weight.op_type in ("DequantizeLinear", "Transpose"):
                if weight.input[0] in constants:
                    break
                weight = made_by[weight.input[0]]
            assert weight.input[0] in constants


def test_the_head_reads_what_was_not_rounded(made: Made) -> None:
    model = onnx.load_from_string(made.s8)
    made_by = producers(model)
    for node in model.graph.node:
        if node.name in made.quantizer.parts.head:
            read = {made_by[name].op_type for name in node.input if name in made_by}
            assert "DequantizeLinear" not in read


def test_kept_layers_are_not_quantised(made: Made) -> None:
    layers = made.quantizer.parts.layers
    model = onnx.load_from_string(made.quantizer.int8(kept=layers[:3]))
    assert {node.name for node in quantised(model)} == set(layers[3:])


@pytest.mark.parametrize("activations", ["s8", "u8"])
@pytest.mark.parametrize("half", [0, 1])
def test_keeping_layers_is_what_quantising_the_others_gives(
    made: Made, activations: Literal["s8", "u8"], half: int
) -> None:
    """The same nodes, names and constants as ONNX Runtime's quantizer leaves."""
    layers, head = made.quantizer.parts.layers, set(made.quantizer.parts.head)
    chosen = layers[half::2]
    symmetric = activations == "s8"
    again = made.quantizer._quantised(chosen, symmetric)
    rounded = {}  # what a pair gives -> what it reads
    by_output = producers(again)
    for node in again.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in by_output:
            rounded[node.output[0]] = by_output[node.input[0]].input[0]
    expected = {}
    for node in again.graph.node:
        exact = node.name not in chosen and (symmetric or node.name in head)
        read = [rounded.get(name, name) if exact else name for name in node.input]
        expected[node.name] = (node.op_type, read, list(node.output))
    data = made.quantizer.int8(activations, [n for n in layers if n not in chosen])
    model = onnx.load_from_string(data)
    found = {n.name: (n.op_type, list(n.input), list(n.output)) for n in model.graph.node}
    assert found == {name: expected[name] for name in found}
    values = {i.name: i for i in again.graph.initializer}
    for constant in model.graph.initializer:
        value = numpy_helper.to_array(constant)
        assert value.dtype == numpy_helper.to_array(values[constant.name]).dtype
        np.testing.assert_array_equal(value, numpy_helper.to_array(values[constant.name]))
    # what is missing is nothing but pairs that nobody reads
    assert {expected[name][0] for name in expected.keys() - found.keys()} <= {
        "QuantizeLinear",
        "DequantizeLinear",
    }


def test_with_every_layer_kept_the_graph_computes_the_same(made: Made) -> None:
    plain = made.quantizer.int8(kept=made.quantizer.parts.layers)
    if reason := why_unsupported("onnxruntime", "fp32"):
        pytest.skip(reason)
    first = open_runtime(made.graph, "onnxruntime", "fp32", "cpu").run(made.images)
    second = open_runtime(plain, "onnxruntime", "fp32", "cpu").run(made.images)
    np.testing.assert_allclose(second[0], first[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["s8", "u8", "float16"])
def test_lower_precisions_compute_nearly_the_same(made: Made, form: str) -> None:
    if reason := why_unsupported("onnxruntime", "fp32"):
        pytest.skip(reason)
    q = made.quantizer
    graph = {"s8": q.int8, "u8": lambda: q.int8("u8"), "float16": q.float16}[form]()
    maps, _ = open_runtime(made.graph, "onnxruntime", "fp32", "cpu").run(made.images)
    lower, _ = open_runtime(graph, "onnxruntime", "int8", "cpu").run(made.images)
    error = float(np.abs(lower - maps).mean() / np.ptp(maps))
    # 127 and 1024 steps over the range of each tensor, through up to 30 layers
    assert 0 < error < {"s8": 0.05, "u8": 0.05, "float16": 0.005}[form]


def test_float16_keeps_outputs_distances_and_softmax_in_float32(made: Made) -> None:
    model = onnx.load_from_string(made.quantizer.float16())
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in model.graph.output}
    assert {v.type.tensor_type.elem_type for v in model.graph.output} == {TensorProto.FLOAT}
    head = {*made.quantizer.parts.head, *made.quantizer.parts.last}
    narrow = {n.op_type for n in model.graph.node if kinds.get(n.output[0]) == TensorProto.FLOAT16}
    assert narrow & {"Conv", "MatMul"}
    assert not narrow & {"Softmax", "LayerNormalization", "Sqrt", "ReduceSum", "ReduceL2"}
    for node in model.graph.node:
        if node.name in head:
            assert kinds.get(node.output[0]) != TensorProto.FLOAT16


def test_equal_inputs_give_equal_bytes(made: Made) -> None:
    assert Quantizer(made.graph, made.images).int8() == made.s8


def two_layers(size: int) -> bytes:
    weights = [np.ones((2, 3, 1, 1), np.float32), np.ones((1, 2, 1, 1), np.float32)]
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    nodes = [
        helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w0"], ["y"]),
        helper.make_node("Conv", ["y", "w1"], ["anomaly_map"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two layers",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", size, size, 3])],
        [helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["B", 1, size, size])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def test_a_lone_outlier_does_not_widen_the_range_of_all_other_values() -> None:
    images = np.full((2, 400, 400, 3), 20, np.uint8)
    images[1, 7, 7, 0] = 255
    made = onnx.load_from_string(Quantizer(two_layers(400), images).int8())
    (pair,) = [n for n in made.graph.node if n.op_type == "QuantizeLinear"]
    scales = {i.name: float(numpy_helper.to_array(i)) for i in made.graph.initializer if not i.dims}
    assert scales[pair.input[1]] * 127 == pytest.approx(20, rel=0.02)


def test_an_almost_black_first_image_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bins: list[int] = []
    compute = PercentileCalibrater.compute_data

    def counted(self: PercentileCalibrater) -> object:
        bins.extend(len(counts) for counts, *_ in self.collector.histogram_dict.values())
        return compute(self)

    monkeypatch.setattr(PercentileCalibrater, "compute_data", counted)
    images = np.full((2, 32, 32, 3), 255, np.uint8)
    images[0] = 0
    images[0, 0, 0, 0] = 1
    Quantizer(two_layers(32), images)
    assert bins and max(bins) <= 2048
