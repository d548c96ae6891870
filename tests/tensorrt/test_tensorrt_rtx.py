"""Every file that an export writes, parsed and built by NVIDIA's own parser and builder, no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
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
    if precision == "fp32":
        return to_onnx(method(name))
    return quantizer(name).int8("s8") if precision == "int8" else quantizer(name).float16()


@cache
def quantizer(name: str) -> Quantizer:
    size = method(name).input.size
    images = np.random.default_rng(0).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    return Quantizer(graph(name, "fp32"), images)


class Builder:
    """A process that builds; its messages go to a file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._known = folder, {}
        with (folder / "messages").open("wb") as messages:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )

    def build(self, data: bytes, *chips: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        path = self._folder / "graph.onnx"
        path.write_bytes(data)
        print(json.dumps([str(path), *chips]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, (self._folder / "messages").read_text()[-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def plans(self, name: str, precision: str) -> dict[str, Any]:
        key = name, precision
        if key not in self._known:
            self._known[key] = self.build(graph(name, precision), *CHIPS[precision])
        return self._known[key]

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    builder = Builder(tmp_path_factory.mktemp("rtx"))
    yield builder
    builder.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", methods())
def test_every_exported_file_builds_for_every_chip(
    builder: Builder, name: str, precision: str
) -> None:
    found = builder.plans(name, precision)
    assert "refused" not in found, found
    print(f"{name} {precision}: {found['bytes']}")
    assert set(found["bytes"]) == set(CHIPS[precision])
    assert all(size > 10_000 for size in found["bytes"].values())


def test_int8_plans_are_smaller(builder: Builder) -> None:
    wide, narrow = (builder.plans("rd4ad", p)["bytes"]["SM89"] for p in ("fp32", "int8"))
    assert narrow < 0.5 * wide


def test_operators_are_built_from_their_functions(builder: Builder) -> None:
    assert operators(graph("uniad", "fp32"))
    assert "refused" not in builder.plans("uniad", "fp32")


def test_names_what_the_parser_refuses(builder: Builder) -> None:
    import onnx

    model = onnx.load_from_string(graph("rd4ad", "fp32"))
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Unheard", "elsewhere"
    found = builder.build(model.SerializeToString(), "SM89")
    assert "parse failed" in found["refused"] and "Unheard" in found["refused"]
