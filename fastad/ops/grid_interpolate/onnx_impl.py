"""``GridInterpolate`` in ONNX: what its node means, as a local function of standard operators.

`op.onnx_node` puts the node into a graph under export. ONNX Runtime inlines the function, TensorRT
takes it where no plugin is registered; OpenVINO translates the node (`fastad.engine.openvino_ops`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnx import FunctionProto, NodeProto, parser

from fastad.ops.grid_interpolate.op import ONNX_NAME

_NAME = re.compile(f"{ONNX_NAME}([0-9]+)D(PerImage)?(Gather)?")

_START = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  unit = Constant <value_float = 1.0> ()
  half = Constant <value_float = 0.5> ()
  last = Constant <value_ints = [-1]> ()
  before_last = Constant <value_ints = [-2]> ()
  points_shape = Constant <value_ints = [{points}]> ()
  outer_shape = Constant <value_ints = [{outer}]> ()
  table_shape = Shape (table)
  wide = Cast <to = 1> (coords)
  points = Reshape (wide, points_shape)
"""
# Position on axis i in node units, [..., 1].
_POSITION = """
  axis_{i} = Constant <value_int = {axis}> ()
  size_{i} = Gather (table_shape, axis_{i})
  count_{i} = Cast <to = 1> (size_{i})
  component_{i} = Constant <value_ints = [{component}]> ()
  x_{i} = Gather <axis = -1> (points, component_{i})
  shifted_{i} = Add (x_{i}, unit)
  stretched_{i} = Mul (shifted_{i}, count_{i})
  doubled_{i} = Sub (stretched_{i}, unit)
  p_{i} = Mul (doubled_{i}, half)
"""
# Weights of all nodes of axis i, [..., n].
_HAT = """
  range_{i} = Range (zero, size_{i}, one)
  index_{i} = Cast <to = 1> (range_{i})
  offset_{i} = Sub (p_{i}, index_{i})
  distance_{i} = Abs (offset_{i})
  height_{i} = Sub (unit, distance_{i})
  weights_{i} = Relu (height_{i})
"""
# The two nodes of axis i around a point and their weights, [..., 2]; weight 0 outside the table.
_NEIGHBOURS = """
  low_{i} = Floor (p_{i})
  part_{i} = Sub (p_{i}, low_{i})
  rest_{i} = Sub (unit, part_{i})
  shares_{i} = Concat <axis = -1> (rest_{i}, part_{i})
  high_{i} = Add (low_{i}, unit)
  both_{i} = Concat <axis = -1> (low_{i}, high_{i})
  top_{i} = Sub (count_{i}, unit)
  not_below_{i} = Max (both_{i}, origin)
  inside_{i} = Min (not_below_{i}, top_{i})
  is_node_{i} = Equal (both_{i}, inside_{i})
  counts_{i} = Cast <to = 1> (is_node_{i})
  weights_{i} = Mul (shares_{i}, counts_{i})
  node_{i} = Cast <to = 7> (inside_{i})
"""
# Every combination of the axes before i with axis i, the last axis fastest.
_COMBINED_WEIGHTS = """
  column_{i} = Unsqueeze (combined_{h}, last)
  row_{i} = Unsqueeze (weights_{i}, before_last)
  product_{i} = Mul (column_{i}, row_{i})
  combined_{i} = Reshape (product_{i}, outer_shape)
"""
_COMBINED_NODES = """
  strided_{i} = Mul (corner_{h}, size_{i})
  node_column_{i} = Unsqueeze (strided_{i}, last)
  node_row_{i} = Unsqueeze (node_{i}, before_last)
  node_sum_{i} = Add (node_column_{i}, node_row_{i})
  corner_{i} = Reshape (node_sum_{i}, outer_shape)
"""
_PRODUCT = """
  rows_shape = Concat <axis = 0> ({rows}, channels)
  rows = Reshape (table, rows_shape)
  weights = CastLike (combined_{last}, table)
  read = MatMul (weights, rows)
"""
_FIRST_ROW_OF_IMAGE = """
  images_shape = Shape <end = 1> (coords)
  images = Squeeze (images_shape)
  image = Range (zero, images, one)
  image_axes = Constant <value_ints = [1, 2]> ()
  image_column = Unsqueeze (image, image_axes)
  node_shape = Shape <start = 1, end = -1> (table)
  nodes = ReduceProd <keepdims = 0> (node_shape)
  image_start = Mul (image_column, nodes)
  corners = Add (corner_{last}, image_start)
"""
_GATHER = """
  rows_shape = Concat <axis = 0> (last, channels)
  rows = Reshape (table, rows_shape)
  values = Gather (rows, corners)
  weights = CastLike (combined_{last}, table)
  weights_row = Unsqueeze (weights, before_last)
  read = MatMul (weights_row, values)
"""
_END = """
  leading_shape = Shape <end = -1> (coords)
  out_shape = Concat <axis = 0> (leading_shape, channels)
  out = Reshape (read, out_shape)
"""


def functions(nodes: Sequence[NodeProto]) -> list[FunctionProto]:
    """One function for every form of the operator among ``nodes``, all of one graph.

    The name tells the form: how many dimensions, ``PerImage`` for a table per image, ``Gather``
    for reading corners where a product with all nodes is too large. Positions and weights are
    float32 whatever the table's dtype.
    """
    names = {node.op_type for node in nodes if node.op_type.startswith(ONNX_NAME)}
    return [_function(name) for name in sorted(names)]


def _function(name: str) -> FunctionProto:
    found = _NAME.fullmatch(name)
    assert found, name
    D, per_image, gather = int(found[1]), bool(found[2]), bool(found[3])
    last = D - 1
    keep = "0, " * per_image
    body = _START.format(points=f"{keep}-1, {D}", outer=f"{keep}0, -1")
    body += "channels = Shape <start = -1> (table)\n"
    body += "origin = Constant <value_float = 0.0> ()\n" if gather else ""
    for i in range(D):
        body += _POSITION.format(i=i, axis=i + per_image, component=D - 1 - i)
        body += (_NEIGHBOURS if gather else _HAT).format(i=i)
        if i == 0:
            body += "combined_0 = Identity (weights_0)\n"
            body += "corner_0 = Identity (node_0)\n" if gather else ""
        else:
            body += _COMBINED_WEIGHTS.format(i=i, h=i - 1)
            body += _COMBINED_NODES.format(i=i, h=i - 1) if gather else ""
    if gather:
        start = _FIRST_ROW_OF_IMAGE if per_image else "corners = Identity (corner_{last})\n"
        body += (start + _GATHER).format(last=last)
    else:
        rows = "image_and_nodes" if per_image else "last"
        body += "image_and_nodes = Constant <value_ints = [0, -1]> ()\n" if per_image else ""
        body += _PRODUCT.format(last=last, rows=rows)
    head = f'<domain: "fastad", opset_import: ["": 18]>\n{name} <plugin_namespace> (table, coords)'
    return parser.parse_function(f"{head} => (out)\n{{\n{body}{_END}}}")
