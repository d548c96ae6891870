"""What one operator tells its tests, its ahead-of-time checks and its benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = dict[str, Any]  # of the operator's reference, by name


@dataclass(frozen=True)
class Case:
    """One set of arguments.

    Attributes:
        name: Test id.
        make: Arguments for a dtype: tensors on the CPU from a fixed seed, and plain settings.
        interpreted: Small enough for the interpreter; the rest waits for a GPU.
    """

    name: str
    make: Callable[[torch.dtype], Arguments]
    interpreted: bool = True


@dataclass(frozen=True)
class Aot:
    """One variant to compile ahead of time.

    Attributes:
        name: Test id.
        kernel: Name in the operator's ``triton_impl``.
        types: Triton type of every run-time argument, in order: ``"*fp16"``, ``"i32"``.
        constants: Compile-time arguments, and run-time ones fixed to a value.
        num_warps: Of the launch.
        max_registers: Ceiling per thread: what triton 3.6 or 3.9 needs on any architecture, rounded
            up.
        unaligned: Arguments that are no multiple of 16.
    """

    name: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 128
    unaligned: frozenset[str] = field(default_factory=frozenset)


def seeded(name: str) -> torch.Generator:
    """A CPU generator whose seed is the case's name."""
    return torch.Generator().manual_seed(int.from_bytes(name.encode()[:7], "little"))
