"""One batch size of a PyTorch graph: fixed buffers, and on a GPU a captured CUDA graph.

A captured graph replays kernels on the addresses it was captured with: so each batch size owns its
buffers, its stream and its lock. On a CPU the same code calls the module instead of replaying, so
that everything but capture, streams and pinned memory is tested on machines without a GPU. Capture
and replay: not yet run on hardware.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastad.engine.base import Outputs

Graph = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 [B, H, W, 3] to map and raw score

WARMUP_RUNS = 3  # compile kernels, choose algorithms, allocate workspaces: none may be captured
_CAPTURE = threading.Lock()  # one capture at a time in a process is torch's rule


@contextmanager
def exact_float32(benchmark: bool) -> Iterator[None]:
    """float32 products in float32, not in TF32; restores the process's settings afterwards.

    The settings belong to the process: other threads that launch float32 work meanwhile meet them.
    A captured graph keeps what held when it was captured.

    Args:
        benchmark: Also let cuDNN time its algorithms for each new shape.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    reduced = "allow_fp16_reduced_precision_reduction"
    settings: list[tuple[object, str, object]] = [(cudnn, "benchmark", benchmark)]
    settings.append((matmul, reduced, False))  # half-precision sums of long rows would overflow
    # torch has older and newer names for TF32 and refuses to read the older ones once the newer
    # were used: follow what this process uses.
    older: str | None = None
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        settings.append((matmul, "fp32_precision", "ieee"))
    try:
        _ = cudnn.allow_tf32
        settings.append((cudnn, "allow_tf32", False))
    except RuntimeError:
        settings += [(part, "fp32_precision", "ieee") for part in (cudnn.conv, cudnn.rnn)]
    before = [getattr(where, name) for where, name, _ in settings]
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for where, name, value in settings:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(settings, before, strict=True):
            setattr(where, name, value)
        if older is not None:
            torch.set_float32_matmul_precision(older)


class Slot:
    """Buffers, stream and graph for batches of up to ``bucket`` images. Thread-safe.

    Owns device memory for one batch and all activations between, and pinned host memory for input
    and outputs. Rows behind the batch keep whatever an earlier call left: images do not meet.

    Args:
        graph: On ``device``, in eval mode.
        bucket: Images per run.
        size: (H, W) of the images.
        device: Where the graph is.
    """

    def __init__(
        self, graph: Graph, bucket: int, size: tuple[int, int], device: torch.device
    ) -> None:
        self._graph = graph
        self._device = device
        self._lock = threading.Lock()
        on_gpu = device.type == "cuda"
        self._images = torch.zeros(bucket, *size, 3, dtype=torch.uint8, device=device)
        self._staged = torch.zeros(bucket, *size, 3, dtype=torch.uint8, pin_memory=on_gpu)
        self._outputs: tuple[Tensor, Tensor]
        self._stream: torch.cuda.Stream | None = None
        if on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: torch.cuda.CUDAGraph | None = None
        # Frames of other libraries, until the copy out of them is done: their own allocators do
        # not know this stream.
        self._borrowed: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        if self._stream is None:
            self._call()
        else:
            self._capture(self._stream)
        self._fetched = tuple(torch.empty_like(o, device="cpu") for o in self._outputs)
        if on_gpu:
            self._fetched = tuple(o.pin_memory() for o in self._fetched)

    def _call(self) -> None:
        with torch.inference_mode():
            anomaly_map, raw_score = self._graph(self._images)
        self._outputs = anomaly_map.contiguous(), raw_score.contiguous()

    def _capture(self, stream: torch.cuda.Stream) -> None:
        with _CAPTURE, torch.cuda.device(self._device), exact_float32(benchmark=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_RUNS):
                    self._call()
            stream.synchronize()
            captured = torch.cuda.CUDAGraph()
            # Errors of this thread only: others may allocate meanwhile.
            with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):
                self._call()
            self._captured = captured

    def _launch(self) -> None:
        if self._captured is None:
            self._call()
        else:
            self._captured.replay()

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Outputs of host images [n, H, W, 3], n up to the bucket; the arrays are the caller's."""
        n = len(images)
        with self._lock:
            self._staged[:n].numpy()[...] = images
            if self._stream is None:
                self._images[:n].copy_(self._staged[:n])
                self._launch()
                self._fetch(n)
            else:
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    self._images[:n].copy_(self._staged[:n], non_blocking=True)
                    self._launch()
                    self._fetch(n)
                self._stream.synchronize()
            anomaly_map, raw_score = (o[:n].numpy().copy() for o in self._fetched)
        return anomaly_map, raw_score

    def _fetch(self, n: int) -> None:
        for host, on_device in zip(self._fetched, self._outputs, strict=True):
            host[:n].copy_(on_device[:n], non_blocking=True)

    def run_device(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of images [n, H, W, 3] on the device, as new tensors there; the host waits for
        nothing, and what the caller's stream does next comes after.
        """
        n = len(images)
        with self._lock:
            if self._stream is None:
                self._images[:n].copy_(images)
                self._launch()
                return self._outputs[0][:n].clone(), self._outputs[1][:n].clone()
            with torch.cuda.device(self._device):
                caller = torch.cuda.current_stream()
                self._stream.wait_stream(caller)
                with torch.cuda.stream(self._stream):
                    self._images[:n].copy_(images)
                    self._borrow(images)
                    self._launch()
                    anomaly_map, raw_score = (o[:n].clone() for o in self._outputs)
                caller.wait_stream(self._stream)
                for tensor in (anomaly_map, raw_score):  # made on one stream, used on another
                    tensor.record_stream(caller)
            return anomaly_map, raw_score

    def _borrow(self, images: Tensor) -> None:
        while self._borrowed and self._borrowed[0][0].query():  # type: ignore[no-untyped-call]
            self._borrowed.popleft()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._borrowed.append((event, images))
