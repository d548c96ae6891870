"""Every file that an export writes, parsed and built by NVIDIA's own parser and builder, no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastad.export import to_onnx
from fastad.export.onnx_plugins import operators
from fastad.export.quantize import Quantizer
from test_methods import TINY

from fastad.models import Method, methods
from fastad.models.registry import build

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("needs TensorRT-RTX (pip install tensorrt-rtx)", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parent / "rtx_build.py"
CHIPS = {  # float32 from the oldest to the newest; one is enough to see types refused
    "fp32": ("SM80", "SM89", "SM120"),
    "fp16": ("SM89",),
    "int8": ("SM89",),
}


@cache
def method(name: str) -> Method:
    """The tiny model of the whole-road test, untrained."""
    settings = TINY.get(name, {}) | ({"feature_scale": 1.0} if name == "grad" else {})
    return build(name, settings, weights="random").eval()


@cache
def graph(name: str, precision: str) -> bytes:
    wide = to_onnx(method(name))
    if precision == "fp32":
        return wide
    size = method(name).input.size
    images = np.random.default_rng(0).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    quantizer = Quantizer(wide, images)
    return quantizer.int8("s8") if precision == "int8" else quantizer.float16()


def build_plans(data: bytes, *chips: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, *chips], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@cache
def plans(name: str, precision: str) -> dict[str, Any]:
    return build_plans(graph(name, precision), *CHIPS[precision])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", methods())
def test_every_exported_file_builds_for_every_chip(name: str, precision: str) -> None:
    found = plans(name, precision)
    assert "refused" not in found, found
    print(f"{name} {precision}: {found['bytes']}")
    assert set(found["bytes"]) == set(CHIPS[precision])
    assert all(size > 10_000 for size in found["bytes"].values())


def test_int8_plans_are_smaller() -> None:
    wide, narrow = (plans("rd4ad", p)["bytes"]["SM89"] for p in ("fp32", "int8"))
    assert narrow < 0.5 * wide


def test_operators_are_built_from_their_functions() -> None:
    assert operators(graph("uniad", "fp32"))
    assert "refused" not in plans("uniad", "fp32")


def test_names_what_the_parser_refuses() -> None:
    import onnx

    model = onnx.load_from_string(graph("rd4ad", "fp32"))
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Unheard", "elsewhere"
    found = build_plans(model.SerializeToString(), "SM89")
    assert "parse failed" in found["refused"] and "Unheard" in found["refused"]
