"""What a runtime is: it runs a graph on uint8 images and knows no method."""

from __future__ import annotations

import os
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]  # map [B, H, W], raw score [B]


class Runtime(Protocol):
    """One loaded graph on one device; safe to call from several threads."""

    name: str
    precision: Precision

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Anomaly map float32 [B, H, W] and raw score float32 [B] of uint8 RGB [B, H, W, 3].

        The arrays returned belong to the caller.
        """

    def close(self) -> None:
        """Free what the runtime holds; further calls are errors."""


def core_count() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
