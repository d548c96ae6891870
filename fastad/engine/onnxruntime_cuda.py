"""ONNX Runtime on NVIDIA GPUs: the graph of an engine file without PyTorch or TensorRT.

Fixed device buffers and one CUDA graph per batch size, as its documentation asks for: IOBinding,
addresses and shapes that never change, every node on the GPU. Session and launch: not yet run on
hardware; options, buffers and refusals are tested everywhere.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Precision
from fastad.engine.cuda import DLPACK_CUDA, check_images, device_index, split, why_absent
from fastad.errors import EngineError, FastadWarning, InputError, UnsupportedError

PROVIDER = "CUDAExecutionProvider"
OUTPUTS = ("anomaly_map", "raw_score")
NO_GRAPH = "-1"  # the gpu_graph_id that runs without capture


def why_unsupported(precision: Precision, device: str) -> str | None:
    """Why this machine cannot run ``precision`` on ``device``, or None if it can."""
    label = f"onnxruntime {precision} on {device}"
    if device_index(device) is None:
        return f"{label}: this is the runtime of NVIDIA GPUs; use runtime='onnxruntime'"
    if precision not in ("fp32", "fp16"):
        kernels = "bfloat16 convolutions" if precision == "bf16" else "int8 convolutions"
        return f"{label}: its CUDA provider has no {kernels}; use fp32 or fp16"
    if reason := why_absent(label, ("onnxruntime",), "gpu", device):
        return reason
    import onnxruntime as ort

    if PROVIDER not in ort.get_available_providers():
        return (
            f"{label}: this onnxruntime is built without CUDA; uninstall it and "
            "pip install 'fastad[gpu]'"
        )
    return None


def provider_options(index: int, *, cuda_graph: bool) -> dict[str, str]:
    """Options of the CUDA provider for GPU ``index``.

    TF32 is off, in every precision: a float32 graph then means float32, and the float32 parts of a
    half-precision graph (distances, map head) keep their digits. Convolution algorithms are timed
    when a batch size is first used.
    """
    return {
        "device_id": str(index),
        "use_tf32": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "enable_cuda_graph": "1" if cuda_graph else "0",
    }


@dataclass(frozen=True)
class Buffer:
    """One fixed device buffer of a batch size."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.uint8] | type[np.float32]


def plan_buffers(bucket: int, size: tuple[int, int]) -> tuple[Buffer, Buffer, Buffer]:
    """Input, map and score of a batch size, for images of (H, W) pixels."""
    return (
        Buffer("image", (bucket, *size, 3), np.uint8),
        Buffer("anomaly_map", (bucket, *size), np.float32),
        Buffer("raw_score", (bucket,), np.float32),
    )


def graph_size(shape: list[Any]) -> tuple[int, int]:
    """(H, W) of a graph whose input ``image`` has this shape.

    Raises:
        EngineError: it is not [B, H, W, 3] with a free batch and fixed H and W.
    """
    if len(shape) == 4 and not isinstance(shape[0], int) and shape[3] == 3:
        H, W = shape[1:3]
        if isinstance(H, int) and isinstance(W, int):
            return H, W
    raise EngineError(
        f"onnxruntime: expected a graph with input image [B, H, W, 3] and a free batch, got {shape}"
    )


@dataclass(frozen=True)
class _Slot:
    """What one batch size owns: device buffers bound to the session, and host memory to fill."""

    binding: Any
    image: Any
    outputs: tuple[Any, Any]
    staged: NDArray[np.uint8]
    options: Any


class ONNXRuntimeCUDA:
    """An inference session on one GPU. Calls of several threads take turns: a captured graph and
    its buffers serve one at a time.

    Owns the session, and buffers of each batch size of `fastad.engine.cuda.BUCKETS` once it is
    used; `close` drops them. The first use of a size captures its graph and takes seconds.

    Args:
        graph: ONNX bytes with input ``image`` and outputs ``anomaly_map``, ``raw_score``; for fp16
            one whose products are float16 already.
        precision: ``fp32`` or ``fp16``; TF32 is never used.
        device: ``cuda`` or ``cuda:N``.

    Raises:
        InputError: ``device`` is no device name.
        UnsupportedError: this machine cannot run it; the message says why.
        EngineError: ONNX Runtime refuses the graph, or would have run it on the CPU.
    """

    name = "onnxruntime"

    def __init__(self, graph: bytes, precision: Precision, device: str = "cuda") -> None:
        if reason := why_unsupported(precision, device):
            raise UnsupportedError(reason)
        index = device_index(device)
        assert index is not None  # refused above
        self.precision: Precision = precision
        self._index = index
        self._session: Any = self._open(graph)
        self.size = graph_size(self._session.get_inputs()[0].shape)
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.Lock()

    def _open(self, graph: bytes) -> Any:
        """A session that captures graphs, or if a node stays on the CPU one that does not."""
        try:
            return self._session_with(graph, cuda_graph=True)
        except Exception as captured:  # its exception classes live in a private module
            try:
                session = self._session_with(graph, cuda_graph=False)
            except Exception as error:  # one of the same private classes
                raise EngineError(f"onnxruntime: refuses the graph: {error}") from error
            warnings.warn(
                f"onnxruntime: runs without a CUDA graph, each kernel is launched by itself: "
                f"{captured}",
                FastadWarning,
                stacklevel=3,
            )
            return session

    def _session_with(self, graph: bytes, *, cuda_graph: bool) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider = (PROVIDER, provider_options(self._index, cuda_graph=cuda_graph))
        session = ort.InferenceSession(graph, options, providers=[provider])
        session.disable_fallback()
        if session.get_providers()[0] != PROVIDER:  # its libraries did not load
            raise EngineError(
                f"{PROVIDER} could not be started and ONNX Runtime took "
                f"{session.get_providers()[0]}; its CUDA and cuDNN libraries must match"
            )
        return session

    def _slot(self, session: Any, bucket: int) -> _Slot:
        if bucket not in self._slots:
            import onnxruntime as ort

            image, *outputs = (
                ort.OrtValue.ortvalue_from_shape_and_type(b.shape, b.dtype, "cuda", self._index)
                for b in plan_buffers(bucket, self.size)
            )
            binding = session.io_binding()
            binding.bind_ortvalue_input("image", image)
            for name, value in zip(OUTPUTS, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(bucket))
            staged = np.zeros((bucket, *self.size, 3), np.uint8)
            image.update_inplace(staged)
            self._slots[bucket] = _Slot(binding, image, (outputs[0], outputs[1]), staged, options)
        return self._slots[bucket]

    def _opened(self) -> Any:
        if self._session is None:
            raise EngineError("onnxruntime: the runtime is closed; load the engine again")
        return self._session

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch from host memory; see `fastad.engine.base.Runtime`."""
        check_images("onnxruntime", images, self.size)
        maps = np.empty((len(images), *self.size), np.float32)
        scores = np.empty(len(images), np.float32)
        with self._lock:
            session = self._opened()
            try:
                for start, stop, bucket in split(len(images)):
                    slot = self._slot(session, bucket)
                    slot.staged[: stop - start] = images[start:stop]
                    slot.image.update_inplace(slot.staged)
                    session.run_with_iobinding(slot.binding, slot.options)
                    slot.binding.synchronize_outputs()
                    maps[start:stop] = slot.outputs[0].numpy()[: stop - start]
                    scores[start:stop] = slot.outputs[1].numpy()[: stop - start]
            except Exception as error:  # its exception classes live in a private module
                raise EngineError(f"onnxruntime: run failed: {error}") from error
        return maps, scores

    def run_device(self, frames: Any) -> tuple[Any, Any]:
        """Run frames that are on this GPU, without a copy to the host and without a CUDA graph.

        Args:
            frames: uint8 [B, H, W, 3] RGB at model size, anything with ``__dlpack__``. They are
                read in place, so keep them until this returns; it waits for the GPU.

        Returns:
            Map [B, H, W] and raw score [B], float32 ``OrtValue`` on the GPU, which have
            ``__dlpack__`` too.

        Raises:
            InputError: frames elsewhere, or of another dtype or shape.
            EngineError: the device failed, or the runtime is closed.
        """
        session = self._opened()
        check_frames(frames, self.size, self._index)
        import onnxruntime as ort

        try:
            image = ort.OrtValue.from_dlpack(frames)
            outputs = [
                ort.OrtValue.ortvalue_from_shape_and_type(b.shape, b.dtype, "cuda", self._index)
                for b in plan_buffers(image.shape()[0], self.size)[1:]
            ]
            binding = session.io_binding()
            binding.bind_ortvalue_input("image", image)
            for name, value in zip(OUTPUTS, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", NO_GRAPH)
            with self._lock:
                binding.synchronize_inputs()  # the producer's work was ordered before this stream
                session.run_with_iobinding(binding, options)
                binding.synchronize_outputs()
        except Exception as error:  # its exception classes live in a private module
            raise EngineError(f"onnxruntime: run failed: {error}") from error
        return outputs[0], outputs[1]

    def close(self) -> None:
        """Drop buffers and session; a call in flight finishes first."""
        with self._lock:
            self._slots = {}
            self._session = None


def check_frames(frames: Any, size: tuple[int, int], index: int) -> None:
    """Refuse frames that would have to be moved, resized or cast.

    Raises:
        InputError: no DLPack, another device, dtype, shape or layout.
    """
    if not hasattr(frames, "__dlpack__"):
        raise InputError(
            f"frames: expected an object with __dlpack__, got {type(frames).__name__}; use run() "
            "for host arrays"
        )
    kind, at = (int(number) for number in frames.__dlpack_device__())
    if (kind, at) != (DLPACK_CUDA, index):
        raise InputError(
            f"frames: expected them on cuda:{index}, got DLPack device {kind}, number {at}; move "
            "them there, or use run() for host arrays"
        )
    shape, dtype = tuple(getattr(frames, "shape", ())), str(getattr(frames, "dtype", "unknown"))
    if dtype.removeprefix("torch.") != "uint8" or shape[1:] != (*size, 3) or 0 in shape:
        raise InputError(
            f"frames: expected uint8 [B, {size[0]}, {size[1]}, 3], got {dtype} {list(shape)}; this "
            "runtime does not resize on the GPU, runtime='pytorch' does"
        )
