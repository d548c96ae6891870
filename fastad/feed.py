"""Frames into a runtime: input buffers that are used again, and turns at the graph."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Runtime, concurrency
from fastad.preprocess import Frame, to_batch


@dataclass(frozen=True, eq=False)
class Fed:
    """One run of the graph. The arrays belong to whoever asked."""

    anomaly_map: NDArray[np.float32]  # [B, H, W] at model size
    raw_score: NDArray[np.float32]  # [B]
    preprocess_s: float
    waited_s: float  # for a turn
    inference_s: float


class Feed:
    """Resizes frames and runs them, for several threads: one resizes while another runs.

    The graph is entered by as many threads as keep it busy; the others wait for a turn. Owns as
    many input buffers as there ever were threads at once, of the largest batch that each met.
    """

    def __init__(self, runtime: Runtime, size: tuple[int, int]) -> None:
        self.runtime = runtime
        self.size = size  # (H, W) of the model
        self.turns = concurrency(runtime)
        # A lock where it serves: Ctrl-C within a semaphore's acquire, which is Python, would lose
        # the turn for ever.
        self._turn: AbstractContextManager[object] = (
            threading.Lock() if self.turns == 1 else threading.BoundedSemaphore(self.turns)
        )
        self._buffers: deque[NDArray[np.uint8]] = deque()  # its append and pop are atomic

    def run(self, frames: list[Frame]) -> Fed:
        """One batch of frames of any sizes; what the runtime raises comes out as it is."""
        began = time.perf_counter()
        buffer = self._buffer(len(frames))
        try:
            batch = to_batch(frames, self.size, buffer[: len(frames)])
            prepared = time.perf_counter()
            with self._turn:
                entered = time.perf_counter()
                anomaly_map, raw_score = self.runtime.run(batch)
                left = time.perf_counter()
        finally:
            self._buffers.append(buffer)
        return Fed(anomaly_map, raw_score, prepared - began, entered - prepared, left - entered)

    def _buffer(self, images: int) -> NDArray[np.uint8]:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = np.empty((0, *self.size, 3), np.uint8)
        return buffer if len(buffer) >= images else np.empty((images, *self.size, 3), np.uint8)
