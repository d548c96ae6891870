"""Argument checks of the operators, spelled in the shape letters of their docstrings."""

from __future__ import annotations

from torch import Tensor

from fastad.errors import InputError


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
