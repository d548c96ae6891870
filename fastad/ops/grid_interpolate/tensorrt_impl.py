"""``GridInterpolate`` as a TensorRT plugin; importing it registers it. Not yet run on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# tensorrt.plugin has no types; no `from __future__ import annotations`: it reads them as types.

import math

import tensorrt.plugin as trtp

from fastad.errors import UnsupportedError
from fastad.ops.aot import compile_for, revision
from fastad.ops.grid_interpolate import triton_impl
from fastad.ops.grid_interpolate.op import MAX_D, MAX_HAT_NODES, MAX_NODES_PER_AXIS, Form
from fastad.ops.tensorrt_form import (
    ELEMENTS,
    NAMESPACE,
    Answer,
    answer,
    combinations,
    multiples_of_16,
    recorded,
)

NAME = f"GridInterpolate_{revision(triton_impl)}"
PLUGIN = f"{NAMESPACE}::{NAME}"
# Form, BLOCK_P, BLOCK_C by tactic; TensorRT times them.
TILES: dict[int, tuple[Form, int, int]] = {
    1: ("gather", 16, 128),
    2: ("gather", 4, 512),
    3: ("hat", 64, 64),
    4: ("hat", 16, 128),
}


@trtp.register(PLUGIN)
@recorded
def describe(
    table: trtp.TensorDesc, coords: trtp.TensorDesc, per_image: int, capability: int
) -> trtp.TensorDesc:
    """[..., C] in the dtype of ``table``, [nodes..., C] or with ``per_image`` [B, nodes..., C]."""
    lead = tuple(coords.shape_expr[i] for i in range(coords.ndim - 1))
    return trtp.from_shape_expr((*lead, table.shape_expr[table.ndim - 1]), table.dtype)


@trtp.autotune(PLUGIN)
@recorded
def tune(
    table: trtp.TensorDesc,
    coords: trtp.TensorDesc,
    per_image: int,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Gathers always; hat + dot for 16-bit tables whose nodes fit into registers."""
    nodes = math.prod(table.shape[i] for i in range(per_image, table.ndim - 1))
    hats = ELEMENTS[table.dtype][2] == 2 and nodes <= MAX_HAT_NODES
    dtypes = [table.dtype, coords.dtype, table.dtype]
    return combinations(dtypes, [1, 2, 3, 4] if hats else [1, 2])


@trtp.aot_impl(PLUGIN)
@recorded
def generate(
    table: trtp.TensorDesc,
    coords: trtp.TensorDesc,
    per_image: int,
    capability: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Answer:
    """Kernel of one dtype, form and tile, for any number of images; ``coords`` are [..., D]."""
    nodes = tuple(table.shape_expr[i].constant_value() for i in range(per_image, table.ndim - 1))
    C, D = table.shape_expr[table.ndim - 1].constant_value(), len(nodes)
    if D > MAX_D or max(nodes) > MAX_NODES_PER_AXIS:
        raise UnsupportedError(
            f"table: the plugin takes up to {MAX_D} axes of {MAX_NODES_PER_AXIS}, got {nodes}"
        )
    # One leading axis holds points, or with a table per image one point each; more start with B.
    lead = [coords.shape_expr[i] for i in range(coords.ndim - 1)]
    images = lead.pop(0) if len(lead) > 1 or (per_image and lead) else 1
    fixed = math.prod(size.constant_value() for size in lead if size.is_constant)
    points = fixed
    for size in lead:
        if not size.is_constant:  # the left operand has to be the expression
            points = size * points
    form, block_p, block_c = TILES[tactic]
    s_tb = math.prod(nodes) * C * per_image
    scalars = {"P": points, "C": C, "s_tb": s_tb, "s_cb": points * D, "s_cp": D}
    scalars |= {"s_ob": points * C, "s_op": C}
    divisors = scalars | {"P": fixed, "s_cb": fixed * D, "s_ob": fixed * C}
    pointers = {
        name: f"*{ELEMENTS[tensor.dtype][0]}"
        for name, tensor in (("table_ptr", table), ("coords_ptr", coords), ("out_ptr", table))
    }
    compiled = compile_for(
        triton_impl.gather_kernel if form == "gather" else triton_impl.hat_kernel,
        pointers | dict.fromkeys(scalars, "i32"),
        triton_impl.constants(form, nodes, block_p, block_c) | {"s_oc": 1},
        capability,
        aligned=(*pointers, *multiples_of_16(divisors)),
    )
    fixed_rows = isinstance(points, int)
    rows = -(-points // block_p) if fixed_rows else trtp.cdiv(points, block_p)
    return answer(compiled, (-(-C // block_c), rows, images), scalars)
