"""The custom operators against what else does the same, run with `python -m bench.ops`.

On a CPU: float32, all with the same number of threads (``--threads``; on a machine that others use,
1 disturbs least). A time is one call with its arguments in place. "fastad" is the registered
operator, "eager" its reference in standard operations; onnxruntime and openvino run what models
export to, onnxruntime without spinning threads, openvino at full precision.

On an NVIDIA GPU (``--device cuda``): each variant is captured 20 times in a CUDA graph and the
replay is timed by events, so that a time is one call without Python; what cannot be captured is
timed by events as it is and marked. Inputs stay in the L2 cache where they fit. The share is that
of the copy bandwidth measured first, with inputs and outputs counted once.

No figure is printed for a variant whose result for the first image differs from the float64
reference by more than the tests allow.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bench import ops_peers, timing
from fastad.ops.case import Arguments, Case

CPU_OPS = ("neighbor_attention", "grid_interpolate", "anomaly_map")  # bench.resize has the rest
CPU_SKIPPED = ("B64", "56x56 B8")  # eager scores alone would need gigabytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CALLS_PER_GRAPH = 20
SETTINGS = ("tiles", "tile", "form", "channels_first")  # of the kernel, not of the operator
PER_IMAGE = {"q", "k", "v", "coords", "feat", "feat_hat", "images", "anomaly_map"}
# Per-call inputs; all else is constant in an exported graph, as tables and matrices are in models.
INPUTS = {
    "neighbor_attention": ("q", "k", "v"),
    "grid_interpolate": ("coords",),
    "anomaly_map": ("feat", "feat_hat"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", action="append", help="only this operator; may be repeated")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    about = timing.machine()
    device = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about names of axes
        run = on_cpu if chosen.device == "cpu" else on_gpu
        rows = list(run(chosen.op, chosen.rounds))
    unit = "ms" if chosen.device == "cpu" else "us"
    timing.table(
        rows, title=f"Operators on {device}, times in {unit}; ratio: times as fast as eager"
    )
    payload = {"unit": unit, "threads": torch.get_num_threads(), "rows": rows}
    suite = timing.suite("ops", chosen.name)
    print(timing.write_result(suite, payload, about=about, device=device, results=chosen.results))
    return 0


def on_cpu(only: list[str] | None, rounds: int) -> Iterator[dict[str, Any]]:
    for op in only or CPU_OPS:
        for cases, case in benched(op):
            if case.name.endswith(CPU_SKIPPED):
                continue
            arguments = arguments_of(case, torch.float32)
            variants = calls(op, cases, arguments) | runtimes(op, arguments)
            variants = {n: c for n, c in variants.items() if right(cases, arguments, c, n, case)}
            timings = timing.compare(variants, rounds=rounds, baseline="eager", budget_s=6.0)
            for name, row in timings.items():
                yield {"op": op, "case": case.name, "by": name, **asdict(row)}


def on_gpu(only: list[str] | None, rounds: int) -> Iterator[dict[str, Any]]:
    from fastad.ops import OPS

    bandwidth = copy_bandwidth()
    for op in only or OPS:
        for cases, case in benched(op):
            for dtype in (d for d in DTYPES if d in cases.TOLERANCE):
                arguments = arguments_of(case, dtype, "cuda")
                variants = calls(op, cases, arguments)
                variants = {
                    n: c for n, c in variants.items() if right(cases, arguments, c, n, case)
                }
                moved = bytes_of(arguments) + bytes_of(variants["fastad"]())
                times = gpu_times_us(variants, rounds)
                for name, (us, captured) in times.items():
                    yield {
                        "op": op,
                        "case": case.name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "by": name,
                        "us": us,
                        "share": moved / (us * 1e-6) / bandwidth,
                        "ratio": times["eager"][0] / us if "eager" in times else None,
                        "graph": captured,
                    }


def benched(op: str) -> Iterator[tuple[Any, Case]]:
    cases = importlib.import_module(f"fastad.ops.{op}.cases")
    for case in cases.BENCH:
        yield cases, case


def arguments_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(v) for v in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {k: move(v) for k, v in case.make(dtype).items() if k not in SETTINGS}


def calls(op: str, cases: Any, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """The operator, its reference, and torch's own ways to the same numbers."""
    registered, positional = cases.call_op(**dict(arguments))
    variants: dict[str, Callable[[], Any]] = {
        "eager": lambda: cases.judge(**arguments),
        "fastad": lambda: registered(*positional),
    }
    return variants | ops_peers.PEERS[op](arguments)


class Exported(nn.Module):
    """A public function with everything but its per-call inputs fixed."""

    def __init__(self, op: str, arguments: Arguments) -> None:
        super().__init__()
        self.function = getattr(importlib.import_module(f"fastad.ops.{op}"), op)
        self.fixed = {k: v for k, v in arguments.items() if k not in INPUTS[op]}
        self.names = INPUTS[op]
        self.levels = len(arguments["feat"]) if op == "anomaly_map" else 0

    def forward(self, *tensors: Tensor) -> Any:
        """The function's result for the per-call inputs, levels one after the other."""
        given: list[Any] = list(tensors)
        if self.levels:
            given = [given[: self.levels], given[self.levels :]]
        return self.function(**dict(zip(self.names, given, strict=True)), **self.fixed)


def runtimes(op: str, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """The exported graph in the CPU runtimes of engines."""
    import onnxruntime
    import openvino
    from fastad.export.to_onnx import OPSET, add_functions

    from fastad.engine.openvino_ops import read_model

    tensors: list[Tensor] = []
    for name in INPUTS[op]:
        value = arguments[name]
        tensors += value if isinstance(value, list) else [value]
    program = torch.onnx.export(
        Exported(op, arguments).eval(),
        tuple(tensors),
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    add_functions(model)  # as in engines, which are opened as here
    graph = model.SerializeToString()
    arrays = [t.contiguous().numpy() for t in tensors]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(read_model(core, graph), "CPU", settings)
    feed = dict(zip((i.name for i in session.get_inputs()), arrays, strict=True))
    request = compiled.create_infer_request()

    def run_openvino() -> list[Any]:
        found = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [found[i] for i in range(len(compiled.outputs))]

    return {"onnxruntime": lambda: session.run(None, feed), "openvino": run_openvino}


def right(cases: Any, arguments: Arguments, call: Callable[[], Any], name: str, case: Case) -> bool:
    """Whether a variant gives the reference's numbers for the first image; says so if not."""
    dtype = next(t.dtype for t in tensors_of(arguments) if t.dtype in cases.TOLERANCE)
    if isinstance(arguments.get("dtype"), torch.dtype):
        dtype = arguments["dtype"]
    rtol, atol = cases.TOLERANCE[dtype]
    expected = tensors_of(cases.judge(**widen(first_image(arguments))))
    try:
        found = tensors_of(call())
    except torch.OutOfMemoryError:
        print(f"{case.name}: {name} runs out of memory; no figure")
        return False
    for ours, truth in zip(found, expected, strict=True):
        if not torch.allclose(ours[:1].double(), truth.double(), rtol=rtol, atol=atol):
            off = (ours[:1].double() - truth.double()).abs().max().item()
            print(f"{case.name}: {name} differs from the reference by {off:.3g}; no figure")
            return False
    return True


def first_image(arguments: Arguments) -> Arguments:
    def cut(value: Any) -> Any:
        return [cut(v) for v in value] if isinstance(value, list) else value[:1]

    return {k: cut(v) if k in PER_IMAGE else v for k, v in arguments.items()}


def widen(value: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(value, dict):
        return {k: widen(v) for k, v in value.items()}
    if isinstance(value, list):
        return [widen(v) for v in value]
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_of(v)]
    if isinstance(value, Tensor):
        return [value]
    return [torch.from_numpy(value)] if hasattr(value, "__array_interface__") else []


def bytes_of(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(value))


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 1 GiB on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us, _ = gpu_times_us({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return 2 * source.numel() / (us * 1e-6)


def gpu_times_us(
    variants: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, tuple[float, bool]]:
    """Median time of one call, variants in turns, and whether it comes from a graph."""
    replays: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, call in variants.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(CALLS_PER_GRAPH):
                    call()
            replays[name] = graph.replay, CALLS_PER_GRAPH
        except RuntimeError:  # what allocates or waits in its own way
            torch.cuda.synchronize()
            replays[name] = call, 1
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (replay, count) in replays.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e3 / count)
    return {n: (statistics.median(t), replays[n][1] > 1) for n, t in times.items()}


if __name__ == "__main__":
    sys.exit(main())
