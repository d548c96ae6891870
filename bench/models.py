"""Milliseconds per image of a trained run: PyTorch eager against the engine's runtimes.

    python -m bench.models RUN ENGINE [--images DATA] [--batch 1 --batch 8]

Times contain what happens between a uint8 batch at model size in memory and map and score in
memory: no decoding, no resize. Parity is checked first; without it there are no figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import timing
from fastad.engine.base import Runtime
from fastad.engine.container import read_engine
from fastad.engine.parity import check, compare
from fastad.engine.pytorch import PyTorchRuntime
from fastad.engine.select import PRECISIONS, RUNTIMES, open_runtime, why_unsupported
from fastad.training.checkpoint import load_checkpoint

BASELINE = "pytorch eager"
ROUNDS = 30
BUDGET_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--name", default="", help="of the result file")
    options = parser.parse_args(arguments)
    about = timing.machine()
    checkpoint = load_checkpoint(options.run)
    with read_engine(options.engine) as engine:
        graph, golden = engine.member(engine.manifest.variants[0].member), engine.golden()
    runtimes: dict[str, Runtime] = {BASELINE: PyTorchRuntime(checkpoint.method)}
    for name in RUNTIMES:
        for precision in PRECISIONS:
            if why_unsupported(name, precision) is None:
                runtimes[f"{name} {precision}"] = open_runtime(graph, name, precision, "cpu")
    reference = (golden.anomaly_map, golden.raw_score)
    parity = {}
    for name, runtime in runtimes.items():
        parity[name] = compare(runtime, golden.images, reference, None)
        if runtime.precision == "fp32":
            check(parity[name])
    rows: list[dict[str, Any]] = []
    for batch in options.batch or [1, 8]:
        images = np.resize(golden.images, (batch, *golden.images.shape[1:]))
        rows += measure(runtimes, images, {name: p.map_max for name, p in parity.items()})
    spec = checkpoint.record.spec
    title = f"{spec.method}, {spec.input.size[0]} x {spec.input.size[1]} px, per batch"
    timing.table(rows, title=title)
    payload = {
        "unit": "ms",
        "contains": "uint8 batch at model size to map and score, in memory",
        "method": spec.method,
        "config": spec.config,
        "engine_bytes": options.engine.stat().st_size,
        "rows": rows,
    }
    suite = "-".join(part for part in ("models", options.name or spec.method) if part)
    print(timing.write_result(suite, payload, about=about))
    return 0


def measure(
    runtimes: dict[str, Runtime], images: np.ndarray, map_error: dict[str, float]
) -> list[dict[str, Any]]:
    """Interleaved timings of one batch."""

    def call(runtime: Runtime) -> Callable[[], object]:
        return lambda: runtime.run(images)

    timings = timing.compare(
        {name: call(runtime) for name, runtime in runtimes.items()},
        rounds=ROUNDS,
        baseline=BASELINE,
        budget_s=BUDGET_S,
    )
    return [
        {
            "runtime": name,
            "batch": len(images),
            "ms per image": row.p50_ms / len(images),
            **asdict(row),
            "map error": map_error[name],
        }
        for name, row in timings.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
