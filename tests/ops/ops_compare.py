"""One kernel against its float64 reference, between guard values, on any device."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from fastad.ops.case import Arguments, Case

GUARD = 64  # elements before and behind every buffer
POISON_BYTE = 77


def find_case(op: str, name: str) -> tuple[Any, Case]:
    """The cases module and one of its cases."""
    cases = importlib.import_module(f"fastad.ops.{op}.cases")
    return cases, next(c for c in cases.CASES if c.name == name)


def compare(op: str, name: str, dtype_name: str, device: str = "cpu") -> None:
    """Run the kernel between guards and assert everything it promises."""
    cases, case = find_case(op, name)
    dtype: torch.dtype = getattr(torch, dtype_name)
    arguments = {k: move(v, device) for k, v in case.make(dtype).items()}
    expected = as_tuple(judge(cases, arguments))
    outputs = [Guarded.like(t) for t in as_tuple(cases.empty(arguments))]
    inputs = {k: guard_inputs(v) for k, v in arguments.items()}
    buffers = tuple(output.tensor for output in outputs)
    cases.kernel(out=buffers if len(buffers) > 1 else buffers[0], **inputs)
    rtol, atol = cases.TOLERANCE[dtype]
    for output, truth in zip(outputs, expected, strict=True):
        output.check_surroundings()
        exact = not output.tensor.is_floating_point()
        torch.testing.assert_close(
            output.tensor.double(),
            truth.double(),
            rtol=0.0 if exact else rtol,
            atol=0.0 if exact else atol,
        )


def judge(cases: Any, arguments: Arguments) -> Any:
    """The reference on the same numbers in float64."""
    known = inspect.signature(cases.judge).parameters
    return cases.judge(**{k: widen(v) for k, v in arguments.items() if k in known})


def widen(value: Any) -> Any:
    if isinstance(value, list):
        return [widen(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def move(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [move(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def guard_inputs(value: Any) -> Any:
    """Copies of tensors with the same strides, surrounded by what must not be read."""
    if isinstance(value, list):
        return [guard_inputs(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    guarded = Guarded.like(value)
    guarded.tensor.copy_(value)
    return guarded.tensor


class Guarded:
    """A tensor inside a poisoned buffer: NaN, or a telling byte."""

    def __init__(self, buffer: Tensor, tensor: Tensor) -> None:
        self.buffer = buffer
        self.tensor = tensor

    @classmethod
    def like(cls, t: Tensor) -> Guarded:
        extent = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        size = (extent if t.numel() else 0) + 2 * GUARD
        if t.is_floating_point():
            buffer = torch.full((size,), float("nan"), dtype=t.dtype, device=t.device)
        else:
            raw = torch.full((size * t.element_size(),), POISON_BYTE, dtype=torch.uint8)
            buffer = raw.to(t.device).view(t.dtype)
        return cls(buffer, buffer.as_strided(t.shape, t.stride(), GUARD))

    def check_surroundings(self) -> None:
        """Nothing but the tensor's own elements was written."""
        own = torch.zeros(self.buffer.shape, dtype=torch.bool, device=self.buffer.device)
        own.as_strided(self.tensor.shape, self.tensor.stride(), GUARD).fill_(True)
        if self.buffer.is_floating_point():
            untouched = self.buffer[~own].isnan()
        else:  # bytes, because a copy of a bool turns every byte but 0 into 1
            untouched = self.buffer.view(torch.uint8)[~own] == POISON_BYTE
        assert untouched.all(), "written outside of the output"
