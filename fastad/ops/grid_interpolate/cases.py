"""Arguments, tolerances and compiled variants that tests and bench share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastad.ops.case import Aot, Arguments, Case, seeded
from fastad.ops.grid_interpolate.op import Form, choose_form
from fastad.ops.grid_interpolate.reference import grid_interpolate as judge

__all__ = ["BENCH", "CASES", "TOLERANCE", "aot", "call_op", "empty", "judge", "kernel"]

# dtype: (rtol, atol); outputs are means of at most 2 ** D values from N(0, 1).
TOLERANCE = {
    # Positions are rounded to 24 bits of up to 12 node units: 1e-6 of a weight, times values of 3.
    torch.float32: (0.0, 1e-5),
    torch.float16: (0.0, 4e-3),  # 2 ulp at 2: hat + dot rounds weights, both round the result
    torch.bfloat16: (0.0, 3.2e-2),  # the same 2 ulp
}
# The interpreter multiplies bfloat16 operands of a dot as integers (triton 3.6 and 3.9).
INTERPRETED_DTYPES = (torch.float32, torch.float16)


def _case(
    name: str,
    nodes: tuple[int, ...],
    C: int,
    points: tuple[int, ...],
    *,
    form: Form | None = None,
    per_image: bool = False,
    channels_first: bool = False,
    tile: tuple[int, int] | None = None,
    interpreted: bool = True,
) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = seeded(name)
        lead = points[:1] if per_image else ()
        # Values and positions that every dtype holds, so that all are judged on the same numbers.
        table = torch.randn(*lead, *nodes, C, generator=random).to(dtype)
        # Beyond [-1, 1], where reads fade to 0, on the outermost nodes and on the corners.
        coords = torch.rand(*points, len(nodes), generator=random) * 2.6 - 1.3
        flat = coords.view(-1, len(nodes))
        if len(flat) > 2:
            flat[0] = 1.0
            flat[-1] = 1.0 / nodes[-1] - 1.0
        settings: Arguments = {"channels_first": True} if channels_first else {}
        settings |= {"form": form} if form else {}
        settings |= {"tile": tile} if tile else {}
        return {"table": table, "coords": coords.to(dtype), "per_image": per_image} | settings

    return Case(name, make, interpreted)


CASES = [
    _case("1-D", (5,), 7, (33,), tile=(16, 16)),
    _case("2-D", (8, 6), 40, (2, 5, 7), tile=(16, 64)),
    _case("3-D", (4, 3, 5), 33, (41,), tile=(64, 64)),
    _case("4-D", (3, 4, 2, 5), 20, (3, 10), tile=(16, 32)),
    _case("5-D", (2, 3, 2, 2, 3), 16, (9,), tile=(16, 16)),
    _case("one node", (1, 1), 3, (4,), tile=(16, 16)),
    _case("one point", (4, 4), 700, (1,), tile=(4, 512)),
    _case("hat 1-D", (19,), 40, (70,), form="hat", tile=(64, 64)),
    _case("hat 2-D", (8, 9), 70, (2, 35), form="hat", tile=(64, 64)),
    _case("hat 4-D", (3, 4, 2, 3), 20, (30,), form="hat", tile=(16, 32)),
    _case("table per image", (4, 3), 24, (3, 11), per_image=True, tile=(16, 32)),
    _case("hat, table per image", (4, 3), 24, (3, 11), form="hat", per_image=True, tile=(16, 32)),
    _case("second half of a buffer", (8, 8), 40, (2, 5, 6), channels_first=True, tile=(64, 32)),
    _case("hat into a buffer", (8, 8), 40, (2, 5, 6), form="hat", channels_first=True),
    _case("grad local", (8, 8), 272, (2, 28, 28), channels_first=True, interpreted=False),
    _case("grad global", (4, 4), 213_248, (8,), interpreted=False),
    _case("large 3-D", (16, 16, 16), 64, (4, 1000), interpreted=False),
]

BENCH = [
    case
    for B in (1, 8, 64)
    for case in (
        _case(f"local 8x8x272 B{B}", (8, 8), 272, (B, 28, 28), interpreted=False),
        _case(f"global 4x4x213248 B{B}", (4, 4), 213_248, (B,), interpreted=False),
    )
]


def empty(arguments: Arguments) -> Tensor:
    """Output buffer for `kernel`; with channels_first the second half of [B, 2 C, H, W]."""
    table, coords = arguments["table"], arguments["coords"]
    C = table.shape[-1]
    if not arguments.pop("channels_first", False):
        return torch.empty(*coords.shape[:-1], C, dtype=table.dtype, device=table.device)
    B, H, W, _ = coords.shape
    both = torch.empty(B, 2 * C, H, W, dtype=table.dtype, device=table.device)
    return both[:, C:].permute(0, 2, 3, 1)


def kernel(out: Tensor, **arguments: Any) -> None:
    """The CUDA kernel, interpreted or not; imports triton."""
    from fastad.ops.grid_interpolate import triton_impl

    table, coords, per_image = (arguments.pop(k) for k in ("table", "coords", "per_image"))
    form = arguments.pop("form", None) or choose_form(table, coords, per_image)
    triton_impl.grid_interpolate(table, coords, per_image, out, form, **arguments)


def call_op(
    table: Tensor, coords: Tensor, per_image: bool, **_: Any
) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and its positional arguments."""
    return torch.ops.fastad.grid_interpolate.default, (table, coords, per_image)


def aot() -> list[Aot]:
    """Variants to compile ahead of time, with the kernels' own settings; imports triton."""
    from fastad.ops.grid_interpolate import triton_impl

    def variant(
        name: str, form: Form, element: str, nodes: tuple[int, ...], tile: tuple[int, int], top: int
    ) -> Aot:
        pointers = {f"{n}_ptr": f"*{element}" for n in ("table", "coords", "out")}
        scalars = ("P", "C", "s_tb", "s_cb", "s_cp", "s_ob", "s_op", "s_oc")
        types = pointers | dict.fromkeys(scalars, "i32")
        constants = triton_impl.constants(form, nodes, *tile) | {"s_oc": 1}
        unaligned = frozenset({"P", "s_cb", "s_cp"})
        return Aot(name, f"{form}_kernel", types, constants, max_registers=top, unaligned=unaligned)

    return [
        variant("gather fp32 2-D", "gather", "fp32", (8, 8), (16, 128), 96),
        variant("gather fp16 4-D", "gather", "fp16", (6, 6, 6, 6), (16, 128), 168),
        variant("hat fp16 2-D", "hat", "fp16", (8, 8), (64, 64), 128),
        variant("hat bf16 2-D", "hat", "bf16", (4, 4), (16, 128), 96),
    ]
