"""The runtime's own logic over stand-ins of ``tensorrt`` and ``cuda.core`` on the host.

The stand-ins know the calls the runtime makes and enforce their rules: names, shapes inside the
profile, addresses, nothing enqueued twice in a capture, no launch of a closed graph. They prove
padding, splitting, recapture per batch and ownership; the vendor's libraries stay unproven.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from fastad.engine.plans import Plan
from fastad.engine.tensorrt import ALIGNMENT_BYTES, TensorRTRuntime, check_view
from fastad.errors import EngineError, InputError

H, W, MAX_BATCH = 4, 6, 5
PLAN = Plan(
    "plans/a.plan", "model.onnx", "aa", "fp16", "GPU", (9, 0), "11.4", "exact", False, MAX_BATCH, ()
)
captures: list[int] = []  # batch of every capture
contexts: list[Any] = []


class Memory:
    def __init__(self, nbytes: int) -> None:
        self._raw = (ctypes.c_uint8 * (nbytes + ALIGNMENT_BYTES))()
        start = ctypes.addressof(self._raw)
        self.handle, self.size = start + -start % ALIGNMENT_BYTES, nbytes

    @classmethod
    def from_handle(cls, address: int, nbytes: int, owner: object) -> Memory:
        self = cls.__new__(cls)
        self.handle, self.size, self.owner = address, nbytes, owner
        return self

    def copy_from(self, other: Memory, *, stream: Stream) -> None:
        assert self.size == other.size and not stream.closed
        ctypes.memmove(self.handle, other.handle, self.size)

    def copy_to(self, other: Memory, *, stream: Stream) -> None:
        other.copy_from(self, stream=stream)

    def close(self) -> None:
        pass


class Stream:
    made: ClassVar[list[Stream]] = []

    def __init__(self, capturing: bool = False) -> None:
        self.handle, self.closed, self.work = len(self.made) + 1, False, []
        self.capturing = capturing
        self.made.append(self)

    def sync(self) -> None:
        assert not self.capturing

    def close(self) -> None:
        self.closed = True

    def create_graph_builder(self) -> SimpleNamespace:
        inner = Stream(capturing=True)
        closed: list[bool] = []

        def launch(stream: Stream) -> None:
            assert stream is self and not closed and len(inner.work) == 1
            inner.work[0]()

        graph = SimpleNamespace(launch=launch, close=lambda: closed.append(True))
        builder = SimpleNamespace(stream=inner, begin_building=lambda: None)
        builder.end_building = lambda: SimpleNamespace(complete=lambda: graph)
        return builder


class Context:
    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.profile, self.batch, self.warm = -1, 0, False
        contexts.append(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = ((1, 1), (2, MAX_BATCH))[self.profile]
        assert name == "image" and shape[1:] == (H, W, 3) and low <= shape[0] <= high
        self.batch = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        stream = Stream.made[handle - 1]
        assert self.warm or not stream.capturing, "a capture needs a warm-up before"
        self.warm = True
        if stream.capturing:
            captures.append(self.batch)
            stream.work.append(self._compute)
        else:
            self._compute()
        return True

    def _compute(self) -> None:
        def view(name: str, kind: Any, *shape: int) -> Any:
            n = int(np.prod(shape))
            return np.ctypeslib.as_array((kind * n).from_address(self.addresses[name])).reshape(
                shape
            )

        image = view("image", ctypes.c_uint8, self.batch, H, W, 3)
        maps = view("anomaly_map", ctypes.c_float, self.batch, H, W)
        maps[:] = image.mean(-1, dtype=np.float32)
        view("raw_score", ctypes.c_float, self.batch)[:] = maps.max((1, 2))


class Engine:
    num_io_tensors = 3

    def get_tensor_name(self, i: int) -> str:
        return ("image", "anomaly_map", "raw_score")[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, H, W, 3)

    def create_execution_context(self) -> Context:
        return Context()


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> TensorRTRuntime:
    device = SimpleNamespace(
        device_id=0,
        set_current=lambda: None,
        create_stream=Stream,
        allocate=lambda nbytes, *, stream: Memory(nbytes),
    )
    loads = lambda data: Engine() if data == b"plan" else None  # noqa: E731
    trt: Any = ModuleType("tensorrt")
    trt.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    trt.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=loads)
    core: Any = ModuleType("cuda.core")
    core.Device, core.Buffer = (lambda index: device), Memory
    core.LegacyPinnedMemoryResource = lambda: SimpleNamespace(allocate=Memory)
    tools: Any = ModuleType("cuda.core.utils")
    tools.StridedMemoryView = SimpleNamespace(from_any_interface=lambda obj, stream_ptr: obj)
    modules = {"tensorrt": trt, "cuda": ModuleType("cuda"), "cuda.core": core}
    for name, module in (modules | {"cuda.core.utils": tools}).items():
        monkeypatch.setitem(sys.modules, name, module)
    captures.clear(), contexts.clear(), Stream.made.clear()
    return TensorRTRuntime(b"plan", PLAN)


def frames(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, H, W, 3), dtype=np.uint8)


def on_gpu(images: Any, **changes: Any) -> SimpleNamespace:
    view = SimpleNamespace(ptr=images.ctypes.data, shape=images.shape, dtype=images.dtype)
    view.strides, view.device_id, view.is_device_accessible, view.keep = None, 0, True, images
    view.__dict__.update(changes)
    return view


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 13])
def test_pads_and_splits_any_batch(runtime: TensorRTRuntime, count: int) -> None:
    images = frames(count)
    maps, scores = runtime.run(images)
    np.testing.assert_array_equal(maps, images.mean(-1, dtype=np.float32))
    np.testing.assert_array_equal(scores, maps.max((1, 2)))


def test_captures_once_per_batch_size(runtime: TensorRTRuntime) -> None:
    for count in (1, 3, 1, 4, 2, 5, 1):
        runtime.run(frames(count))
    assert runtime.batches == (1, 2, 4, 5)
    assert captures == [1, 4, 2, 5]
    assert [context.profile for context in contexts] == [0, 1, 1, 1]


def test_results_belong_to_the_caller(runtime: TensorRTRuntime) -> None:
    first, _ = runtime.run(frames(2, 1))
    kept = first.copy()
    runtime.run(frames(2, 2))
    np.testing.assert_array_equal(first, kept)


def test_callers_at_the_same_time_have_contexts_of_their_own(runtime: TensorRTRuntime) -> None:
    with runtime._slot() as one, runtime._slot() as two:
        assert one.lane(1).context is not two.lane(1).context and one.stream is not two.stream
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(20):
            images = frames(3, seed * 100 + i)
            maps, _ = runtime.run(images)
            wrong.extend([seed] * (not np.array_equal(maps, images.mean(-1, dtype=np.float32))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_frames_on_the_gpu_stay_there(runtime: TensorRTRuntime) -> None:
    images = frames(3)
    maps, scores = runtime.run_device(on_gpu(images))
    runtime.run(frames(3, 9))  # another call leaves the results alone
    found = (ctypes.c_float * (3 * H * W)).from_address(maps.buffer.handle)
    expected = images.mean(-1, dtype=np.float32)
    np.testing.assert_array_equal(np.ctypeslib.as_array(found).reshape(3, H, W), expected)
    interface = scores.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["version"]) == ((3,), "<f4", 3)
    assert interface["stream"] is None  # 0 is illegal, None says that nothing is under way


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_device_accessible": False}, r"memory of GPU 0, got the CPU; use run\(\)"),
        ({"device_id": 1}, "memory of GPU 0, got GPU 1"),
        ({"dtype": np.dtype(np.float32)}, r"uint8 \[1..5, 4, 6, 3\], got float32"),
        ({"shape": (2, 6, 4, 3)}, r"got uint8 \[2, 6, 4, 3\]"),
        ({"shape": (6, H, W, 3)}, "got 6 images; split the batch"),
        ({"strides": (H * W * 4, W * 4, 4, 1)}, r"contiguous memory, got strides \(96, 24, 4, 1\)"),
    ],
)
def test_refuses_frames_it_cannot_copy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_view(on_gpu(frames(2), **changes), 0, (H, W), MAX_BATCH)


def test_refuses_a_plan_that_does_not_load(runtime: TensorRTRuntime) -> None:
    with pytest.raises(EngineError, match=r"plans/a\.plan: TensorRT cannot load it; run "):
        TensorRTRuntime(b"another", PLAN)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (frames(2).astype(np.float32), r"float32 \[2, 4, 6, 3\]"),
        (frames(2)[:, :1], r"uint8 \[2, 1, 6, 3\]"),  # NumPy would spread one row over all
        (frames(2)[0], r"uint8 \[4, 6, 3\]"),
    ],
    ids=["dtype", "size", "rank"],
)
def test_refuses_images_that_do_not_fit(runtime: TensorRTRuntime, images: Any, got: str) -> None:
    with pytest.raises(EngineError, match=rf"tensorrt: run failed: expected uint8 .*, got {got}"):
        runtime.run(images)


def test_errors_of_the_driver_are_engine_errors(
    runtime: TensorRTRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stream) -> None:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(Stream, "sync", fail)
    with pytest.raises(EngineError, match="tensorrt: run failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        runtime.run(frames(1))


def test_a_call_in_flight_frees_its_slot_when_closed_meanwhile(runtime: TensorRTRuntime) -> None:
    with runtime._slot() as slot:
        runtime.close()
        assert not slot.stream.closed
        slot.lane(1)
    assert slot.stream.closed


def test_refuses_to_run_when_closed(runtime: TensorRTRuntime) -> None:
    runtime.run(frames(1))
    runtime.close()
    assert Stream.made[0].closed
    with pytest.raises(EngineError, match="the runtime is closed"):
        runtime.run(frames(1))
