"""What each precision costs and gives on each runtime: a trained run exported through the gate.

    python -m bench.precisions RUN --test-data DATA [--mask-folder NAME] [--precision auto]
        [--keep ENGINE]

The rows are the export's own reports: changes of accuracy against float32 of the same runtime on
labelled and held-out normal images, medians of interleaved runs at batch 1 and 8 (uint8 batch at
model size to map and score, in memory), and what ``auto`` then takes. Refused rows stay in; they
were not timed, and have a graph size only where the engine holds their graph.
``export_s`` is the whole export: graph, parity, every search and the timing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastad.export import export_engine

from bench import timing
from bench.models import absent
from fastad.console import fastest_precisions
from fastad.engine.container import read_engine
from fastad.evaluation import evaluate
from fastad.spec import GateReport, Manifest

BASELINE = ("onnxruntime", "fp32")


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--mask-folder", default="ground_truth")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--keep", type=Path, help="where the engine goes; else it is dropped")
    options = parser.parse_args(arguments)
    about = timing.machine()
    data, masks = options.test_data, options.mask_folder
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "a.engine"
        began = time.perf_counter()
        export_engine(
            options.run, path, precision=options.precision, test_data=data, mask_folder=masks
        )
        seconds = time.perf_counter() - began
        with read_engine(path) as engine:
            manifest = engine.manifest
        full = evaluate(path, data, mask_folder=masks, runtime="openvino", precision="fp32").mean
    rows = table(manifest, (full.image_auroc, full.pixel_auroc, full.aupro))
    spec = manifest.spec
    auto = fastest_precisions(manifest.variants)
    timing.table(rows, title=f"{spec.method} on {data.name}; auto: {auto}")
    for variant in manifest.variants:
        for report in variant.gate:
            if report.refused:
                print(f"refused: {report.runtime} {report.precision}: {report.refused}")
    payload = {
        "method": spec.method,
        "config": spec.config,
        "data": data.name,
        "accuracy fp32": asdict(full),
        "export_s": round(seconds, 1),
        "auto": auto,
        "rows": rows,
        "gate": gate(manifest),
    }
    suite = timing.suite("precisions", options.name or spec.method)
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def table(manifest: Manifest, full: tuple[float | None, ...]) -> list[dict[str, Any]]:
    """One row per runtime and precision; accuracy as float32's plus the change."""
    base = {
        (r.runtime, r.precision): (r.ms_batch1, r.ms_batch8)
        for variant in manifest.variants
        for r in variant.gate
    }[BASELINE]
    rows = []
    for variant in manifest.variants:
        for report in variant.gate:
            spent = (report.ms_batch1, report.ms_batch8)  # 0: not timed
            ms = [round(own, 2) if own else None for own in spent]
            ratios = [
                round(b / own, 2) if own else None for b, own in zip(base, spent, strict=True)
            ]
            size = manifest.members[variant.member].size
            rows.append(
                {
                    "runtime": report.runtime,
                    "precision": report.precision + (" (refused)" if report.refused else ""),
                    "ms B1": ms[0],
                    "ms B8": ms[1],
                    "x B1": ratios[0],
                    "x B8": ratios[1],
                    "graph MB": None if absent(manifest, variant) else round(size / 1e6, 1),
                    "map mean": f"{report.map_mean:.1e}",
                    **accuracy(report, full),
                    "false alarms": report.false_alarm_rate,
                    "kept": len(variant.kept),
                }
            )
    return rows


def gate(manifest: Manifest) -> list[dict[str, Any]]:
    """Every report whole, with the layers kept; times of what was not timed are None."""
    return [
        asdict(report)
        | {"ms_batch1": report.ms_batch1 or None, "ms_batch8": report.ms_batch8 or None}
        | {"kept": variant.kept}
        for variant in manifest.variants
        for report in variant.gate
    ]


def accuracy(report: GateReport, full: tuple[float | None, ...]) -> dict[str, float | None]:
    """Image AUROC, pixel AUROC and AUPRO in this precision."""
    changes = (report.image_auroc_change, report.pixel_auroc_change, report.aupro_change)
    return {
        head: None if base is None or change is None else round(base + change / 100, 4)
        for head, base, change in zip(("image", "pixel", "AUPRO"), full, changes, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
