"""A method on one GPU: eager, this project's runtime, torch.compile, AOTInductor, ONNX Runtime.

    python -m bench.gpu --method uniad            # published settings, random weights
    python -m bench.gpu --run RUN --batch 1 --batch 8
    python -m bench.gpu --device cpu              # reduced: runs the code, keeps no figures

Times contain what happens between a uint8 batch at model size in host memory and map and score in
host memory; "device frames" starts and ends in GPU memory. Every variant is compared with the
method in float64 on the CPU first; one that differs, or cannot run, gets a reason instead of a
time. Random weights cost the same time as trained ones. Not yet run on hardware.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import timing
from fastad.engine import onnxruntime_cuda
from fastad.engine.base import Outputs
from fastad.engine.cuda_graph import exact_float32
from fastad.engine.pytorch import DTYPES, PyTorchEngineRuntime, weights_member, why_unsupported
from fastad.engine.pytorch_graph import deploy
from fastad.errors import UnsupportedError
from fastad.models import Method, build, methods
from fastad.models.deployed import DeployedGraph
from fastad.spec import Manifest
from fastad.training.checkpoint import load_checkpoint

BASELINE = "eager fp32"
ROUNDS, BUDGET_S = 200, 60.0
JUDGED = 2  # images that the float64 reference computes
# Of the map's range. float32 is bound as an export is; half precision reports what it is.
LIMIT = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
REDUCED: dict[str, Any] = {  # for the CPU: seconds instead of minutes
    "backbone": {"name": "resnet18", "taps": [0, 1]},
    "size": [160, 160],
    **{"width": 32, "heads": 2, "ffn_width": 32, "encoder_layers": 1, "decoder_layers": 1},
}

Run = Callable[[NDArray[np.uint8]], Outputs]


@dataclass(frozen=True)
class Variant:
    """One way to run the method; ``open`` builds it for a batch size, or raises why not."""

    name: str
    precision: str
    open: Callable[[int], Run]


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--method", choices=methods(), default="uniad")
    parser.add_argument("--run", type=Path, help="a trained run instead of random weights")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of changed settings")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, AOTI")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and (reason := why_unsupported("fp32", "cuda")):
        print(f"{reason}; `--device cpu` runs the code without figures")
        return 1
    about = timing.machine()
    if options.run:
        method = load_checkpoint(options.run).method
    else:
        reduced = REDUCED if options.method == "uniad" and not on_gpu else {}
        method = untrained(options.method, reduced | options.config)
    variants = list_variants(method, options.device, compiled=not options.no_compile)
    judged = np.random.default_rng(0).integers(
        0, 256, (JUDGED, *method.input.size, 3), dtype=np.uint8
    )
    reference = exact(method, judged)
    rows: list[dict[str, Any]] = []
    for batch in options.batch or ([1, 8, 32] if on_gpu else [1, 3]):
        images = np.resize(judged, (batch, *judged.shape[1:]))
        rows += measure(variants, images, reference, rounds=ROUNDS if on_gpu else 3)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    timing.table(rows, title=f"{method.name}, {method.input.size} px, {name}")
    if on_gpu:
        payload = {
            "unit": "ms",
            "contains": "uint8 batch at model size to map and score, in host memory",
            "method": method.name,
            "config": method.spec.config,
            "cuda": torch.version.cuda,
            "rows": rows,
        }
        suite = timing.suite("gpu", method.name, options.name)
        path = timing.write_result(
            suite, payload, about=about, device=name, results=options.results
        )
        print(path)
    return 0


def untrained(name: str, config: dict[str, Any]) -> Method:
    """A method with random weights that runs."""
    torch.manual_seed(0)
    method = build(name, config, weights="random").eval()
    with torch.no_grad():
        method.adapt(method.features(torch.randn(2, 3, *method.input.size)))
    return method


def exact(method: Method, images: NDArray[np.uint8]) -> Outputs:
    """Map and score in float64 on the CPU."""
    graph = DeployedGraph(copy.deepcopy(method)).double().eval()
    with torch.inference_mode():
        anomaly_map, raw_score = graph(torch.from_numpy(images))
    return anomaly_map.numpy(), raw_score.numpy()


def list_variants(method: Method, device: str, *, compiled: bool) -> list[Variant]:
    """All rows, baseline first; what cannot run here says so when it is opened."""
    precisions = ("fp32", "bf16", "fp16")
    found = [Variant(BASELINE, "fp32", lambda _: eager(method, device))]
    for p in precisions:
        found.append(Variant(f"fastad {p}", p, lambda _, p=p: ours(method, p, device, False)))
    found.append(
        Variant("fastad fp16, device frames", "fp16", lambda _: ours(method, "fp16", device, True))
    )
    if compiled:
        for p in ("fp32", "bf16") if device == "cpu" else precisions:
            found.append(
                Variant(f"max-autotune {p}", p, lambda _, p=p: max_autotune(method, p, device))
            )
            found.append(
                Variant(f"aotinductor {p}", p, lambda b, p=p: aotinductor(method, p, device, b))
            )
    found.append(Variant("onnxruntime cuda fp32", "fp32", lambda _: onnx_session(method, device)))
    return found


def on_host(graph: Callable[[torch.Tensor], Any], device: str) -> Run:
    """Host arrays in and out around a graph on the device."""

    def run(images: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode():
            anomaly_map, raw_score = graph(torch.from_numpy(images).to(device))
            return anomaly_map.cpu().numpy(), raw_score.cpu().numpy()

    return run


def eager(method: Method, device: str) -> Run:
    return on_host(DeployedGraph(copy.deepcopy(method)).eval().to(device), device)


def ours(method: Method, precision: Any, device: str, device_frames: bool) -> Run:
    runtime = PyTorchEngineRuntime(
        Manifest(method.spec, (), None, {}), weights_member(method), precision, device
    )
    if not device_frames:
        return runtime.run
    uploaded: dict[int, torch.Tensor] = {}

    def run(images: NDArray[np.uint8]) -> Any:
        if id(images) not in uploaded:  # once: the frames are on the device already
            uploaded[id(images)] = torch.from_numpy(images).to(device)
        found = runtime.run_device(uploaded[id(images)])
        if device == "cuda":
            torch.cuda.synchronize()
        return found.anomaly_map, found.raw_score

    return run


def max_autotune(method: Method, precision: str, device: str) -> Run:
    graph = deploy(copy.deepcopy(method), DTYPES[precision]).to(device)
    torch.compiler.reset()
    return on_host(torch.compile(graph, mode="max-autotune", dynamic=False), device)


def aotinductor(method: Method, precision: str, device: str, batch: int) -> Run:
    graph = deploy(copy.deepcopy(method), DTYPES[precision]).to(device)
    example = torch.zeros(batch, *method.input.size, 3, dtype=torch.uint8, device=device)
    with torch.no_grad():
        program = torch.export.export(graph, (example,))
    # The library is mapped once loaded, so its folder may go.
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2"
        )
        return on_host(torch._inductor.aoti_load_package(package), device)


def onnx_session(method: Method, device: str) -> Run:
    from fastad.export.to_onnx import to_onnx

    if reason := onnxruntime_cuda.why_unsupported("fp32", device):
        raise UnsupportedError(reason)
    return onnxruntime_cuda.ONNXRuntimeCUDA(to_onnx(copy.deepcopy(method)), "fp32", device).run


def measure(
    variants: list[Variant], images: NDArray[np.uint8], reference: Outputs, rounds: int
) -> list[dict[str, Any]]:
    """Interleaved timings of one batch, or the reason for none."""
    with exact_float32(benchmark=True):  # eager and compiled rows too: float32 means float32
        runs, errors, reasons = {}, {}, {}
        for variant in variants:
            try:
                run = variant.open(len(images))
                errors[variant.name] = map_error(run(images), reference)
            except Exception as error:  # compilers raise what they like; the row names it
                reasons[variant.name] = f"{type(error).__name__}: {first_line(error)}"
                continue
            if errors[variant.name] <= LIMIT[variant.precision]:
                runs[variant.name] = lambda run=run: run(images)
            else:
                reasons[variant.name] = f"wrong by {errors[variant.name]:.1e} of the map's range"
        if BASELINE not in runs:
            raise RuntimeError(f"{BASELINE}: {reasons[BASELINE]}")
        timings = timing.compare(
            runs, rounds=rounds, baseline=BASELINE, budget_s=BUDGET_S, warmup=5 if rounds > 5 else 1
        )
    return [
        {
            "variant": variant.name,
            "batch": len(images),
            "images/s": len(images) / timings[variant.name].p50_ms * 1e3
            if variant.name in timings
            else None,
            **(asdict(timings[variant.name]) if variant.name in timings else NO_TIMES),
            "map error": errors.get(variant.name),
            "reason": reasons.get(variant.name, ""),
        }
        for variant in variants
    ]


NO_TIMES = dict.fromkeys(timing.Timing.__dataclass_fields__)


def map_error(found: Outputs, reference: Outputs) -> float:
    """Largest difference of map or score over the range of the reference map, NaN if any is."""
    n = min(len(found[0]), len(reference[0]))
    span = float(np.ptp(reference[0]))
    pairs = [(np.asarray(f.cpu() if isinstance(f, torch.Tensor) else f)[:n], r[:n])
             for f, r in zip(found, reference, strict=True)]  # fmt: skip
    return float(np.max([np.max(np.abs(f - r)) for f, r in pairs]) / span)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
