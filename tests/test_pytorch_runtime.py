"""The PyTorch engine runtime: weights, folding, precision, batches, frames; all but the launch."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from test_methods import TINY
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastad.engine import cuda
from fastad.engine.base import Precision
from fastad.engine.cuda_graph import Slot, exact_float32
from fastad.engine.device_frames import as_frames
from fastad.engine.pytorch import (
    PyTorchEngineRuntime,
    method_of,
    weights_member,
    why_unsupported,
)
from fastad.engine.pytorch_graph import deploy, fold_batchnorm, use_channels_last
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.models import Method, build, methods
from fastad.models.deployed import DeployedGraph
from fastad.ops.postprocess import postprocess
from fastad.ops.preprocess import preprocess
from fastad.spec import Manifest

CPU = torch.device("cpu")
ROUNDING = 1e-5  # of the map's range: float32 sums in another order, some ten layers deep
HALF_INPUTS_FORBIDDEN = {
    *("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
    *("_softmax", "linalg_vector_norm", "sqrt", "pow", "sum", "amax"),
}
NOT_IN_A_GRAPH = {  # what waits for the device, or uploads from the host
    *("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "lift_fresh_copy"),
}


def trained(name: str, **changes: Any) -> Method:
    """A tiny method whose every number matters: no statistic is 0 or 1."""
    torch.manual_seed(0)
    method = build(name, TINY.get(name, {}) | changes, weights="random").eval()
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    if name == "intra":
        method.get_buffer("mean_map").uniform_(0.0, 0.01)
    with torch.no_grad():
        method.adapt(method.features(torch.randn(2, 3, *method.input.size)))
    return method


@pytest.fixture(scope="module", params=methods())
def method(request: pytest.FixtureRequest) -> Method:
    return trained(request.param)


def frames(count: int, size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def exact(method: Method, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Map and score as the method says, in float64."""
    graph = DeployedGraph(copy.deepcopy(method)).double().eval()
    with torch.no_grad():
        anomaly_map, raw_score = graph(torch.from_numpy(images))
    return anomaly_map, raw_score


def open_engine(method: Method, precision: Precision = "fp32", **more: Any) -> PyTorchEngineRuntime:
    manifest = Manifest(method.spec, (), None, {})
    return PyTorchEngineRuntime(manifest, weights_member(method), precision, **more)


@pytest.fixture(scope="module")
def small() -> Method:
    return trained("grad")


@pytest.fixture(scope="module")
def runtime(small: Method) -> PyTorchEngineRuntime:
    return open_engine(small, device="cpu")


def test_weights_come_back_bit_for_bit(method: Method) -> None:
    member = weights_member(method)
    rebuilt = method_of(Manifest(method.spec, (), None, {}), member)
    state = rebuilt.state_dict()
    assert state.keys() == method.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in method.state_dict().items())
    assert rebuilt.spec == method.spec
    assert not rebuilt.training
    assert weights_member(rebuilt) == member


@pytest.mark.parametrize("cut", [0, 7, -1], ids=["empty", "header", "last byte"])
def test_damaged_weights_are_an_engine_error(small: Method, cut: int) -> None:
    with pytest.raises(EngineError, match=r"weights.safetensors: damaged .*export again"):
        method_of(Manifest(small.spec, (), None, {}), weights_member(small)[:cut])


def test_weights_of_another_method_are_an_engine_error(small: Method) -> None:
    with pytest.raises(EngineError, match=r"do not fit intra: .*export again"):
        method_of(Manifest(trained("intra").spec, (), None, {}), weights_member(small))


def test_folded_equals_unfolded(method: Method) -> None:
    images = frames(2, method.input.size)
    graph = deploy(copy.deepcopy(method), torch.float64)
    assert not [m for m in graph.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        found = graph(torch.from_numpy(images))
    for got, expected in zip(found, exact(method, images), strict=True):
        assert got.dtype == torch.float64
        # Ten thousand roundings at the map's range, far below anything a wrong fold gives.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * 1e4 * range_of(expected))


def range_of(values: Tensor) -> float:
    return max(float(values.max() - values.min()), float(values.abs().max()))


def test_float32_graph_equals_the_method(method: Method) -> None:
    images = frames(2, method.input.size)
    graph = deploy(copy.deepcopy(method), torch.float32)
    with torch.no_grad():
        found = graph(torch.from_numpy(images))
    for got, expected in zip(found, exact(method, images), strict=True):
        assert got.dtype == torch.float32
        bound = ROUNDING * range_of(exact(method, images)[0])
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


def test_convolutions_are_channels_last(method: Method) -> None:
    graph = deploy(copy.deepcopy(method), torch.float32)
    weights = [m.weight for m in graph.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert bool(weights) == (method.name != "intra")


def test_tables_with_four_axes_stay_contiguous() -> None:
    grad = trained("grad", local_dims=3)
    use_channels_last(grad)
    assert grad.get_parameter("local_table").dim() == 4
    assert grad.get_parameter("local_table").is_contiguous()


class TwoReaders(nn.Module):
    """The convolution's output is read once more, behind the BatchNorm's back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        out: Tensor = self.norm(h) + h
        return out


class Returned(TwoReaders):
    """The convolution's output is also what the module returns."""

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return self.norm(h), h


class InPlace(TwoReaders):
    """The convolution's output is rectified where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x).relu_())
        return out


class SharedNorm(TwoReaders):
    """Two convolutions, one BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.norm(self.other(x))
        return out


class SharedConv(TwoReaders):
    """One convolution, two BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = norm(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.norm2(self.conv(x))
        return out


class Standardised(nn.Conv2d):
    """Its weight is computed anew in every call: a folded factor would be lost."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.conv2d(x, (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), keepdim=True))


def norm(C: int, **settings: Any) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(C, **settings)
    if made.running_mean is not None:
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2.0)
    return made


@pytest.mark.parametrize(
    "make",
    [
        *(TwoReaders, Returned, InPlace, SharedNorm, SharedConv),
        lambda: nn.Sequential(Standardised(3, 4, 3, bias=False), norm(4)),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3), norm(6)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, track_running_stats=False)),
        lambda: nn.Sequential(norm(3), nn.ReLU(), nn.Conv2d(3, 4, 3)),
    ],
    ids=["two readers", "returned", "in place", "shared norm", "shared conv", "standardised",
         "grouped transposed", "batch statistics", "norm first"],
)  # fmt: skip
def test_leaves_what_cannot_be_folded(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = module(x)
        assert fold_batchnorm(module, torch.zeros(1, 3, 6, 6)) == 0
        torch.testing.assert_close(module(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), norm(6, affine=False)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), BatchNormAct2d(6)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), norm(6)),
        lambda: nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))] * 2),
    ],
    ids=["grouped", "with activation", "transposed", "called twice"],
)
def test_folds_and_keeps_the_rest(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval().double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        assert fold_batchnorm(module, x[:1]) == 1
        torch.testing.assert_close(module(x), before, rtol=0, atol=1e-13)
    assert not [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


class Recorder(TorchDispatchMode):
    """Operator names with the dtypes they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[torch.dtype], set[torch.dtype]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.seen.append((name, set(dtypes(args)), set(dtypes(out))))
        return out


def dtypes(value: object) -> Iterator[torch.dtype]:
    if isinstance(value, Tensor):
        yield value.dtype
    elif isinstance(value, list | tuple):
        for part in value:
            yield from dtypes(part)


def recorded(method: Method, dtype: torch.dtype) -> list[tuple[str, set[Any], set[Any]]]:
    graph = deploy(copy.deepcopy(method), dtype)
    images = torch.from_numpy(frames(1, method.input.size))
    with torch.no_grad(), Recorder() as recorder:  # composite operators in parts
        graph(images)
    return recorder.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_norms_softmax_and_distances_read_float32(method: Method, dtype: torch.dtype) -> None:
    seen = recorded(method, dtype)
    wrong = [row for row in seen if row[0] in HALF_INPUTS_FORBIDDEN and dtype in row[1]]
    assert wrong == []
    assert {"pow", "sqrt", "amax"} <= {name for name, _, _ in seen}  # it was the decomposed form
    # The map head: the last product of all is one of float32 matrices.
    last = [reads for name, reads, _ in seen if name in ("mm", "bmm", "addmm")][-1]
    assert last == {torch.float32}
    assert seen[-1][2] == {torch.float32}


def test_products_run_in_half_precision(method: Method) -> None:
    seen = recorded(method, torch.bfloat16)
    convolutions = [reads for name, reads, _ in seen if "convolution" in name]
    assert all(reads == {torch.bfloat16} for reads in convolutions)
    linear = [reads for name, reads, _ in seen if name in ("addmm", "mm")]
    share = sum(torch.bfloat16 in reads for reads in [*convolutions, *linear])
    assert share >= 0.5 * len([*convolutions, *linear])


def test_named_parts_and_tables_stay_in_float32(method: Method) -> None:
    graph = deploy(copy.deepcopy(method), torch.bfloat16)
    for part in method.float32_parts:
        assert {p.dtype for p in graph.method.get_submodule(part).parameters()} == {torch.float32}
    assert {b.dtype for b in graph.buffers() if b.is_floating_point()} == {torch.float32}
    products = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    loose = [p for m in graph.modules() if not isinstance(m, products) for p in m.parameters(False)]
    assert {p.dtype for p in loose} <= {torch.float32}


def test_bf16_is_close_to_float32(method: Method) -> None:
    images = frames(3, method.input.size)
    maps, scores = open_engine(method, "bf16", device="cpu").run(images)
    expected_map, expected_score = exact(method, images)
    # bfloat16 keeps 8 bits: 2^-8 a rounding, the limit of the other runtimes' test.
    bound = 0.1 * range_of(expected_map)
    np.testing.assert_allclose(maps, expected_map.numpy(), rtol=0, atol=bound)
    np.testing.assert_allclose(scores, expected_score.numpy(), rtol=0, atol=bound)
    assert (maps.dtype, scores.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_in_a_forward_pass_forbids_capture(method: Method, dtype: torch.dtype) -> None:
    assert {name for name, _, _ in recorded(method, dtype)} & NOT_IN_A_GRAPH == set()


@pytest.mark.parametrize("given", ["highest", "high"])
def test_exact_float32_restores_what_was_set(given: str) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings() -> tuple[object, ...]:
        reduced = matmul.allow_fp16_reduced_precision_reduction
        return matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, reduced

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(given)
        outside = settings()
        with pytest.raises(KeyError), exact_float32(benchmark=True):
            assert cudnn.benchmark
            assert not matmul.allow_fp16_reduced_precision_reduction
            assert not (matmul.allow_tf32 or cudnn.allow_tf32)
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert settings() == outside
        assert torch.get_float32_matmul_precision() == given
    finally:
        torch.set_float32_matmul_precision(before)


def test_exact_float32_follows_the_newer_names() -> None:
    script = (
        "import torch; from fastad.engine.cuda_graph import exact_float32\n"
        "parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv\n"
        "for part in parts: part.fp32_precision = 'tf32'\n"
        "with exact_float32(benchmark=False): print([p.fp32_precision == 'tf32' for p in parts])\n"
        "print([p.fp32_precision == 'tf32' for p in parts])"
    )
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has the older names only")
    # In a process of its own: the newer names cannot be unset.
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[False, False]", "[True, True]"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 100])
def test_every_image_is_in_one_run_that_holds_it(count: int) -> None:
    runs = cuda.split(count)
    assert [i for start, stop, _ in runs for i in range(start, stop)] == list(range(count))
    assert all(bucket in cuda.BUCKETS for _, _, bucket in runs)
    # The next size up, no larger.
    assert all(bucket // 2 < stop - start <= bucket for start, stop, bucket in runs)


def test_padding_does_not_meet_the_images(method: Method) -> None:
    images = frames(3, method.input.size)
    graph = deploy(copy.deepcopy(method), torch.float32)
    clean, used = (Slot(graph, 4, method.input.size, CPU) for _ in range(2))
    used.run(frames(4, method.input.size, seed=1))
    found, expected = used.run(images), clean.run(images)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    with torch.no_grad():
        anomaly_map, raw_score = graph(torch.from_numpy(images))
    bound = ROUNDING * range_of(anomaly_map)
    np.testing.assert_allclose(found[0], anomaly_map.numpy(), rtol=0, atol=bound)
    np.testing.assert_allclose(found[1], raw_score.numpy(), rtol=0, atol=bound)


def test_more_images_than_a_run_holds(runtime: PyTorchEngineRuntime) -> None:
    images = frames(35, runtime.size)
    maps, scores = runtime.run(images)
    assert (maps.shape, scores.shape) == ((35, *runtime.size), (35,))
    at_limit, rest = runtime.run(images[:32]), runtime.run(images[32:])
    assert np.array_equal(maps, np.concatenate([at_limit[0], rest[0]]))
    assert np.array_equal(scores, np.concatenate([at_limit[1], rest[1]]))


def test_no_images_give_no_results(runtime: PyTorchEngineRuntime) -> None:
    maps, scores = runtime.run(frames(0, runtime.size))
    assert (maps.shape, scores.shape) == ((0, *runtime.size), (0,))


def test_buffers_are_made_once_a_size(small: Method) -> None:
    fresh = open_engine(small, device="cpu")
    assert sorted(fresh._slots) == [1]
    fresh.run(frames(3, fresh.size))
    slot = fresh._slots[4]
    fresh.run(frames(4, fresh.size))
    assert fresh._slots[4] is slot
    assert sorted(fresh._slots) == [1, 4]


def test_threads_share_a_runtime(small: Method) -> None:
    shared = open_engine(small, device="cpu")
    batches = [frames(1 + seed % 4, shared.size, seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:  # the first calls also race for the buffers
        found = list(pool.map(shared.run, batches))
    for batch, (maps, scores) in zip(batches, found, strict=True):
        expected = shared.run(batch)
        assert np.array_equal(maps, expected[0])
        assert np.array_equal(scores, expected[1])


def test_outputs_belong_to_the_caller(runtime: PyTorchEngineRuntime) -> None:
    first = runtime.run(frames(2, runtime.size))
    kept = tuple(output.copy() for output in first)
    runtime.run(frames(2, runtime.size, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))
    first[0][:] = 0
    assert np.array_equal(runtime.run(frames(2, runtime.size))[0], kept[0])


@pytest.mark.parametrize("form", ["read-only", "strided"])
def test_takes_arrays_as_they_come(runtime: PyTorchEngineRuntime, form: str) -> None:
    images = frames(3, runtime.size)
    given = images.copy() if form == "read-only" else np.asfortranarray(images)
    given.setflags(write=False)
    assert np.array_equal(runtime.run(given)[0], runtime.run(images)[0])


class Exported:
    """What a foreign library hands over: DLPack and nothing else."""

    def __init__(self, array: NDArray[np.uint8], device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **settings: Any) -> Any:
        return self.array.__dlpack__()


@pytest.mark.parametrize("wrap", [torch.from_numpy, np.asarray, Exported], ids=lambda w: w.__name__)
def test_frames_at_model_size_equal_run(
    runtime: PyTorchEngineRuntime, wrap: Callable[[Any], object]
) -> None:
    images = frames(3, runtime.size)
    found = runtime.run_device(wrap(images))
    maps, scores = runtime.run(images)
    assert isinstance(found.anomaly_map, Tensor)
    assert np.array_equal(found.anomaly_map.numpy(), maps)
    assert np.array_equal(found.raw_score.numpy(), scores)
    assert found.pred_mask is None


@pytest.mark.parametrize("swap", [False, True], ids=["rgb", "bgr"])
def test_frames_of_any_size_are_resized_there_and_back(
    runtime: PyTorchEngineRuntime, swap: bool
) -> None:
    given = torch.from_numpy(frames(33, (90, 70)))  # more than one run
    small = preprocess(given, runtime.size, swap_red_blue=swap)
    maps, scores = runtime.run(small.numpy())
    threshold = float(np.median(maps))
    found = runtime.run_device(given, threshold=threshold, swap_red_blue=swap)
    resized, mask = postprocess(torch.from_numpy(maps), (90, 70), threshold)
    assert torch.equal(found.anomaly_map, resized)
    assert np.array_equal(found.raw_score.numpy(), scores)
    assert found.pred_mask is not None
    assert mask is not None
    assert torch.equal(found.pred_mask, mask)
    assert bool(mask.any()) and not bool(mask.all())


def test_device_results_belong_to_the_caller(runtime: PyTorchEngineRuntime) -> None:
    first = runtime.run_device(torch.from_numpy(frames(2, runtime.size)))
    kept = first.anomaly_map.clone(), first.raw_score.clone()
    runtime.run_device(torch.from_numpy(frames(2, runtime.size, seed=1)))
    assert torch.equal(first.anomaly_map, kept[0])
    assert torch.equal(first.raw_score, kept[1])


def test_cropped_frames_are_taken_as_they_lie(runtime: PyTorchEngineRuntime) -> None:
    H, W = runtime.size
    crop = torch.from_numpy(frames(2, (H + 9, W + 5)))[:, 4 : 4 + H, 2 : 2 + W]
    assert not crop.is_contiguous()
    expected = runtime.run(np.ascontiguousarray(crop.numpy()))
    assert np.array_equal(runtime.run_device(crop).anomaly_map.numpy(), expected[0])


class CudaArray:
    """The other protocol, which names a device array by its address."""

    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (1, 8, 8, 3), "typestr": "|u1", "data": (0, False), "version": 3,
        } | changes  # fmt: skip


GPU = torch.device("cuda", 0)  # a name; nothing is started


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        ([1, 2], CPU, "expected a torch tensor or an object with __dlpack__ .*got list"),
        (torch.zeros(1, 8, 8, 3), CPU, r"expected uint8 \[B, H, W, 3\], got torch.float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), CPU, r"got torch.uint8 \[8, 8, 3\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), CPU, "channels last"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), CPU, "at least one image"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), GPU, "expected them on cuda:0, got cpu"),
        (Exported(frames(1, (8, 8))), GPU, "expected them on cuda:0, got the CPU 0"),
        (Exported(frames(1, (8, 8)), (2, 0)), CPU, "expected them on cpu, got CUDA 0"),
        (Exported(frames(1, (8, 8)), (2, 1)), GPU, "expected them on cuda:0, got CUDA 1"),
        (Exported(frames(1, (8, 8)), (99, 0)), CPU, "DLPack device 99"),
        (CudaArray(), CPU, "got a CUDA array; open the engine with device='cuda'"),
        (CudaArray(typestr="<f4"), GPU, r"expected uint8 \(\|u1\), got <f4"),
        (CudaArray(stream=0), GPU, "names stream 0, which its standard forbids"),
    ],
)
def test_refuses_frames_it_would_have_to_move(
    given: object, device: torch.device, message: str
) -> None:
    with pytest.raises(InputError, match=f"frames: .*{message}"):
        as_frames(given, device)


def test_frames_that_cannot_be_exported_are_the_callers_error() -> None:
    class Broken(Exported):
        def __dlpack__(self, **settings: Any) -> Any:
            raise BufferError("it is read-only")

    with pytest.raises(InputError, match="DLPack export failed: it is read-only; copy them first"):
        as_frames(Broken(frames(1, (8, 8))), CPU)


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("int8", "cuda", "pytorch int8 on cuda: no integer kernels here; use fp16 or bf16"),
        ("int8", "cpu", "pytorch int8 on cpu: no integer kernels"),
        ("fp16", "cpu", "pytorch fp16 on cpu: CPUs run fp32 and bf16 here"),
    ],
)
def test_says_which_precision_it_does_not_run(
    small: Method, precision: Precision, device: str, message: str
) -> None:
    reason = why_unsupported(precision, device)
    assert reason is not None
    assert reason.startswith(message)
    with pytest.raises(UnsupportedError, match=message):
        open_engine(small, precision, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "this torch is built without CUDA"),
        ({"available": False}, "torch sees no NVIDIA GPU"),
        ({"count": 1}, "torch sees 1 GPUs, numbered from 0"),
        ({"triton": None}, "triton is not installed; pip install 'fastad"),
        ({"capability": (6, 1)}, "the GPU has capability 6.1, 8.0 is needed"),
        ({"capability": (7, 5)}, "the GPU has capability 7.5, 8.0 is needed"),
        ({}, None),
    ],
)
def test_says_what_the_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str | None
) -> None:
    there = {"version": "13.0", "available": True, "count": 2, "triton": 1, "capability": (9, 0)}
    machine = there | change
    monkeypatch.setattr(torch.version, "cuda", machine["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["available"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine["count"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine["capability"])
    monkeypatch.setattr("fastad.engine.pytorch.find_spec", lambda _: machine["triton"])
    reason = why_unsupported("bf16", "cuda:1")
    if message is None:
        assert reason is None
    else:
        assert reason is not None
        assert message in reason


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu:0", ""])
def test_refuses_unknown_devices(device: str) -> None:
    with pytest.raises(InputError, match="device: expected cpu, cuda or cuda:N, got"):
        why_unsupported("fp32", device)


def test_absent_packages_and_drivers_have_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", no_library)
    assert cuda.why_absent("pytorch", ("torch",), "gpu", "cpu") is None
    reason = cuda.why_absent("pytorch", ("torch",), "gpu", "cuda")
    assert reason is not None
    assert reason.startswith("pytorch: no NVIDIA driver on this machine")
    missing = cuda.why_absent("pytorch", ("torch", "no_such_package"), "gpu", "cpu")
    assert missing == "pytorch: no_such_package not installed; pip install 'fastad[gpu]'"


def test_a_loaded_driver_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: name)
    assert cuda.why_absent("pytorch", ("torch",), "gpu", "cuda") is None


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 64, 64, 3), np.float32)]
)
def test_wrong_arrays_are_an_engine_error(runtime: PyTorchEngineRuntime, images: Any) -> None:
    with pytest.raises(EngineError, match=r"pytorch: run failed: expected uint8 \[B, 64, 64, 3\]"):
        runtime.run(images)


def test_a_network_that_does_not_run_is_an_engine_error(
    small: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DeployedGraph, "forward", fail)
    monkeypatch.setattr("fastad.engine.pytorch_graph.fold_batchnorm", lambda *_: 0)
    with pytest.raises(EngineError, match="fp32 on cpu fails for batches of 1: out of memory"):
        open_engine(small, device="cpu")


def test_closing_while_a_call_runs_builds_nothing_new(small: Method) -> None:
    runtime = open_engine(small, device="cpu")
    graph = runtime._opened()  # what a call in flight has at hand
    runtime.close()
    with pytest.raises(EngineError, match="runtime is closed"):
        runtime._slot(graph, 2)


def test_closed_is_an_engine_error(small: Method) -> None:
    closed = open_engine(small, device="cpu")
    closed.close()
    closed.close()
    with pytest.raises(EngineError, match="runtime is closed"):
        closed.run(frames(1, closed.size))
    with pytest.raises(EngineError, match="runtime is closed"):
        closed.run_device(torch.from_numpy(frames(1, closed.size)))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_equals_the_method(method: Method, precision: Precision) -> None:
    if reason := why_unsupported(precision, "cuda"):
        pytest.skip(reason)
    images = frames(5, method.input.size)
    gpu = open_engine(method, precision)
    expected_map, expected_score = exact(method, images)
    bound = (10 * ROUNDING if precision == "fp32" else 0.1) * range_of(expected_map)
    for _ in range(3):  # replays
        maps, scores = gpu.run(images)
        np.testing.assert_allclose(maps, expected_map.numpy(), rtol=0, atol=bound)
        np.testing.assert_allclose(scores, expected_score.numpy(), rtol=0, atol=bound)


@pytest.mark.gpu
def test_gpu_threads_and_device_frames(small: Method) -> None:
    if reason := why_unsupported("fp32", "cuda"):
        pytest.skip(reason)
    gpu = open_engine(small)
    batches = [frames(1 + seed % 4, gpu.size, seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(gpu.run, batches))
    for batch, (maps, scores) in zip(batches, found, strict=True):
        expected = gpu.run(batch)
        assert np.array_equal(maps, expected[0])
        assert np.array_equal(scores, expected[1])
        on_device = gpu.run_device(torch.from_numpy(batch).cuda())
        assert on_device.anomaly_map.is_cuda
        assert np.array_equal(on_device.anomaly_map.cpu().numpy(), maps)
