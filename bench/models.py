"""Trained runs and their engines: PyTorch eager against every runtime and precision.

    python -m bench.models RUN ENGINE [RUN ENGINE ...] [--batch 1 --batch 8 --batch 32]

Times contain what happens between a uint8 batch at model size in memory and map and score in
memory: no decoding, no resize. Each precision runs the graph that the engine holds for it. float32
must agree with PyTorch first; without that there are no figures. Other precisions stand beside
what the accuracy gate of the export said; those whose refused graph is not in the file are named.

"x limit" is a time over that of the graph's convolutions and matrix products alone at the machine's
matrix peak in that precision, measured in the same run (`bench.matrix_peak`). "first s" is from the
start of a process to its first result with nothing compiled before, "again s" the next time, and
"MB" the peak memory of such a process up to that batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from bench import fresh, matrix_peak, timing
from bench.flops import flops
from fastad.engine.base import Precision, Runtime, core_count
from fastad.engine.container import read_engine
from fastad.engine.parity import check, compare
from fastad.engine.pytorch import PyTorchRuntime
from fastad.engine.select import (
    RUNTIMES,
    RuntimeName,
    open_runtime,
    why_inexact,
    why_unsupported,
)
from fastad.spec import GateReport, Manifest, Variant
from fastad.training.checkpoint import load_checkpoint

BASELINE = "pytorch eager"
BATCHES = (1, 8, 32)
ROUNDS = 30
BUDGET_S = 30.0  # for one method and batch
SHOWN = {  # column: field of a row
    "method": "method",
    "runtime": "runtime",
    "B": "batch",
    "p50 ms": "p50_ms",
    "p99 ms": "p99_ms",
    "images/s": "images_per_s",
    "x eager": "ratio",
    "x limit": "times_limit",
    "MB": "peak_mb",
    "first s": "first_s",
    "again s": "again_s",
    "map max": "map_max",
    "map mean": "map_mean",
    "gate": "gate",
}


@dataclass(frozen=True)
class Way:
    """One graph of an engine on one runtime in one precision."""

    member: str
    runtime: RuntimeName
    precision: Precision
    gate: GateReport | None

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.runtime} {self.precision}"


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN ENGINE")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="per method and batch")
    options = parser.parse_args(arguments)
    if len(options.paths) % 2:
        parser.error(f"expected pairs of RUN and ENGINE, got {len(options.paths)} paths")
    about = timing.machine()
    peak_rows = matrix_peak.measure()
    timing.table(peak_rows, title="Matrix products, 1e9 operations a second, the fastest run")
    peaks = matrix_peak.best(peak_rows)
    rows: list[dict[str, Any]] = []
    models = []
    for run, engine in zip(options.paths[::2], options.paths[1::2], strict=True):
        found = measure(run, engine, options.batch or BATCHES, options.rounds, options.budget_s)
        rows += [row | {"times_limit": times_limit(row, peaks)} for row in found]
        models.append(about_model(engine))
        timing.table([shown(row) for row in rows[-len(found) :]])
        for sentence in models[-1]["refused and left out"]:
            print(f"refused at export, not in the file: {sentence}")
    payload = {
        "unit": "ms",
        "contains": "uint8 batch at model size to map and score, in memory",
        "threads": core_count(),
        "models": models,
        "matrix_peak": peak_rows,
        "rows": rows,
    }
    suite = timing.suite("models", options.name)
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def ways(manifest: Manifest) -> Iterator[Way]:
    """What of an engine runs here; bfloat16 of an engine without a gate too, as `load` allows."""
    for variant in manifest.variants:
        precision = cast(Precision, variant.precision)
        if absent(manifest, variant) or why_inexact(variant):
            continue
        for runtime in RUNTIMES:
            if runtime in variant.runtimes and why_unsupported(runtime, precision) is None:
                reports = [report for report in variant.gate if report.runtime == runtime]
                yield Way(variant.member, runtime, precision, reports[0] if reports else None)
    if not any(variant.gate for variant in manifest.variants):
        for runtime in RUNTIMES:
            if why_unsupported(runtime, "bf16") is None:
                yield Way(manifest.variants[0].member, runtime, "bf16", None)


def absent(manifest: Manifest, variant: Variant) -> bool:
    """Whether the file holds the reports of a variant but not its graph: the gate refused it.

    Such a variant names the float32 graph, which serves bfloat16 too, but is no int8 or float16.
    """
    lower = variant.precision not in ("fp32", "bf16")
    return lower and variant.member == manifest.variants[0].member


def left_out(manifest: Manifest) -> list[str]:
    """A sentence for each variant that was refused at export and is not in the file."""
    return [
        f"{report.runtime} {report.precision}: {report.refused}"
        for variant in manifest.variants
        if absent(manifest, variant)
        for report in variant.gate
    ]


def measure(
    run: Path, path: Path, batches: Sequence[int], rounds: int, budget_s: float
) -> list[dict[str, Any]]:
    """Rows of one method, all ways in turns, and each in fresh processes.

    Raises:
        EngineError: float32 differs from PyTorch.
    """
    import torch

    torch.set_num_threads(core_count())
    starts: dict[str, fresh.Start] = {}
    runtimes: dict[str, Runtime] = {}
    with read_engine(path) as engine:
        manifest, golden = engine.manifest, engine.golden()
        graph = engine.member(manifest.variants[0].member)
        found = {way.name: way for way in ways(manifest)}
        # Before this process holds the runtimes, so that it does not take their memory.
        starts[BASELINE] = fresh.measure(run, "pytorch", "fp32", batches)
        for name, way in found.items():
            starts[name] = fresh.measure(path, way.runtime, way.precision, batches, way.member)
        runtimes[BASELINE] = PyTorchRuntime(load_checkpoint(run).method)
        for name, way in found.items():
            member = engine.member(way.member)
            runtimes[name] = open_runtime(member, way.runtime, way.precision, "cpu")
    reference = (golden.anomaly_map, golden.raw_score)
    differences = {}
    for name, runtime in runtimes.items():
        differences[name] = compare(runtime, golden.images, reference, None)
        if runtime.precision == "fp32":
            check(differences[name])
    operations = flops(graph, manifest.spec.input.size)
    rows = []
    for batch in batches:
        images = np.resize(golden.images, (batch, *golden.images.shape[1:]))
        timings = timing.compare(
            {name: _call(runtime, images) for name, runtime in runtimes.items()},
            rounds=rounds,
            baseline=BASELINE,
            budget_s=budget_s,
        )
        for name, row in timings.items():
            rows.append(
                {
                    "method": manifest.spec.method,
                    "engine": path.stem,
                    "runtime": name,
                    "precision": runtimes[name].precision,
                    "batch": batch,
                    "ms per image": row.p50_ms / batch,
                    **asdict(row),
                    "images_per_s": batch * 1000 / row.p50_ms,
                    "gflop": operations * batch / 1e9,
                    "peak_mb": starts[name].peak_bytes[batch] / 1e6,
                    "first_s": starts[name].first_s,
                    "again_s": starts[name].again_s,
                    "map_max": differences[name].map_max,
                    "map_mean": differences[name].map_mean,
                    **judgement(found.get(name)),
                }
            )
    for runtime in runtimes.values():
        runtime.close()
    return rows


def _call(runtime: Runtime, images: np.ndarray) -> Callable[[], object]:
    return lambda: runtime.run(images)


def judgement(way: Way | None) -> dict[str, Any]:
    """What the accuracy gate of the export said: its verdict, its reason, changes in points."""
    if way is None or way.precision == "fp32":
        return {"gate": "reference" if way is None else "float32"}
    if way.gate is None:
        return {"gate": "not judged"}
    return {
        "gate": "refused" if way.gate.refused else "passed",
        "refused": way.gate.refused,
        "image_auroc_change": way.gate.image_auroc_change,
        "pixel_auroc_change": way.gate.pixel_auroc_change,
        "aupro_change": way.gate.aupro_change,
        "score_rank_correlation": way.gate.score_rank_correlation,
    }


def times_limit(row: Mapping[str, Any], peaks: Mapping[str, float]) -> float | None:
    """Time over that of the products alone at the peak of the precision; None without a peak."""
    peak = peaks.get(row["precision"])
    return row["p50_ms"] / 1000 / (row["gflop"] * 1e9 / peak) if peak else None


def about_model(path: Path) -> dict[str, Any]:
    with read_engine(path) as engine:
        spec, refused = engine.manifest.spec, left_out(engine.manifest)
    return {
        "engine": path.stem,
        "engine_bytes": path.stat().st_size,
        "method": spec.method,
        "size": list(spec.input.size),
        "config": spec.config,
        "refused and left out": refused,
    }


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {title: row[field] for title, field in SHOWN.items()}


if __name__ == "__main__":
    sys.exit(main())
