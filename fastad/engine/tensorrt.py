"""TensorRT plans on an NVIDIA GPU: bound buffers, one CUDA graph per batch size.

Not yet run on hardware: written against TensorRT 10.13 and 11.4, and cuda-core 1.2.

Memory, streams and graphs come from cuda-core, which is NVIDIA's own and adds 6 MB to what
TensorRT users have: it also reads DLPack and ``__cuda_array_interface__``. torch would be gigabytes
for the same calls, and cuda-bindings alone would leave DLPack's capsules to us.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Precision
from fastad.engine.container import EngineFile
from fastad.engine.cuda import BUCKETS, check_images, device_index, why_absent
from fastad.engine.plans import Choice, Machine, Plan, choose, read_plans, why_no_plan
from fastad.errors import EngineError, FastadError, InputError, UnsupportedError

ALIGNMENT_BYTES = 256  # of every address that TensorRT is given
NAMES = ("image", "anomaly_map", "raw_score")
_log = logging.getLogger(__name__)


def why_unsupported(precision: Precision, device: str = "cuda") -> str | None:
    """Why this machine cannot run a ``precision`` plan on ``device``, or None if it can.

    An engine's plans are another question: `why_engine_unsupported`.
    """
    index = device_index(device)
    if index is None:
        return f"tensorrt {precision}: runs on NVIDIA GPUs only; use device='cuda'"
    reason = why_absent("tensorrt", ("tensorrt",), "tensorrt", device)
    if reason:
        return reason
    try:
        if find_spec("cuda.core") is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:
        return "tensorrt: cuda.core not installed; pip install 'fastad[tensorrt]'"
    from cuda.core import system

    try:
        count = system.get_num_devices()
    except Exception as error:  # the driver's own classes, which differ between versions
        return f"tensorrt: the NVIDIA driver does not answer: {error}"
    if index >= count:
        return f"tensorrt: {device} does not exist, this machine has {count} GPUs"
    return None


def this_machine(device: str = "cuda") -> Machine:
    """GPU and TensorRT version, once `why_unsupported` has no objection."""
    import tensorrt
    from cuda.core import Device

    gpu = Device(device_index(device) or 0)
    major, minor = gpu.compute_capability
    return Machine(gpu.name, (major, minor), tensorrt.__version__)


def choose_plan(engine: EngineFile, precision: Precision, machine: Machine) -> Choice:
    """The engine's plan for a machine, and a sentence for each passed over."""
    digests = {name: member.sha256 for name, member in engine.manifest.members.items()}
    return choose(read_plans(engine), machine, precision, digests)


def why_engine_unsupported(
    engine: EngineFile, precision: Precision, device: str = "cuda"
) -> str | None:
    """Why this machine cannot run this engine's plans, or None if it can."""
    reason = why_unsupported(precision, device)
    if reason:
        return reason
    machine = this_machine(device)
    return why_no_plan(choose_plan(engine, precision, machine), machine, precision)


def open_plan(engine: EngineFile, precision: Precision, device: str = "cuda") -> TensorRTRuntime:
    """Load the plan that fits this machine; plans that do not are logged and passed over.

    Raises:
        UnsupportedError: no TensorRT, no GPU or no fitting plan; the message says which.
        EngineError: TensorRT refuses a plan that should fit.
    """
    reason = why_unsupported(precision, device)
    if reason:
        raise UnsupportedError(reason)
    machine = this_machine(device)
    choice = choose_plan(engine, precision, machine)
    for sentence in choice.skipped:
        _log.info("%s", sentence)
    if choice.plan is None:
        raise UnsupportedError(why_no_plan(choice, machine, precision))
    return TensorRTRuntime(engine.member(choice.plan.member), choice.plan, device)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """float32 on the GPU for DLPack and ``__cuda_array_interface__``; owns its memory."""

    shape: tuple[int, ...]
    buffer: Any  # cuda.core.Buffer, filled

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": "<f4",
            "data": (int(self.buffer.handle), False),
            "strides": None,
            "stream": None,  # nothing to wait for
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.buffer.__dlpack_device__()
        return device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        from cuda.core.utils import StridedMemoryView

        view = StridedMemoryView.from_buffer(self.buffer, self.shape, dtype=np.dtype(np.float32))
        return view.__dlpack__(stream=stream, **options)


class TensorRTRuntime:
    """A loaded plan; its `run` may be called from several threads. Not yet run on hardware.

    Owns a stream per concurrent caller, and for every batch size used an execution context, device
    and pinned buffers and a captured graph. `close` frees them. A batch is padded up to the next
    size of 1, 2, 4, ..., the plan's largest; a larger one takes several runs.

    Args:
        data: The plan.
        plan: What it was built for.
        device: ``cuda`` or ``cuda:N``.

    Raises:
        EngineError: TensorRT refuses the plan, or it is not one of fastad's graphs.
    """

    name = "tensorrt"

    def __init__(self, data: bytes, plan: Plan, device: str = "cuda") -> None:
        import tensorrt as trt
        from cuda.core import Device

        self.precision: Precision = plan.precision
        self.plan = plan
        self._device = Device(device_index(device) or 0)
        self._device.set_current()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime: Any = trt.Runtime(self._logger)
        # Version-compatible plans hold host code, which a loader has to allow.
        self._runtime.engine_host_code_allowed = plan.version_compatible
        self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise EngineError(f"{plan.member}: TensorRT cannot load it; run `fastad build` again")
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        if names != set(NAMES):
            raise EngineError(f"{plan.member}: expected tensors {NAMES}, got {sorted(names)}")
        self._size = tuple(self._engine.get_tensor_shape("image"))[1:3]
        sizes = tuple(b for b in BUCKETS if b < plan.max_batch)
        self.batches = (*sizes, plan.max_batch)
        self._lock = threading.Lock()
        self._idle: list[_Slot] = []

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run one batch; see `fastad.engine.base.Runtime`."""
        check_images("tensorrt", images, self._size)
        maps = np.empty((len(images), *self._size), np.float32)
        scores = np.empty(len(images), np.float32)
        with self._slot() as slot:
            for start in range(0, len(images), self.batches[-1]):
                part = slice(start, start + self.batches[-1])
                slot.run(images[part], maps[part], scores[part])
        return maps, scores

    def run_device(self, frames: object) -> tuple[DeviceArray, DeviceArray]:
        """Anomaly map [B, H, W] and raw score [B] on the GPU, of frames that are there already.

        Args:
            frames: uint8 RGB [B, H, W, 3] at model size on this GPU, contiguous; DLPack or
                ``__cuda_array_interface__``. They are read before this returns.

        Raises:
            InputError: another kind, place, dtype or shape, or more than the plan's largest batch.
            EngineError: the device failed, or the runtime is closed.
        """
        with self._slot() as slot:
            return slot.run_device(frames)

    def close(self) -> None:
        """Free contexts, buffers, graphs and the plan; a call in flight frees its own later."""
        self._device.set_current()  # the calling thread may be a new one
        with self._lock:
            idle, self._idle = self._idle, []
            self._engine = self._runtime = None
        for slot in idle:
            slot.close()

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """A slot for one call, and its errors as ours."""
        slot: _Slot | None = None
        try:
            self._device.set_current()
            with self._lock:
                engine = self._engine
                slot = self._idle.pop() if self._idle else None
            if engine is None:
                raise EngineError("tensorrt: the runtime is closed; load the engine again")
            slot = slot or _Slot(engine, self._device, self._size, self.batches)
            yield slot
        except FastadError:
            raise
        except Exception as error:  # the driver's own classes, which differ between versions
            raise EngineError(f"tensorrt: run failed: {error}") from error
        finally:
            if slot is not None:
                self._give_back(slot)

    def _give_back(self, slot: _Slot) -> None:
        with self._lock:
            if self._engine is not None:
                self._idle.append(slot)
                return
        slot.close()  # nobody else would


class _Slot:
    """What one caller at a time uses: a stream, and a lane per batch size."""

    def __init__(
        self, engine: Any, device: Any, size: tuple[int, ...], batches: tuple[int, ...]
    ) -> None:
        self.engine, self.device, self.size, self.batches = engine, device, size, batches
        self.stream = device.create_stream()
        self.lanes: dict[int, _Lane] = {}

    def lane(self, count: int) -> _Lane:
        batch = next(b for b in self.batches if b >= count)
        if batch not in self.lanes:
            self.lanes[batch] = _Lane(self.engine, self.device, self.stream, batch, self.size)
        return self.lanes[batch]

    def run(
        self, images: NDArray[np.uint8], maps: NDArray[np.float32], scores: NDArray[np.float32]
    ) -> None:
        n, lane = len(images), self.lane(len(images))
        lane.host["image"][:n] = images
        lane.device["image"].copy_from(lane.pinned["image"], stream=self.stream)
        lane.launch()
        for name in NAMES[1:]:
            lane.device[name].copy_to(lane.pinned[name], stream=self.stream)
        self.stream.sync()
        maps[:], scores[:] = lane.host["anomaly_map"][:n], lane.host["raw_score"][:n]

    def run_device(self, frames: object) -> tuple[DeviceArray, DeviceArray]:
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        try:
            view = StridedMemoryView.from_any_interface(frames, stream_ptr=int(self.stream.handle))
        except BufferError as error:
            raise InputError(f"frames: expected memory of this GPU: {error}") from error
        check_view(view, self.device.device_id, self.size, self.batches[-1])
        count, nbytes = view.shape[0], math.prod(view.shape)
        lane = self.lane(count)
        # Into the bound buffer: views may lack the alignment, and the graph holds its address.
        bound = Buffer.from_handle(int(lane.device["image"].handle), nbytes, owner=lane)
        bound.copy_from(Buffer.from_handle(view.ptr, nbytes, owner=view), stream=self.stream)
        lane.launch()
        outputs = []
        for name, shape in (("anomaly_map", (count, *self.size)), ("raw_score", (count,))):
            size = 4 * math.prod(shape)
            own = self.device.allocate(size, stream=self.stream)
            bound = Buffer.from_handle(int(lane.device[name].handle), size, owner=lane)
            own.copy_from(bound, stream=self.stream)
            outputs.append(DeviceArray(shape, own))
        self.stream.sync()  # the next caller of this slot overwrites the lane
        return outputs[0], outputs[1]

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()
        self.lanes.clear()
        self.stream.close()


class _Lane:
    """One batch size: context, buffers, and the captured launch; addresses never change."""

    def __init__(
        self, engine: Any, device: Any, stream: Any, batch: int, size: tuple[int, ...]
    ) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self.stream = stream
        self.context = engine.create_execution_context()
        if self.context is None:
            raise EngineError(f"tensorrt: no memory on the GPU for a context of batch {batch}")
        shapes = {"image": (batch, *size, 3), "anomaly_map": (batch, *size), "raw_score": (batch,)}
        self.context.set_optimization_profile_async(min(batch - 1, 1), int(stream.handle))
        if not self.context.set_input_shape("image", shapes["image"]):
            raise EngineError(f"tensorrt: the plan refuses {shapes['image']}; build it again")
        pinned = LegacyPinnedMemoryResource()
        self.device: dict[str, Any] = {}
        self.pinned: dict[str, Any] = {}
        self.host: dict[str, NDArray[Any]] = {}
        for name, shape in shapes.items():
            dtype: np.dtype[Any] = np.dtype(np.uint8 if name == "image" else np.float32)
            nbytes = math.prod(shape) * dtype.itemsize
            self.device[name] = device.allocate(nbytes, stream=stream)
            self.pinned[name] = pinned.allocate(nbytes)
            memory = (ctypes.c_uint8 * nbytes).from_address(int(self.pinned[name].handle))
            self.host[name] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
            address = int(self.device[name].handle)
            assert address % ALIGNMENT_BYTES == 0, f"{name} lies at {address:#x}"
            self.context.set_tensor_address(name, address)
        self.host["image"][:] = 0  # rows beyond a smaller batch
        self.device["image"].copy_from(self.pinned["image"], stream=stream)
        self._enqueue(stream)  # builds what a capture must not
        stream.sync()
        builder = stream.create_graph_builder()
        builder.begin_building()
        self._enqueue(builder.stream)
        self.graph = builder.end_building().complete()

    def _enqueue(self, stream: Any) -> None:
        if not self.context.execute_async_v3(int(stream.handle)):
            raise EngineError("tensorrt: the run failed; see its message above")

    def launch(self) -> None:
        self.graph.launch(self.stream)

    def close(self) -> None:
        self.graph.close()
        self.host.clear()  # views of the pinned memory
        for buffer in (*self.device.values(), *self.pinned.values()):
            buffer.close()
        self.context = None


def check_view(view: Any, device_id: int, size: tuple[int, ...], max_batch: int) -> None:
    """Refuse frames that cannot be copied as they lie.

    Raises:
        InputError: says what was expected and what came.
    """
    if not view.is_device_accessible or view.device_id != device_id:
        place = f"GPU {view.device_id}" if view.is_device_accessible else "the CPU"
        raise InputError(f"frames: expected memory of GPU {device_id}, got {place}; use run()")
    expected = f"uint8 [1..{max_batch}, {size[0]}, {size[1]}, 3]"
    shape = tuple(view.shape)
    if view.dtype != np.uint8 or len(shape) != 4 or shape[1:] != (*size, 3):
        raise InputError(f"frames: expected {expected}, got {view.dtype} {list(shape)}")
    if not 1 <= shape[0] <= max_batch:
        raise InputError(f"frames: expected {expected}, got {shape[0]} images; split the batch")
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(4))
    if view.strides is not None and tuple(view.strides) != dense:
        raise InputError(f"frames: expected contiguous memory, got strides {view.strides}")
