"""Float16 with explicit casts: strongly typed runtimes take a graph's types as they stand."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

# Operators whose result is as good in float16 as its inputs are. Sums over many values, powers,
# exponentials and norms are not among them, nor is a Resize, whose other inputs are float32.
NARROW = frozenset(
    (
        *("Conv", "Gemm", "MatMul", "Add", "Sub", "Mul", "MaxPool", "AveragePool"),
        *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Erf", "HardSigmoid", "HardSwish"),
        *("Concat", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Gather", "Slice"),
        "DepthToSpace",
    )
)


def narrow(model: ModelProto, nodes: Collection[str]) -> None:
    """Let ``nodes`` of a graph with shapes compute in float16, in place, and all others as before.

    Weights that such nodes read are stored in float16; casts stand where the types meet.
    """
    graph = model.graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    constants = {i.name: i for i in graph.initializer if i.data_type == TensorProto.FLOAT}
    chosen = [n for n in graph.node if n.name in nodes and floats.issuperset(n.output)]
    narrowed = {name for node in chosen for name in node.output}
    names = {node.name for node in chosen}
    outputs = {value.name for value in graph.output}
    made: dict[str, NodeProto | None] = {}  # new tensor: the cast that makes it, None for weights

    def in_float16(name: str) -> str:
        if name in narrowed:
            return f"{name}.narrow" if name in outputs else name
        if name not in constants and name not in floats:
            return name  # an index, a shape, or left out
        target = f"{name}.float16"
        if target not in made:
            if name in constants:
                values = numpy_helper.to_array(constants[name])
                limit = float(np.finfo(np.float16).max)
                weights = np.clip(values, -limit, limit).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(weights, target))
                made[target] = None
            else:
                made[target] = helper.make_node(
                    "Cast", [name], [target], name=f"cast.{target}", to=TensorProto.FLOAT16
                )
        return target

    def in_float32(name: str) -> str:
        if name not in narrowed:
            return name
        target = name if name in outputs else f"{name}.float32"
        if target not in made:
            source = f"{name}.narrow" if name in outputs else name
            made[target] = helper.make_node(
                "Cast", [source], [target], name=f"cast.{target}", to=TensorProto.FLOAT
            )
        return target

    for node in graph.node:
        meet = in_float16 if node.name in names else in_float32
        node.input[:] = [meet(name) if name else name for name in node.input]
    for node in chosen:
        node.output[:] = [f"{name}.narrow" if name in outputs else name for name in node.output]
    for name in outputs & narrowed:
        in_float32(name)
    graph.node.extend(cast for cast in made.values() if cast is not None)
