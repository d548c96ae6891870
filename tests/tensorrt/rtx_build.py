"""Build graphs with TensorRT-RTX for chips that are not here, by the code of `fastad build`.

A process of its own: TensorRT-RTX and whatever else a test loads need not agree on libraries. One
for all graphs, because importing the export takes longer than building. Reads a JSON line for each
graph, the path of its ONNX file and the chips; answers with one: bytes of a plan per chip, or what
was refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx
from fastad.export.to_tensorrt import BuildSettings, serialise

from fastad.errors import EngineError


def build(graph: bytes, chips: list[str]) -> dict[str, Any]:
    sizes = {}
    for chip in chips:

        def target(config: Any, chip: str = chip) -> None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(tensorrt_rtx.ComputeCapability, chip), 0)

        try:
            plan = serialise(tensorrt_rtx, graph, BuildSettings(max_batch=4), adjust=target)
        except EngineError as error:
            return {"refused": f"{chip}: {error}"}
        sizes[chip] = len(plan)
    return {"bytes": sizes}


if __name__ == "__main__":
    for line in sys.stdin:
        path, *chips = json.loads(line)
        print(json.dumps(build(Path(path).read_bytes(), chips)), flush=True)
