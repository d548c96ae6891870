"""OpenVINO's own file format (IR): the graph with the operators already translated."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import openvino as ov

from fastad.engine.openvino_ops import read_model
from fastad.errors import UnsupportedError


def to_openvino(graph: bytes) -> tuple[bytes, bytes]:
    """``.xml`` and ``.bin`` of an ONNX graph, weights in float32, batch still dynamic.

    Any OpenVINO reads them without this package: no operation in them is ours.

    Raises:
        UnsupportedError: OpenVINO cannot read the graph.
    """
    try:
        model = read_model(ov.Core(), graph)
    except RuntimeError as error:
        raise UnsupportedError(f"openvino: cannot translate the graph: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def describe_ir(xml: bytes) -> dict[str, Any]:
    """What a program that loads the IR has to know about it."""
    root = ElementTree.fromstring(xml)
    opsets = {layer.get("version", "") for layer in root.iter("layer")}
    return {
        "ir_version": int(root.get("version", "0")),
        "written_by": ov.get_version(),
        "domains": sorted(opsets),
        "functions": [],
    }
