"""Arguments, tolerances and compiled variants that tests and bench share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastad.ops.case import Aot, Arguments, Case, seeded
from fastad.ops.neighbor_attention import op
from fastad.ops.neighbor_attention.reference import neighbor_attention as judge

__all__ = ["BENCH", "CASES", "TOLERANCE", "aot", "call_op", "empty", "judge", "kernel"]

# dtype: (rtol, atol); outputs are means of N(0, 1) values, so mostly within 1.
TOLERANCE = {
    torch.float32: (0.0, 4e-6),  # 32 ulp at 1.0: sums and exponentials in another order
    # 2 ulp at 1.0: weights are rounded before the second product, sums with positions before the
    # first.
    torch.float16: (0.0, 2e-3),
    torch.bfloat16: (0.0, 1.6e-2),  # the same 2 ulp
}
# The interpreter multiplies bfloat16 operands of a dot as integers (triton 3.6 and 3.9).
INTERPRETED_DTYPES = (torch.float32, torch.float16)


def _case(
    name: str,
    B: int,
    heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    D: int,
    *,
    tokens_first: bool = False,
    positions: str = "",  # of "q", "k" or both
    tiles: tuple[int, int, int] | None = None,
    interpreted: bool = True,
) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = seeded(name)
        N = grid[0] * grid[1]

        def tensor(name: str, *batch: int) -> Tensor:
            shape = (N, heads, D) if tokens_first else (heads, N, D)
            # With its position a query or key is N(0, 1) again: tolerances are for such scores.
            scale = 0.5**0.5 if name in positions else 1.0
            t = (torch.randn(*batch, *shape, generator=random) * scale).to(dtype)
            # As a projection [B, N, heads * D] leaves it.
            return t.transpose(-3, -2) if tokens_first else t

        q, k, v = tensor("q", B), tensor("k", B), tensor("v", B)
        arguments: Arguments = {"q": q, "k": k, "v": v, "grid": grid, "window": window}
        arguments |= {f"{name}_position": tensor(name) for name in positions}
        return arguments | ({"tiles": tiles} if tiles else {})

    return Case(name, make, interpreted)


CASES = [
    _case("uniad", 1, 8, (14, 14), (7, 7), 32, tokens_first=True, tiles=(64, 64, 4)),
    _case("ragged", 2, 3, (7, 9), (3, 5), 20, tiles=(16, 16, 2)),  # nothing divides a block
    _case("ragged, positions", 2, 3, (9, 7), (5, 3), 20, positions="qk", tiles=(16, 16, 2)),
    # Tiles in and out of the band; as many positions as keys, so an offset too far reads NaN.
    _case("key position", 2, 2, (24, 23), (3, 3), 32, positions="k", tiles=(64, 64, 4)),
    _case("query position", 1, 3, (5, 7), (1, 3), 16, tokens_first=True, positions="q"),
    _case("blind middle", 1, 2, (7, 7), (7, 7), 32, tiles=(32, 32, 2)),
    _case("all blind", 1, 1, (4, 4), (7, 7), 16, tiles=(16, 16, 2)),
    _case("no window", 1, 2, (6, 7), (0, 0), 16, tiles=(32, 16, 2)),
    _case("one token", 1, 1, (1, 1), (1, 1), 16, tiles=(16, 16, 2)),
    _case("wide head", 1, 1, (5, 8), (1, 3), 128, tiles=(32, 16, 2)),
    # Tiles before, in and after the band: all four loops run.
    _case("narrow band", 1, 1, (24, 24), (3, 3), 32, tiles=(64, 64, 4)),
    _case("default tiles", 1, 2, (5, 6), (3, 3), 32),
    _case("large", 2, 8, (56, 56), (7, 7), 32, interpreted=False),
    _case("head 64", 3, 4, (28, 28), (7, 7), 64, interpreted=False),
    _case("head 128", 2, 2, (33, 31), (9, 5), 128, interpreted=False),
]

BENCH = [
    _case(f"{n}x{n} B{B}", B, 8, (n, n), (7, 7), 32, interpreted=False)
    for n in (14, 28, 56)
    for B in (1, 8, 64)
] + [
    _case(f"positions {n}x{n} B{B}", B, 8, (n, n), (7, 7), 32, positions="qk", interpreted=False)
    for n in (14, 28)
    for B in (1, 8, 64)
]


def empty(arguments: Arguments) -> Tensor:
    """Output buffer for `kernel`."""
    return op.empty_output(arguments["q"])


def kernel(out: Tensor, **arguments: Any) -> None:
    """The CUDA kernel, interpreted or not; imports triton."""
    from fastad.ops.neighbor_attention import triton_impl

    triton_impl.neighbor_attention(out=out, **arguments)


def call_op(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and its positional arguments."""
    op_ = torch.ops.fastad.neighbor_attention.default
    positions = settings.get("q_position"), settings.get("k_position")
    return op_, (q, k, v, settings["grid"], settings["window"], *positions)


def aot() -> list[Aot]:
    """Variants to compile ahead of time, with the kernels' own settings; imports triton."""
    from fastad.ops.neighbor_attention import triton_impl

    strides = [f"s_{t}{axis}" for t in "qkvo" for axis in "bhn"]
    strides += [f"s_{t}p{axis}" for t in "qk" for axis in "hn"]
    variants = []
    for element, itemsize, D, rows, ceiling, positions in (
        ("fp32", 4, 32, 64, 192, ""),
        ("fp16", 2, 32, 16, 96, ""),
        ("bf16", 2, 32, 64, 192, ""),
        ("fp32", 4, 128, 16, 255, ""),
        ("fp32", 4, 32, 64, 200, "qk"),
        ("fp16", 2, 32, 16, 112, "qk"),
        ("bf16", 2, 32, 64, 192, "k"),
        ("fp32", 4, 64, 32, 255, "qk"),
        ("fp16", 2, 64, 64, 255, "qk"),
        ("fp16", 2, 128, 32, 255, "qk"),
        ("fp32", 4, 128, 16, 255, "qk"),
    ):
        keys = triton_impl.tile_keys(D, itemsize)
        pointer = f"*{element}"
        names = ("q_ptr", "k_ptr", "v_ptr", "q_position_ptr", "k_position_ptr")
        types = dict.fromkeys(names, pointer)
        types |= dict.fromkeys(("heads", "N", *strides), "i32") | {"out_ptr": pointer}
        variants.append(
            Aot(
                name=f"{element} D{D} rows{rows}" + f" {positions} position" * bool(positions),
                kernel="neighbor_attention_kernel",
                types=types,
                constants=triton_impl.constants(
                    D, 14, (7, 7), rows, keys, ("q" in positions, "k" in positions)
                ),
                num_warps=4 if rows == 64 else 2,
                num_stages=triton_impl.stages(D, itemsize, "k" in positions),
                max_registers=ceiling,
                unaligned=frozenset({"heads", "N"}),
            )
        )
    return variants
