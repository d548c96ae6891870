"""``NeighborAttention`` in ONNX: what its node means, as a local function of standard operators.

`op.onnx_node` puts the node into a graph under export. ONNX Runtime inlines the function, TensorRT
takes it where no plugin is registered; OpenVINO translates the node (`fastad.engine.openvino_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import FunctionProto, NodeProto, helper, parser

from fastad.ops.neighbor_attention.op import ONNX_NAME
from fastad.ops.neighbor_attention.reference import EXCLUDED, has_blind_rows

ATTRIBUTES = ("grid_height", "grid_width", "window_height", "window_width", "scale")

# Transposed for the sum, as in `reference`: the swap of axes cancels the caller's.
_PLACED = """
  {t}_tokens = Transpose <perm = [0, 2, 1, 3]> ({t})
  {t}_offsets = Transpose <perm = [1, 0, 2]> ({t}_position)
  {t}_moved = Add ({t}_tokens, {t}_offsets)
  {t}_placed = Transpose <perm = [0, 2, 1, 3]> ({t}_moved)
"""
# From one small matrix per axis, and all of it folds to one constant.
_MASK = f"""
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  height = Constant <value_int: int = @grid_height> ()
  width = Constant <value_int: int = @grid_width> ()
  window_h = Constant <value_int: int = @window_height> ()
  window_w = Constant <value_int: int = @window_width> ()
  first = Constant <value_ints = [0]> ()
  second = Constant <value_ints = [1]> ()
  row = Range (zero, height, one)
  row_as_query = Unsqueeze (row, second)
  row_offset = Sub (row_as_query, row)
  row_distance = Abs (row_offset)
  row_doubled = Mul (row_distance, two)
  row_near = Less (row_doubled, window_h)
  column = Range (zero, width, one)
  column_as_query = Unsqueeze (column, second)
  column_offset = Sub (column_as_query, column)
  column_distance = Abs (column_offset)
  column_doubled = Mul (column_distance, two)
  column_near = Less (column_doubled, window_w)
  column_axes = Constant <value_ints = [1, 3]> ()
  row_axes = Constant <value_ints = [0, 2]> ()
  rows = Unsqueeze (row_near, column_axes)
  columns = Unsqueeze (column_near, row_axes)
  near = And (rows, columns)
  tokens = Mul (height, width)
  side = Unsqueeze (tokens, first)
  square = Concat <axis = 0> (side, side)
  hidden = Reshape (near, square)
  hides = Cast <to = 1> (hidden)
  excluded = Constant <value_float = {EXCLUDED}> ()
  mask = Mul (hides, excluded)
  visible = Add (scores, mask)
"""
# On the result, which is smaller than the weights.
_GUARD = """
  all_keys = Constant <value_float = 1.0> ()
  blind = ReduceMin <keepdims = 1> (hides, second)
  sighted = Sub (all_keys, blind)
  guard = CastLike (sighted, q)
  out = Mul (read, guard)
"""


def functions(nodes: Sequence[NodeProto]) -> list[FunctionProto]:
    """One function for every form of the operator among ``nodes``, all of one graph.

    Forms differ in the positions they take, and in name: ``Q``, ``K`` or ``QK`` at its end. A body
    leaves out what none of its nodes needs: the mask where every window is 0, the guard of rows
    without any key where every query sees one.
    """
    forms: dict[str, list[NodeProto]] = {}
    for node in nodes:
        if node.op_type.startswith(ONNX_NAME):
            forms.setdefault(node.op_type, []).append(node)
    return [_function(name, users) for name, users in sorted(forms.items())]


def _function(name: str, users: Sequence[NodeProto]) -> FunctionProto:
    settings = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in users]
    pairs = [
        ((s["grid_height"], s["grid_width"]), (s["window_height"], s["window_width"]))
        for s in settings
    ]
    masked = any(min(window) > 0 for _, window in pairs)
    guarded = any(has_blind_rows(grid, window) for grid, window in pairs)
    placed = name.removeprefix(ONNX_NAME).lower()
    inputs = ["q", "k", "v", *(f"{t}_position" for t in placed)]
    text = f"""
<domain: "fastad", opset_import: ["": 18]>
{name} <{", ".join(ATTRIBUTES)}, plugin_namespace> ({", ".join(inputs)}) => (out)
{{
  {"".join(_PLACED.format(t=t) for t in placed)}
  whole_scale = Constant <value_float: float = @scale> ()
  half_scale_wide = Sqrt (whole_scale)
  half_scale = CastLike (half_scale_wide, q)
  a = Mul ({"q_placed" if "q" in placed else "q"}, half_scale)
  b = Mul ({"k_placed" if "k" in placed else "k"}, half_scale)
  b_turned = Transpose <perm = [0, 1, 3, 2]> (b)
  products = MatMul (a, b_turned)
  scores = Cast <to = 1> (products)
  {_MASK if masked else "visible = Identity (scores)"}
  shares = Softmax <axis = -1> (visible)
  weights = CastLike (shares, v)
  read = MatMul (weights, v)
  {_GUARD if guarded else "out = Identity (read)"}
}}"""
    return parser.parse_function(text)
