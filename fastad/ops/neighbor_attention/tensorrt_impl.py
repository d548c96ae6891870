"""``NeighborAttention`` as a TensorRT plugin; importing it registers it. Not yet run on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# tensorrt.plugin has no types; no `from __future__ import annotations`: it reads them as types.

import math

import tensorrt.plugin as trtp

from fastad.errors import UnsupportedError
from fastad.ops.aot import compile_for, revision
from fastad.ops.neighbor_attention import triton_impl
from fastad.ops.neighbor_attention.op import MAX_HEAD_DIM
from fastad.ops.tensorrt_form import (
    ELEMENTS,
    NAMESPACE,
    Answer,
    answer,
    combinations,
    multiples_of_16,
    recorded,
)

NAME = f"NeighborAttention_{revision(triton_impl)}"
PLUGIN = f"{NAMESPACE}::{NAME}"
HAS_Q_POSITION, HAS_K_POSITION = 1, 2  # bits of ``positions``
ROWS = {1: 16, 2: 32, 3: 64}  # queries of a program, by tactic; TensorRT times them


@trtp.register(PLUGIN)
@recorded
def describe(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    q_position: trtp.TensorDesc,
    k_position: trtp.TensorDesc,
    grid_width: int,
    window_height: int,
    window_width: int,
    scale: float,
    positions: int,
    capability: int,
) -> trtp.TensorDesc:
    """Output like ``q``, [B, heads, N, D]; an absent position is any tensor, never read."""
    return q.like()


@trtp.autotune(PLUGIN)
@recorded
def tune(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    q_position: trtp.TensorDesc,
    k_position: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Tile heights whose keys and values fit into shared memory."""
    row_bytes = max(16, q.shape[3]) * ELEMENTS[q.dtype][2]
    tallest = 64 if row_bytes <= 128 else 32 if row_bytes <= 256 else 16
    tactics = [tactic for tactic, rows in ROWS.items() if rows <= tallest]
    return combinations([t.dtype for t in (q, k, v, q_position, k_position, q)], tactics)


@trtp.aot_impl(PLUGIN)
@recorded
def generate(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    q_position: trtp.TensorDesc,
    k_position: trtp.TensorDesc,
    grid_width: int,
    window_height: int,
    window_width: int,
    scale: float,
    positions: int,
    capability: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Answer:
    """Kernel of one dtype and tile height, for any batch of this map size."""
    heads, N, D = (q.shape_expr[i].constant_value() for i in (1, 2, 3))
    if D > MAX_HEAD_DIM:
        raise UnsupportedError(f"q: the plugin takes D up to {MAX_HEAD_DIM}, got {D}")
    if len({tensor.dtype for tensor in (q, k, v, q_position, k_position)}) > 1:
        raise UnsupportedError("q: the plugin takes tensors of one dtype; cast the others in ONNX")
    element, itemsize = ELEMENTS[q.dtype][0], ELEMENTS[q.dtype][2]
    rows, has_q, has_k = ROWS[tactic], positions & HAS_Q_POSITION, positions & HAS_K_POSITION
    window, keys = (window_height, window_width), triton_impl.tile_keys(D, itemsize)
    constants = triton_impl.constants(
        D, grid_width, window, rows, keys, (bool(has_q), bool(has_k))
    ) | {"SCALE": math.log2(math.e) * scale}
    scalars = {"heads": heads, "N": N}
    for tensor in "qkvo":
        scalars |= {f"s_{tensor}b": heads * N * D, f"s_{tensor}h": N * D, f"s_{tensor}n": D}
    for tensor, present in (("q", has_q), ("k", has_k)):
        scalars |= {f"s_{tensor}ph": N * D if present else 0, f"s_{tensor}pn": D if present else 0}
    pointers = ("q_ptr", "k_ptr", "v_ptr", "q_position_ptr", "k_position_ptr", "out_ptr")
    compiled = compile_for(
        triton_impl.neighbor_attention_kernel,
        dict.fromkeys(pointers, f"*{element}") | dict.fromkeys(scalars, "i32"),
        constants,
        capability,
        aligned=(*pointers, *multiples_of_16(scalars)),
        num_warps=4 if rows == 64 else 2,
        num_stages=triton_impl.stages(D, itemsize, bool(has_k)),
    )
    programs = q.shape_expr[0] * (heads * -(-N // rows))
    return answer(compiled, (programs, 1, 1), scalars)
