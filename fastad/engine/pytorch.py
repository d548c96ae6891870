"""PyTorch as a runtime: the only bridge from running to torch. Checkpoints are judged with it.

`PyTorchRuntime` is the reference of every parity report. `PyTorchEngineRuntime` runs the weights
inside an engine file on an NVIDIA GPU without TensorRT: folded normalisation, half precision
between float32 islands, the Triton operators, one CUDA graph per batch size.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastad.engine.base import Outputs, Precision
from fastad.engine.cuda import check_images, device_index, split
from fastad.engine.cuda_graph import Slot
from fastad.engine.device_frames import as_frames
from fastad.engine.pytorch_graph import deploy
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.models.deployed import DeployedGraph
from fastad.models.registry import Method, rebuild
from fastad.ops.postprocess import postprocess
from fastad.ops.preprocess import preprocess
from fastad.spec import Manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_CAPABILITY = (7, 0)  # the first with the matrix units that Triton's products need


class PyTorchRuntime:
    """The method itself in float32 on the CPU: the reference of every parity report.

    Args:
        method: A trained method; it is put into eval mode.
    """

    name = "pytorch"

    def __init__(self, method: Method) -> None:
        self.precision: Precision = "fp32"
        self._graph: DeployedGraph | None = DeployedGraph(method).eval()

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch; see `fastad.engine.base.Runtime`."""
        graph = self._graph
        if graph is None:
            raise EngineError("pytorch: the runtime is closed; load the checkpoint again")
        # Golden images are read-only, which torch cannot express.
        writable = np.require(images, requirements=["C", "W"])
        with torch.inference_mode():
            anomaly_map, raw_score = graph(torch.from_numpy(writable))
        return anomaly_map.numpy(), raw_score.numpy()

    def close(self) -> None:
        """Drop the method."""
        self._graph = None


def weights_member(method: Method) -> bytes:
    """The ``weights.safetensors`` member of an engine file: all tensors of a trained method.

    As trained, in float32 and unfolded; equal methods give equal bytes. Together with the
    manifest's ``spec`` they rebuild the method bit for bit.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
    return save(state)


def method_of(manifest: Manifest, weights: bytes) -> Method:
    """The trained method of an engine file, in eval mode, on the CPU.

    Raises:
        EngineError: ``weights`` is damaged, or does not fit the manifest's settings.
    """
    try:
        state = load(weights)
    except SafetensorError as error:
        raise EngineError(f"weights.safetensors: damaged ({error}); export again") from error
    try:
        return rebuild(manifest.spec, state, "weights.safetensors")
    except InputError as error:
        raise EngineError(f"{error}; export again") from error


def why_unsupported(precision: Precision, device: str) -> str | None:
    """Why this machine cannot run ``precision`` on ``device``, or None if it can."""
    label = f"pytorch {precision} on {device}"
    if precision not in DTYPES:
        return f"{label}: no integer kernels here; use fp16 or bf16, or runtime='tensorrt'"
    index = device_index(device)
    if index is None:
        # Most CPUs compute float16 by way of float32, slower than float32 itself.
        return f"{label}: CPUs run fp32 and bf16 here" if precision == "fp16" else None
    if torch.version.cuda is None:
        return f"{label}: this torch is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"{label}: torch sees no NVIDIA GPU; check `nvidia-smi` and the driver's version"
    if index >= torch.cuda.device_count():
        return f"{label}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0"
    if find_spec("triton") is None:
        return f"{label}: triton is not installed; pip install 'fastad[gpu]'"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY or (precision == "bf16" and capability < (8, 0)):
        needed = (8, 0) if precision == "bf16" else MIN_CAPABILITY
        return (
            f"{label}: the GPU has capability {capability[0]}.{capability[1]}, "
            f"{needed[0]}.{needed[1]} is needed"
        )
    return None


@dataclass(frozen=True, eq=False)
class DeviceOutputs:
    """What `PyTorchEngineRuntime.run_device` returns: tensors on the runtime's device."""

    anomaly_map: Tensor  # [B, H, W] float32, at the size of the frames
    raw_score: Tensor  # [B] float32
    pred_mask: Tensor | None  # [B, H, W] bool, None without a threshold


class PyTorchEngineRuntime:
    """An engine's weights on one GPU or CPU; its `run` may be called from several threads.

    Owns the weights on the device and, for each batch size of `fastad.engine.cuda.BUCKETS` once it
    is used, fixed buffers and a captured CUDA graph; `close` drops them. Batches are padded up to
    the next of these sizes, on the CPU too, where no graph is captured. The first use of a size
    compiles kernels and takes seconds. On CUDA: not yet run on hardware.

    Args:
        manifest: Of the engine file.
        weights: Its member ``weights.safetensors``, which `weights_member` made.
        precision: Of convolutions and linear layers, ``fp32``, ``bf16`` or ``fp16``. Normalisation,
            softmax, distances and the map head run in float32 always; TF32 is never used.
        device: ``cuda``, ``cuda:N`` or ``cpu``.
        threads: Of a CPU; torch has one count for the whole process, and this sets it. None leaves
            it as it is.

    Raises:
        InputError: ``device`` is no device name.
        UnsupportedError: this machine cannot run the precision; the message says why.
        EngineError: the weights are damaged or fit another method, or the graph does not run.
    """

    name = "pytorch"

    def __init__(
        self,
        manifest: Manifest,
        weights: bytes,
        precision: Precision,
        device: str = "cuda",
        threads: int | None = None,
    ) -> None:
        if reason := why_unsupported(precision, device):
            raise UnsupportedError(reason)
        self.precision: Precision = precision
        index = device_index(device)
        self.device = torch.device("cpu") if index is None else torch.device("cuda", index)
        if threads is not None and index is None:
            torch.set_num_threads(threads)
        self.size = manifest.spec.input.size
        graph = deploy(method_of(manifest, weights), DTYPES[precision])
        self._graph: DeployedGraph | None = graph.to(self.device)
        self._slots: dict[int, Slot] = {}
        self._building = threading.Lock()
        self._slot(graph, 1)  # what cannot run fails here and not with the first image

    def _slot(self, graph: DeployedGraph, bucket: int) -> Slot:
        found = self._slots.get(bucket)
        if found is None:
            with self._building:
                self._opened()  # it may have been closed meanwhile
                found = self._slots.get(bucket)
                if found is None:
                    try:
                        found = Slot(graph, bucket, self.size, self.device)
                    except RuntimeError as error:  # out of memory is one
                        raise EngineError(
                            f"pytorch: {self.precision} on {self.device} fails for batches of "
                            f"{bucket}: {error}"
                        ) from error
                    self._slots[bucket] = found
        return found

    def _opened(self) -> DeployedGraph:
        if self._graph is None:
            raise EngineError("pytorch: the runtime is closed; load the engine again")
        return self._graph

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch from host memory; see `fastad.engine.base.Runtime`."""
        graph = self._opened()
        check_images("pytorch", images, self.size)
        maps = np.empty((len(images), *self.size), np.float32)
        scores = np.empty(len(images), np.float32)
        for start, stop, bucket in split(len(images)):
            slot = self._slot(graph, bucket)
            try:
                found = slot.run(images[start:stop])
            except RuntimeError as error:  # CUDA errors among them
                raise EngineError(f"pytorch: run failed: {error}") from error
            if stop - start == len(images):
                return found
            maps[start:stop], scores[start:stop] = found
        return maps, scores

    def run_device(
        self, frames: object, *, threshold: float | None = None, swap_red_blue: bool = False
    ) -> DeviceOutputs:
        """Run frames that are on the device, at any size, without a copy to the host.

        Resized by `fastad.ops.preprocess`, the map back by `fastad.ops.postprocess`. Returns before
        the GPU is done; torch's current stream waits for the results by itself.

        Args:
            frames: uint8 [B, H, W, 3], a torch tensor or anything with ``__dlpack__`` or
                ``__cuda_array_interface__``, on this runtime's device.
            threshold: In units of the map; None makes no mask.
            swap_red_blue: The frames are BGR.

        Raises:
            InputError: frames on another device, of another dtype or shape, or a threshold that is
                not finite.
            EngineError: the device failed, or the runtime is closed.
        """
        graph = self._opened()
        tensor = as_frames(frames, self.device)
        H, W = tensor.shape[1:3]
        try:
            with torch.inference_mode():
                images = tensor
                if self.size != (H, W) or swap_red_blue:
                    images = preprocess(tensor, self.size, swap_red_blue=swap_red_blue)
                parts = [
                    self._slot(graph, bucket).run_device(images[start:stop])
                    for start, stop, bucket in split(len(images))
                ]
                maps = torch.cat([part[0] for part in parts])
                scores = torch.cat([part[1] for part in parts])
                resized, mask = postprocess(maps, (H, W), threshold)
        except RuntimeError as error:
            raise EngineError(f"pytorch: run failed: {error}") from error
        return DeviceOutputs(resized, scores, mask)

    def close(self) -> None:
        """Drop graphs, buffers and weights; a call in flight keeps what it is using to its end."""
        with self._building:
            self._graph = None
            self._slots = {}
