"""Registration of ``fastad::grid_interpolate``: schema, fake, one implementation per device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastad.ops.check import (
    refuse_gradient,
    require,
    why_unsupported_dtype,
    why_unsupported_launch,
    why_unsupported_strides,
)
from fastad.ops.grid_interpolate import reference

NAME = "fastad::grid_interpolate"
NAME_OUT = "fastad::grid_interpolate_out"
ONNX_NAME = "GridInterpolate"  # no ONNX operator has this name, whose domain NVIDIA ignores
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_D = 10  # the gather reads 2 ** D corners
MAX_NODES_PER_AXIS = 4095  # sizes reach the kernel packed, 12 bits each
MAX_POINTS = 4 * 65535  # blocks of at least 4 points on the second axis of a launch
MAX_HAT_NODES = 256  # weights of a block of points stay in registers

Form = Literal["gather", "hat"]

torch.library.define(NAME, "(Tensor table, Tensor coords, bool per_image=False) -> Tensor")
torch.library.define(
    NAME_OUT, "(Tensor table, Tensor coords, bool per_image, Tensor(a!) out) -> ()"
)


def as_points(tensor: Tensor, per_image: bool) -> Tensor | None:
    """[B, P, X] view of [..., X], one stride per axis; None when no such view exists.

    The first of several leading axes is the image; a single one holds points, or with a table per
    image one point each.
    """
    one_axis = tensor.dim() == 2 and not per_image
    lead = 1 if tensor.dim() == 1 or one_axis else tensor.shape[0]
    try:
        return tensor.view(lead, tensor.shape[:-1].numel() // max(lead, 1), tensor.shape[-1])
    except RuntimeError:
        return None


def choose_form(table: Tensor, coords: Tensor, per_image: bool = False) -> Form:
    """Gather reads ``2 ** D`` rows per point, hat + dot every row once per block of 64 points.

    Counted by these reads, not measured. In float32 an exact dot has no tensor cores: gather.
    """
    nodes = table.shape[per_image:-1]
    points = coords.shape[:-1].numel() // (table.shape[0] if per_image else 1)
    reads_hat = nodes.numel() * -(-points // 64)
    few = nodes.numel() <= MAX_HAT_NODES and reads_hat < points * 2 ** len(nodes)
    return "hat" if few and table.element_size() == 2 else "gather"


def onnx_node(table: Tensor, coords: Tensor, per_image: bool = False) -> Tensor:
    """The operator as one node of a graph under export; `onnx_impl` says what it means.

    Its name tells the form, which follows from the table alone: plugins and functions have one
    number of dimensions each.
    """
    form = "PerImage" * per_image
    form += "Gather" * (table.shape[per_image:-1].numel() > MAX_HAT_NODES)
    out: Tensor = torch.onnx.ops.symbolic(
        f"fastad::{ONNX_NAME}{coords.shape[-1]}D{form}",
        (table, coords),
        # TensorRT takes a plugin of this name before the function
        {"plugin_namespace": "fastad"},
        dtype=table.dtype,
        shape=(*coords.shape[:-1], table.shape[-1]),
        version=1,
    )
    return out


def why_unsupported(table: Tensor, coords: Tensor, out: Tensor | None = None) -> str | None:
    """Why the CUDA kernel cannot serve these checked arguments; None when it can."""
    if not table.is_contiguous():
        return f"table: expected contiguous memory, got strides {table.stride()}; use .contiguous()"
    if coords.shape[-1] > MAX_D:
        return f"coords: the CUDA kernel takes D up to {MAX_D}, got {coords.shape[-1]}"
    if coords.stride(-1) != 1 and coords.shape[-1] > 1:
        return f"coords: expected stride 1 along D, got {coords.stride()}; use .contiguous()"
    if max(table.shape[-1 - coords.shape[-1] : -1]) > MAX_NODES_PER_AXIS:
        return f"table: the CUDA kernel takes axes up to {MAX_NODES_PER_AXIS}, got {table.shape}"
    if coords.shape[:-1].numel() > MAX_POINTS:
        return f"coords: the CUDA kernel takes up to {MAX_POINTS} points, got {coords.shape}; split"
    has_images = coords.dim() > 2 or table.dim() > coords.shape[-1] + 1
    images = coords.shape[0] if has_images else 1
    if reason := why_unsupported_launch("coords", images=images):
        return reason
    for name, tensor in {"table": table, "coords": coords, "out": out}.items():
        if tensor is None:
            continue
        if reason := why_unsupported_strides(name, tensor):
            return reason
        if name != "table" and as_points(tensor, tensor.dim() == 2) is None:
            return (
                f"{name}: axes after the first must fold into one, got strides {tensor.stride()}; "
                "pass a contiguous tensor"
            )
    return why_unsupported_dtype("table", table, KERNEL_DTYPES)


# On a CPU too. torch's sampler, with its layout turned to this one, took 0.6 times the time of the
# product for 784 points of GRAD's local table and 1.9 times for 8 x 784.
def _anywhere(table: Tensor, coords: Tensor, per_image: bool = False) -> Tensor:
    return reference.grid_interpolate(table, coords, per_image).contiguous()


def _anywhere_out(table: Tensor, coords: Tensor, per_image: bool, out: Tensor) -> None:
    out.copy_(reference.grid_interpolate(table, coords, per_image))


def _cuda(table: Tensor, coords: Tensor, per_image: bool = False) -> Tensor:
    out = table.new_empty(*coords.shape[:-1], table.shape[-1])
    _cuda_out(table, coords, per_image, out)
    return out


def _cuda_out(table: Tensor, coords: Tensor, per_image: bool, out: Tensor) -> None:
    require(why_unsupported(table, coords, out))
    # Imported by the first call that needs it: no machine without CUDA pays for triton.
    from fastad.ops.grid_interpolate import triton_impl

    form = choose_form(table, coords, per_image)
    triton_impl.grid_interpolate(table, coords, per_image, out, form)


def _fake(table: Tensor, coords: Tensor, per_image: bool = False) -> Tensor:
    return table.new_empty(*coords.shape[:-1], table.shape[-1])


def _fake_out(table: Tensor, coords: Tensor, per_image: bool, out: Tensor) -> None:
    return None


torch.library.impl(NAME, "CompositeExplicitAutograd")(_anywhere)
torch.library.impl(NAME_OUT, "CompositeExplicitAutograd")(_anywhere_out)
torch.library.impl(NAME, "CUDA")(_cuda)
torch.library.impl(NAME_OUT, "CUDA")(_cuda_out)
torch.library.register_fake(NAME)(_fake)
torch.library.register_fake(NAME_OUT)(_fake_out)
torch.library.register_autograd(NAME, refuse_gradient)
