"""A runtime that a test can hold: it answers with means, and runs only when it is let."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Precision

LONG_S = 60.0  # a test that waits so long has failed


class GatedRuntime:
    """Counts what runs; after `hold` each run waits for its `let`."""

    name = "gated"
    precision: Precision = "fp32"

    def __init__(self, concurrency: int = 1) -> None:
        self.concurrency = concurrency
        self.begun = self.done = self.inside = self.most_inside = 0
        self.buffers: set[int] = set()  # addresses of the inputs
        self.fails_at: dict[int, Exception] = {}  # number of a run: what it raises
        self.closed = False
        self._lock = threading.Lock()
        self._gate: threading.Semaphore | None = None

    def hold(self) -> None:
        """From now on a run waits."""
        self._gate = threading.Semaphore(0)

    def let(self, runs: int) -> None:
        """Let that many runs through."""
        assert self._gate
        self._gate.release(runs)

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        with self._lock:
            number, self.begun = self.begun, self.begun + 1
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self.buffers.add(images.ctypes.data)
        try:
            assert self._gate is None or self._gate.acquire(timeout=LONG_S)
            assert not self.closed
            if number in self.fails_at:
                raise self.fails_at[number]
            maps = images.mean(axis=3, dtype=np.float32)
            return maps, maps.mean(axis=(1, 2))
        finally:
            with self._lock:
                self.inside -= 1
                self.done += 1

    def close(self) -> None:
        self.closed = True


def comes_true(condition: Callable[[], bool]) -> bool:
    """Wait for what another thread does."""
    deadline = time.monotonic() + LONG_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def threads_named(beginning: str) -> list[str]:
    """Live threads by the beginning of their name."""
    return [each.name for each in threading.enumerate() if each.name.startswith(beginning)]
