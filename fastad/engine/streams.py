"""Throughput on a CPU: each image by itself on one core, several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs
from fastad.errors import EngineError

Run = Callable[[NDArray[np.uint8]], Outputs]


class Streams:
    """Runs the images of a batch one by one, at most ``count`` at once over all callers.

    Cores that work on images of their own need not wait for each other after every layer, as they
    do when they share one. Owns ``count`` threads until `close`.

    Args:
        count: Images at once.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.BoundedSemaphore(count)
        self._threads = ThreadPoolExecutor(count, "fastad stream of the runtime")
        self._submitting = threading.Lock()  # all images of a batch, or none of a closed runtime
        self._closing = threading.Lock()  # two that close would each wait for what the other took

    def run(self, run: Run, images: NDArray[np.uint8]) -> Outputs:
        """As `fastad.engine.base.Runtime.run`; one image stays on the caller's thread.

        Args:
            run: Of the runtime, safe to call from ``count`` threads; it takes [1, H, W, 3]. Kept
                here it would hold the runtime that holds this, until the collector comes by.
            images: uint8 [B, H, W, 3].

        Raises:
            EngineError: a run fails, or the runtime is closed.
        """
        if len(images) == 1:
            return self._one(run, images)
        parts = [images[i : i + 1] for i in range(len(images))]
        try:
            with self._submitting:
                found = self._threads.map(partial(self._one, run), parts)
        except RuntimeError as error:  # its threads have ended
            raise EngineError("the runtime is closed; load the engine again") from error
        maps, scores = zip(*found, strict=True)
        return np.concatenate(maps), np.concatenate(scores)

    def _one(self, run: Run, image: NDArray[np.uint8]) -> Outputs:
        with self._free:
            return run(image)

    def close(self) -> None:
        """End the threads; a call in flight finishes first."""
        with self._submitting:
            self._threads.shutdown(wait=False)
        self._threads.shutdown()
        with self._closing:
            for _ in range(self._count):  # those of single images, on threads of their callers
                self._free.acquire()
            for _ in range(self._count):
                self._free.release()
