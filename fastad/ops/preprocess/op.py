"""Registration of ``fastad::preprocess``: schema, fake, one implementation per device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastad.ops.check import require, why_unsupported_dtype, why_unsupported_launch
from fastad.ops.preprocess import reference
from fastad.ops.preprocess.reference import Triple

NAME = "fastad::preprocess"
OUTPUT_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)

torch.library.define(
    NAME,
    "(Tensor images, int[2] size, float[]? mean, float[]? std, bool swap_red_blue, "
    "ScalarType dtype) -> Tensor",
)


def why_unsupported(images: Tensor, size: list[int], dtype: torch.dtype) -> str | None:
    """Why the CUDA kernel cannot serve these checked arguments; None when it can."""
    if not images.is_contiguous():
        return f"images: expected contiguous memory, got strides {images.stride()}"
    if reason := why_unsupported_launch("images", images=images.shape[0], rows=size[0]):
        return reason
    return why_unsupported_dtype("dtype", torch.empty(0, dtype=dtype), OUTPUT_DTYPES)


def empty_output(
    images: Tensor, size: tuple[int, int], normalised: bool, dtype: torch.dtype
) -> Tensor:
    """uint8 [B, h, w, 3], or [B, 3, h, w] when normalised."""
    if normalised:
        return images.new_empty((images.shape[0], 3, *size), dtype=dtype)
    return images.new_empty((images.shape[0], *size, 3))


def _anywhere(
    images: Tensor,
    size: list[int],
    mean: list[float] | None,
    std: list[float] | None,
    swap_red_blue: bool,
    dtype: torch.dtype,
) -> Tensor:
    return reference.preprocess(
        images, (size[0], size[1]), _triple(mean), _triple(std), swap_red_blue, dtype
    )


def _cuda(
    images: Tensor,
    size: list[int],
    mean: list[float] | None,
    std: list[float] | None,
    swap_red_blue: bool,
    dtype: torch.dtype,
) -> Tensor:
    require(why_unsupported(images, size, dtype))
    # Imported by the first call that needs it: no machine without CUDA pays for triton.
    from fastad.ops.preprocess import triton_impl

    out = empty_output(images, (size[0], size[1]), mean is not None, dtype)
    triton_impl.preprocess(images, _triple(mean), _triple(std), swap_red_blue, out)
    return out


def _fake(
    images: Tensor,
    size: list[int],
    mean: list[float] | None,
    std: list[float] | None,
    swap_red_blue: bool,
    dtype: torch.dtype,
) -> Tensor:
    return empty_output(images, (size[0], size[1]), mean is not None, dtype)


def _triple(values: list[float] | None) -> Triple | None:
    return None if values is None else cast(Triple, tuple(values))


torch.library.impl(NAME, "CompositeExplicitAutograd")(_anywhere)
torch.library.impl(NAME, "CUDA")(_cuda)
torch.library.register_fake(NAME)(_fake)
