"""The most multiply-adds per second this machine shows in large matrix products.

    python -m bench.matrix_peak

Square products of several sizes in float32, bfloat16 and int8, through OpenVINO and (not int8)
through PyTorch; the fastest single run counts, because a limit is asked for. `bench.models` divides
a model's arithmetic by it: how long its products alone would take, were all of them large.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from bench import timing
from fastad.engine.base import Precision, core_count
from fastad.engine.openvino import why_unsupported

SIZES = (1024, 2048, 3072)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
SECONDS = 1.5  # for each size, library and precision


def main(arguments: list[str] | None = None) -> int:
    options = timing.parser(__doc__).parse_args(arguments)
    about = timing.machine()
    rows = measure()
    timing.table(rows, title="Matrix products, 1e9 operations a second, the fastest run")
    suite = timing.suite("matrix_peak", options.name)
    print(timing.write_result(suite, {"rows": rows}, about=about, results=options.results))
    return 0


def measure(sizes: Sequence[int] = SIZES, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """A row for each precision, library and size that this machine has."""
    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        for size in sizes:
            for library, call in calls(precision, size).items():
                gflops = 2 * size**3 / fastest_s(call, seconds) / 1e9
                rows.append(
                    {"precision": precision, "by": library, "size": size, "gflop_per_s": gflops}
                )
    return rows


def best(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Operations per second by precision, the best of all rows; without those that have none."""
    found: dict[str, float] = {}
    for row in rows:
        rate = row["gflop_per_s"] * 1e9
        found[row["precision"]] = max(rate, found.get(row["precision"], 0.0))
    return found


def calls(precision: Precision, size: int) -> dict[str, Callable[[], object]]:
    """One product [size, size] x [size, size] by each library; none without the instructions.

    PyTorch would emulate bfloat16 there, at a hundredth of float32's speed: minutes for a product,
    and no limit of anything.
    """
    if why_unsupported(precision) is not None:
        return {}
    found: dict[str, Callable[[], object]] = {"openvino": openvino_product(precision, size)}
    if precision != "int8" and find_spec("torch"):
        found["torch"] = torch_product(precision, size)
    return found


def openvino_product(precision: Precision, size: int) -> Callable[[], object]:
    """The right matrix is constant, as weights are; int8 as in the graphs of the export."""
    rng = np.random.default_rng(0)
    left = ops.parameter([size, size], np.float32, name="left")
    right: Any = ops.constant(rng.uniform(-1, 1, (size, size)).astype(np.float32))
    factor: Any = left
    if precision == "int8":
        factor = ops.fake_quantize(left, -1.0, 127 / 128, -1.0, 127 / 128, 256)
        right = ops.fake_quantize(right, -127 / 128, 127 / 128, -127 / 128, 127 / 128, 255)
    product = ops.matmul(factor, right, False, False)
    hint = "bf16" if precision == "bf16" else "f32"
    config = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": core_count(),
    }
    compiled = ov.Core().compile_model(ov.Model([product], [left]), "CPU", config)
    check_precision(compiled, precision)
    request = compiled.create_infer_request()
    matrix = rng.uniform(-1, 1, (size, size)).astype(np.float32)
    return lambda: request.infer([matrix], share_inputs=True)


def check_precision(compiled: ov.CompiledModel, precision: Precision) -> None:
    """Fail where the product runs in something else than was asked for: it would be no limit."""
    wanted = {"fp32": {"f32"}, "bf16": {"bf16"}, "int8": {"i8", "u8"}}[precision]
    ran = {
        str(node.get_rt_info()["runtimePrecision"].astype(str))
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "MatMul", "Gemm")
    }
    if not ran or not ran <= wanted:
        raise RuntimeError(f"openvino: the {precision} product runs in {sorted(ran)}")


def torch_product(precision: Precision, size: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(core_count())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.rand(2, size, size, dtype=torch.float32).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.mm(left, right, out=out)


def fastest_s(call: Callable[[], object], seconds: float) -> float:
    """Shortest of at least three runs after a first one, and of as many as fit into ``seconds``."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
