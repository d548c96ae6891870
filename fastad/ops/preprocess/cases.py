"""Arguments, tolerances and compiled variants that tests and bench share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastad.ops.case import Aot, Arguments, Case, seeded
from fastad.ops.preprocess import op
from fastad.ops.preprocess.reference import Triple
from fastad.ops.preprocess.reference import preprocess as judge

__all__ = ["BENCH", "CASES", "TOLERANCE", "aot", "call_op", "empty", "judge", "kernel"]

MEAN: Triple = (0.485, 0.456, 0.406)
STD: Triple = (0.229, 0.224, 0.225)

# dtype of the result: (rtol, atol); normalised values reach 2.7.
TOLERANCE = {
    torch.uint8: (0.0, 0.0),  # bit-exact
    torch.float32: (0.0, 1e-6),  # 4 ulp at 2
    torch.float16: (0.0, 2e-3),  # 1 ulp at 2
    torch.bfloat16: (0.0, 1.6e-2),  # 1 ulp at 2
}
INTERPRETED_DTYPES = (torch.uint8, torch.float32, torch.float16)


def _case(
    name: str,
    B: int,
    source: tuple[int, int],
    size: tuple[int, int],
    *,
    swap: bool = False,
    interpreted: bool = True,
) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = seeded(name)
        # Mostly black and white, where rounding and clipping of the passes show.
        images = torch.randint(-100, 355, (B, *source, 3), generator=random).clamp(0, 255)
        normalised = dtype.is_floating_point
        return {
            "images": images.to(torch.uint8),
            "size": size,
            "mean": MEAN if normalised else None,
            "std": STD if normalised else None,
            "swap_red_blue": swap,
            "dtype": dtype,
        }

    return Case(name, make, interpreted)


CASES = [
    _case("shrink", 2, (17, 29), (5, 9)),
    _case("grow", 1, (5, 7), (11, 13), swap=True),
    _case("shrink rows, grow columns", 1, (40, 6), (7, 70)),
    _case("same size", 1, (9, 10), (9, 10), swap=True),
    _case("one pixel", 1, (1, 1), (3, 2)),
    _case("to one pixel", 1, (9, 8), (1, 1)),
    _case("camera", 2, (1200, 1600), (256, 256), interpreted=False),
]

BENCH = [
    _case(f"{h}x{w} to 224 B{B}", B, (h, w), (224, 224), interpreted=False)
    for h, w in ((900, 900), (1200, 1920), (3000, 4096))
    for B in (1, 8)
]


def empty(arguments: Arguments) -> Tensor:
    """Output buffer for `kernel`."""
    normalised = arguments["mean"] is not None
    return op.empty_output(arguments["images"], arguments["size"], normalised, arguments["dtype"])


def kernel(out: Tensor, **arguments: Any) -> None:
    """The CUDA kernel, interpreted or not; imports triton."""
    from fastad.ops.preprocess import triton_impl

    triton_impl.preprocess(
        arguments["images"], arguments["mean"], arguments["std"], arguments["swap_red_blue"], out
    )


def call_op(**arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and its positional arguments."""
    return torch.ops.fastad.preprocess.default, tuple(arguments.values())


def aot() -> list[Aot]:
    """Variants to compile ahead of time, with the kernels' own settings; imports triton."""
    from fastad.ops.preprocess import triton_impl

    tables = ("first_h_ptr", "weights_h_ptr", "first_w_ptr", "weights_w_ptr")
    sizes = ("H", "W", "h", "w", "taps_h", "taps_w")
    return [
        Aot(
            name=f"preprocess {element}",
            kernel="preprocess_kernel",
            types={"images_ptr": "*u8"} | dict.fromkeys(tables, "*i32")
            | dict.fromkeys(sizes, "i32") | {"out_ptr": f"*{element}"},
            constants=triton_impl.constants(mean, std, False),
            max_registers=64,
            unaligned=frozenset(sizes),
        )
        for element, mean, std in (("u8", None, None), ("fp16", MEAN, STD))
    ]  # fmt: skip
