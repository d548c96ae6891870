"""OpenVINO's own form of the operators: nodes of the domain ``fastad``, translated on reading.

OpenVINO ignores the functions of an ONNX file. Each node becomes standard OpenVINO operations, so
that a model once read holds nothing of ours: it compiles, is saved and is cached like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray
from openvino.frontend.onnx import ConversionExtension

DOMAIN = "fastad"
MAX_D = 10  # dimensions of a table, as many as the operator's kernel takes
EXCLUDED = -1e30  # finite: a row of -inf would be NaN in softmax

Translation = Callable[[Any], list[ov.Output]]


def read_model(core: ov.Core, graph: bytes, weights: bytes = b"") -> ov.Model:
    """An ONNX graph, with or without nodes of fastad, in OpenVINO's own operations.

    With ``weights``, ``graph`` is the XML of an IR instead. ``core`` knows the nodes from then on.

    Raises:
        RuntimeError: OpenVINO refuses the graph.
    """
    for name, translation in translations().items():
        core.add_extension(ConversionExtension(name, DOMAIN, translation))
    return core.read_model(graph, weights)


def translations() -> dict[str, Translation]:
    """How every node of fastad is translated, by its operator's name; for one model each."""
    masks: dict[tuple[int, ...], ov.Output] = {}  # layers share them
    found: dict[str, Translation] = {}
    for form in ("", "Q", "K", "QK"):
        found[f"NeighborAttention{form}"] = _neighbor_attention(form, masks)
    for D in range(1, MAX_D + 1):
        for per_image in (False, True):
            for gather in (False, True):
                form = f"{D}D" + "PerImage" * per_image + "Gather" * gather
                found[f"GridInterpolate{form}"] = _grid_interpolate(D, per_image, gather)
    return found


def _neighbor_attention(form: str, masks: dict[tuple[int, ...], ov.Output]) -> Translation:
    def translate(node: Any) -> list[ov.Output]:
        inputs = [node.get_input(i) for i in range(node.get_input_size())]
        q, k, v = inputs[:3]
        positions = dict(zip(form, inputs[3:], strict=True))
        grid = node.get_attribute("grid_height"), node.get_attribute("grid_width")
        window = node.get_attribute("window_height"), node.get_attribute("window_width")
        kind = q.get_element_type()
        scale = ops.constant(node.get_attribute("scale") ** 0.5, kind)
        a = ops.multiply(_placed(q, positions.get("Q")), scale)
        b = ops.multiply(_placed(k, positions.get("K")), scale)
        scores = ops.convert(ops.matmul(a, b, False, True), ov.Type.f32)
        hidden = _hidden(grid, window)
        if hidden.any():
            key = (*grid, *window)
            if key not in masks:
                masks[key] = ops.constant(hidden * np.float32(EXCLUDED)).output(0)
            scores = ops.add(scores, masks[key])
        weights = ops.convert(ops.softmax(scores, -1), kind)
        read = ops.matmul(weights, v, False, False)
        if hidden.all(1).any():  # queries that see no key
            sighted = ~hidden.all(1, keepdims=True)
            read = ops.multiply(read, ops.convert(ops.constant(np.float32(sighted)), kind))
        return [read.output(0)]

    return translate


def _placed(t: ov.Output, position: ov.Output | None) -> ov.Output:
    """[B, heads, N, D] with its position; transposed for the sum, which cancels a transpose."""
    if position is None:
        return t
    tokens = ops.transpose(t, np.array([0, 2, 1, 3]))
    moved = ops.add(tokens, ops.transpose(position, np.array([1, 0, 2])))
    return ops.transpose(moved, np.array([0, 2, 1, 3])).output(0)


def _hidden(grid: tuple[int, int], window: tuple[int, int]) -> NDArray[np.bool_]:
    """[N, N], True where a key (second axis) lies in the window of a query (first axis)."""
    near = []
    for n, w in zip(grid, window, strict=True):
        i = np.arange(n)
        near.append(2 * abs(i[:, None] - i[None, :]) < w)
    N = grid[0] * grid[1]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(N, N)


def _grid_interpolate(D: int, per_image: bool, gather: bool) -> Translation:
    def translate(node: Any) -> list[ov.Output]:
        table, coords = node.get_input(0), node.get_input(1)
        kind = table.get_element_type()
        *nodes, C = (size.get_length() for size in list(table.get_partial_shape())[per_image:])
        wide = ops.convert(coords, ov.Type.f32)
        flat = [0] * (coords.get_partial_shape().rank.get_length() - 1) + [-1]
        weights = corners = None
        for axis, n in enumerate(nodes):
            x = ops.gather(wide, np.array([D - 1 - axis]), np.int64(-1))  # [..., 1]
            p = ((x + _f(1)) * _f(n) - _f(1)) * _f(0.5)
            on_axis, node_of = _neighbours(p, n) if gather else (_hat(p, n), None)
            if axis == 0:
                weights, corners = on_axis, node_of
            else:
                weights = ops.reshape(_column(weights) * _row(on_axis), flat, True)
                if gather:
                    strided = corners * ops.constant(np.int32(n))
                    corners = ops.reshape(_column(strided) + _row(node_of), flat, True)
        weights = ops.convert(weights, kind)
        rows = ops.reshape(table, [0, -1, C] if per_image else [-1, C], per_image)
        if gather:
            # [..., 2 ** D, C]
            values = ops.gather(rows, corners, np.int64(int(per_image)), int(per_image))
            return [ops.squeeze(ops.matmul(_row(weights), values, False, False), [-2]).output(0)]
        if not per_image:
            return [ops.matmul(weights, rows, False, False).output(0)]
        points = ops.reshape(weights, [0, -1, int(np.prod(nodes))], True)
        read = ops.matmul(points, rows, False, False)  # [B, P, C]
        leading = ops.slice(ops.shape_of(coords), [0], [-1], [1])
        shape = ops.concat([leading, ops.constant(np.array([C]))], 0)
        return [ops.reshape(read, shape, False).output(0)]

    return translate


def _hat(p: ov.Node, n: int) -> ov.Node:
    """Weights [..., n] of all nodes of an axis at positions [..., 1] in node units."""
    index = ops.constant(np.arange(n, dtype=np.float32))
    return ops.relu(_f(1) - ops.absolute(p - index))


def _neighbours(p: ov.Node, n: int) -> tuple[ov.Node, ov.Node]:
    """Weights and indices [..., 2] of the two nodes around each position; 0 beyond the table."""
    low = ops.floor(p)
    part = p - low
    shares = ops.concat([_f(1) - part, part], -1)
    both = ops.concat([low, low + _f(1)], -1)
    inside = ops.clamp(both, 0.0, float(n - 1))
    counts = ops.convert(ops.equal(both, inside), ov.Type.f32)
    return shares * counts, ops.convert(inside, ov.Type.i32)


def _column(t: ov.Node) -> ov.Node:
    return ops.unsqueeze(t, [-1])


def _row(t: ov.Node) -> ov.Node:
    return ops.unsqueeze(t, [-2])


def _f(value: float) -> ov.Node:
    return ops.constant(np.float32(value))
