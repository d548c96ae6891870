"""Floating-point operations of a graph: what its convolutions and matrix products must compute."""

from __future__ import annotations

import math

import openvino as ov

from fastad.engine.openvino_ops import read_model

GROUPED = {"GroupConvolution", "GroupConvolutionBackpropData"}
CONVOLUTIONS = GROUPED | {"Convolution", "ConvolutionBackpropData"}


def flops(graph: bytes, size: tuple[int, int], batch: int = 1) -> int:
    """Two per multiply-add of every convolution and matrix product; the rest is not counted.

    Counted on the graph as OpenVINO reads it, before it folds and fuses, with every shape known.

    Args:
        graph: ONNX bytes whose one input is uint8 [B, H, W, 3].
        size: (H, W) of the model.
        batch: B.

    Raises:
        ValueError: the graph does not get fixed shapes, or holds an operation whose products are
            not counted (Einsum, recurrent cells).
    """
    model = read_model(ov.Core(), graph)
    model.reshape([batch, *size, 3])
    return _flops(model)


def _flops(model: ov.Model) -> int:
    total = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("Einsum", "GRUSequence", "LSTMSequence", "RNNSequence", "TensorIterator"):
            raise ValueError(f"{node.get_friendly_name()}: the products of {kind} are not counted")
        if kind in CONVOLUTIONS or kind == "MatMul":
            shapes = [node.input(i).get_partial_shape() for i in (0, 1)]
            out = node.output(0).get_partial_shape()
            if any(shape.is_dynamic for shape in (*shapes, out)):
                raise ValueError(f"{node.get_friendly_name()}: {kind} has no fixed shape")
            data, weights = (list(shape.to_shape()) for shape in shapes)
            total += 2 * _products(node, kind, data, weights, list(out.to_shape()))
    return total


def _products(node: ov.Node, kind: str, data: list[int], weights: list[int], out: list[int]) -> int:
    """Multiply-adds: those of one element times the elements, of the output or of the input."""
    if kind == "MatMul":
        transposed = node.get_attributes()["transpose_a"]
        return math.prod(out) * (data[-2] if transposed and len(data) > 1 else data[-1])
    # Weights: [out, in, kernel], transposed [in, out, kernel]; with groups [group, ...] of those.
    each = math.prod(weights[2:] if kind in GROUPED else weights[1:])
    # A transposed convolution spreads each element of the input over a kernel.
    return each * math.prod(data if "Backprop" in kind else out)
