"""What a runtime is: it runs a graph on uint8 images and knows no method."""

from __future__ import annotations

import os
from typing import Literal, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray

from fastad.errors import InputError

# ``int8-bf16`` runs an int8 graph with bfloat16 where ``int8`` has float32.
Precision = Literal["fp32", "bf16", "fp16", "int8", "int8-bf16"]
Mode = Literal["latency", "throughput"]
Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]  # map [B, H, W], raw score [B]


class Runtime(Protocol):
    """One loaded graph on one device; safe to call from several threads."""

    name: str
    precision: Precision

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Anomaly map float32 [B, H, W] and raw score float32 [B] of uint8 RGB [B, H, W, 3].

        The arrays returned belong to the caller, and ``images`` again when it returns.
        """

    def close(self) -> None:
        """Free what the runtime holds; further calls are errors."""


def concurrency(runtime: Runtime) -> int:
    """How many runs at once keep a runtime busy: its ``concurrency``, or 1 if it names none."""
    return int(getattr(runtime, "concurrency", 1))


def rest_of(precision: str) -> str:
    """What layers run in that int8 leaves alone.

    >>> rest_of("int8-bf16")
    'bfloat16'
    """
    return "bfloat16" if precision == "int8-bf16" else "float32"


def check_mode(mode: str) -> Mode:
    """The name, if it is one.

    Raises:
        InputError: it is neither ``latency`` nor ``throughput``.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode: expected {' or '.join(get_args(Mode))}, got {mode!r}")
    return cast(Mode, mode)


def check_threads(threads: object) -> int | None:
    """A count of cores, or None for all.

    Raises:
        InputError: it is no whole number of at least 1.
    """
    if threads is None:
        return None
    if isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1:
        return threads
    raise InputError(f"threads: expected a whole number of at least 1, got {threads!r}")


def core_count() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
