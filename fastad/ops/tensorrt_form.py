"""What the operators' TensorRT plugins share. Importing it imports tensorrt. Not yet run on a GPU.

A plugin here is described to TensorRT when a plan is built: `register` gives output shapes,
`autotune` the tactics, `aot_impl` the PTX, the launch and the int32 scalars. The plan keeps the PTX
and runs without Python, triton or this package.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# tensorrt.plugin has no types; no `from __future__ import annotations`: it reads them as types.

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import tensorrt as trt
import tensorrt.plugin as trtp

from fastad.ops.aot import Compiled

NAMESPACE = "fastad"
ELEMENTS = {  # of a TensorRT type: Triton's name, autotune's name, bytes
    trt.float32: ("fp32", "FP32", 4),
    trt.float16: ("fp16", "FP16", 2),
    trt.bfloat16: ("bf16", "BF16", 2),
}
Answer = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]

F = TypeVar("F", bound=Callable[..., Any])
_failures: list[Exception] = []


def recorded(function: F) -> F:
    """Keep what a callback raises: TensorRT prints it and reports no more than a failed build."""

    @wraps(function)
    def keep(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:  # of any kind: it is raised again
            _failures.append(error)
            raise

    return keep  # type: ignore[return-value]  # the same signature, which `wraps` cannot say


def take_failure() -> Exception | None:
    """The first exception of a callback since the last call, or None."""
    first = _failures[0] if _failures else None
    _failures.clear()
    return first


def combinations(dtypes: list[Any], tactics: list[int]) -> list[trtp.AutoTuneCombination]:
    """Every tensor in the network's own type and linear layout, timed over ``tactics``."""
    types = ", ".join(ELEMENTS[dtype][1] for dtype in dtypes)
    return [trtp.AutoTuneCombination(types, "LINEAR", tactics)]


def multiples_of_16(divisors: Mapping[str, int]) -> list[str]:
    """Scalars that stay multiples of 16 in every launch, given a divisor of each."""
    return [name for name, divisor in divisors.items() if divisor % 16 == 0]


def answer(compiled: Compiled, grid: tuple[Any, Any, Any], scalars: Mapping[str, Any]) -> Answer:
    """What ``aot_impl`` returns; ``grid`` and ``scalars`` are ints or symbolic expressions."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = grid
    launch.block_x = compiled.block
    launch.shared_mem = compiled.shared_bytes
    # Other classes than SymInt32 are refused, also the plain SymIntExpr of SymIntExprs.from_tuple.
    extra = trtp.SymIntExprs(len(scalars))
    for i, value in enumerate(scalars.values()):
        extra[i] = trtp.SymInt32(value)
    return compiled.name, compiled.ptx, launch, extra
