"""Registration of ``fastad::postprocess``: schema, fake, one implementation per device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.ops.check import require, why_unsupported_dtype, why_unsupported_launch
from fastad.ops.postprocess import reference

NAME = "fastad::postprocess"

torch.library.define(
    NAME, "(Tensor anomaly_map, int[2] size, float? threshold) -> (Tensor, Tensor)"
)


def why_unsupported(anomaly_map: Tensor, size: list[int]) -> str | None:
    """Why the CUDA kernel cannot serve these checked arguments; None when it can."""
    if not anomaly_map.is_contiguous():
        return f"anomaly_map: expected contiguous memory, got strides {anomaly_map.stride()}"
    if reason := why_unsupported_launch("anomaly_map", images=len(anomaly_map), rows=size[0]):
        return reason
    return why_unsupported_dtype("anomaly_map", anomaly_map, (torch.float32,))


def empty_output(
    anomaly_map: Tensor, size: tuple[int, int], threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Map [B, H, W] and mask [B, H, W] bool; the mask is empty [0] without a threshold."""
    shape = (anomaly_map.shape[0], *size)
    mask_shape = (0,) if threshold is None else shape
    return anomaly_map.new_empty(shape), anomaly_map.new_empty(mask_shape, dtype=torch.bool)


def _anywhere(
    anomaly_map: Tensor, size: list[int], threshold: float | None
) -> tuple[Tensor, Tensor]:
    return reference.postprocess(anomaly_map, (size[0], size[1]), threshold)


def _cuda(anomaly_map: Tensor, size: list[int], threshold: float | None) -> tuple[Tensor, Tensor]:
    require(why_unsupported(anomaly_map, size))
    # Imported by the first call that needs it: no machine without CUDA pays for triton.
    from fastad.ops.postprocess import triton_impl

    out = empty_output(anomaly_map, (size[0], size[1]), threshold)
    triton_impl.postprocess(anomaly_map, threshold, out)
    return out


def _fake(anomaly_map: Tensor, size: list[int], threshold: float | None) -> tuple[Tensor, Tensor]:
    return empty_output(anomaly_map, (size[0], size[1]), threshold)


torch.library.impl(NAME, "CompositeExplicitAutograd")(_anywhere)
torch.library.impl(NAME, "CUDA")(_cuda)
torch.library.register_fake(NAME)(_fake)
