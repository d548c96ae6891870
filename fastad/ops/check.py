"""Argument checks of the operators, and the rule for when a kernel stands for its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastad.errors import InputError, UnsupportedError

INT32_MAX = 2**31 - 1
MAX_PROGRAMS = 65535  # on the second and third axis of a CUDA launch


def check_rank(name: str, tensor: Tensor, letters: str) -> None:
    """Refuse a tensor whose number of dimensions differs from the letters given.

    Raises:
        InputError: another rank; the message shows the expected letters and the shape.
    """
    expected = letters.split()
    if tensor.dim() != len(expected):
        raise InputError(
            f"{name}: expected [{', '.join(expected)}], got {tensor.dim()} dimensions "
            f"{list(tensor.shape)}"
        )


def check_like(name: str, tensor: Tensor, other: Tensor, *, shape: bool = True) -> None:
    """Refuse a tensor that differs from another in dtype, device or (if asked) shape.

    Raises:
        InputError: names the first difference.
    """
    for what in ("dtype", "device") + (("shape",) if shape else ()):
        if getattr(tensor, what) != getattr(other, what):
            raise InputError(
                f"{name}: expected {what} {getattr(other, what)}, got {getattr(tensor, what)}"
            )


def runs_registered(*tensors: Tensor) -> bool:
    """Whether a call goes to the registered operator, or to its reference in standard operations.

    Training needs the reference's gradient, and an exported graph its standard operations.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def require(reason: str | None) -> None:
    """Turn a kernel's ``why_unsupported`` into the refusal itself.

    Raises:
        UnsupportedError: there is a reason.
    """
    if reason is not None:
        raise UnsupportedError(reason)


def refuse_gradient(context: object, *gradients: Tensor) -> None:
    """Backward of the registered operators: kernels have none, the public functions do.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "registered operators are for inference; call the function of the same name in fastad.ops, "
        "which takes its differentiable reference when a gradient is needed"
    )


def why_unsupported_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """A dtype that the kernel has no form for, in a sentence."""
    if tensor.dtype in dtypes:
        return None
    known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return f"{name}: the CUDA kernel takes {known}, got {tensor.dtype}; cast it, or use reference"


def why_unsupported_strides(name: str, tensor: Tensor) -> str | None:
    """Strides beyond int32, the only scalars that every launcher can pass, in a sentence."""
    if max(tensor.stride(), default=0) <= INT32_MAX:
        return None
    return f"{name}: strides {tensor.stride()} exceed {INT32_MAX} elements; split the batch"


def why_unsupported_launch(name: str, **counts: int) -> str | None:
    """Images or rows that exceed the limited axes of a launch, in a sentence."""
    for what, count in counts.items():
        if count > MAX_PROGRAMS:
            return (
                f"{name}: the CUDA kernel takes up to {MAX_PROGRAMS} {what}, got {count}; split "
                "the batch, or use reference"
            )
    return None
