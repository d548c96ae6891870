"""Which rows there are, for one run and its engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.peers.environments import ANOMALIB, Environment
from fastad.engine.container import read_engine
from fastad.errors import InputError
from fastad.spec import Manifest

BASELINE = "pytorch-eager"
OURS = "fastad-auto"


@dataclass(frozen=True)
class Row:
    """One way from a frame to a verdict. ``environment`` None is the bench's own Python."""

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None


def rows(run: Path, engine: Path) -> list[Row]:
    """All rows: what others offer first, then each form of ours that the engine allows.

    Raises:
        EngineError: the engine is missing or damaged.
    """
    model = {"run": str(run)}
    found = [
        Row(BASELINE, "bench.peers.peer_torch", {**model, "compile": False}),
        Row("pytorch-compile", "bench.peers.peer_torch", {**model, "compile": True}),
    ]
    for name, runtime, precision in (
        ("plain-onnxruntime", "onnxruntime", ""),
        ("plain-openvino-default", "openvino", ""),
        ("plain-openvino-fp32", "openvino", "f32"),
    ):
        options = {**model, "runtime": runtime, "precision": precision}
        found.append(Row(name, "bench.peers.peer_onnx", options))
    for network in ("rd", "efficientad"):
        for inferencer in ("torch", "openvino"):
            options = {"network": network, "inferencer": inferencer}
            name = f"anomalib-{network}-{inferencer}"
            found.append(Row(name, "bench.peers.peer_anomalib", options, ANOMALIB))
    with read_engine(engine) as opened:
        manifest = opened.manifest
    for name, runtime, precision in forms(manifest):
        options = {"engine": str(engine), "runtime": runtime, "precision": precision}
        found.append(Row(name, "bench.peers.peer_fastad", options))
    return found


def forms(manifest: Manifest) -> list[tuple[str, str, str]]:
    """(row, runtime, precision) of ours: auto, float32, and what passed the accuracy gate."""
    found = [(OURS, "auto", "auto")]
    full = manifest.variants[0]
    found += [(f"fastad-{runtime}-fp32", runtime, "fp32") for runtime in full.runtimes]
    for variant in manifest.variants[1:]:
        found += [
            (f"fastad-{report.runtime}-{report.precision}", report.runtime, report.precision)
            for report in variant.gate
            if not report.refused and report.runtime in variant.runtimes
        ]
    return found


def selected(available: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """Rows whose names fit a pattern such as ``anomalib-*``, and the two that all are compared
    with; every row without a pattern.

    Raises:
        InputError: a pattern that fits no row; the message lists the rows.
    """
    names = [row.name for row in available]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"--only: expected one of {', '.join(names)}, got {pattern!r}")
    wanted = [BASELINE, OURS, *patterns] if patterns else ["*"]
    return [row for row in available if any(fnmatchcase(row.name, p) for p in wanted)]
