"""One ONNX graph for every runtime: uint8 images in, anomaly map and raw score out.

Operators of fastad are nodes of the domain ``fastad``. The file says what each means in a local
function of standard operators, and the attribute ``plugin_namespace`` lets TensorRT take a plugin
instead. ONNX Runtime inlines the functions; OpenVINO translates the nodes.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import onnx
import onnxscript.optimizer
import torch

from fastad.errors import UnsupportedError
from fastad.models.deployed import DeployedGraph
from fastad.models.registry import Method
from fastad.ops.grid_interpolate import onnx_impl as grid_interpolate
from fastad.ops.neighbor_attention import onnx_impl as neighbor_attention

from .onnx_upsample import spread

OPSET = 18  # the newest that every runtime here takes in float32
DOMAIN = "fastad"
FOLD_BYTES = 1 << 26  # of one constant: positions after their projection have megabytes


def to_onnx(method: Method) -> bytes:
    """Serialised ONNX model with a dynamic batch, checked by ``onnx.checker``.

    Args:
        method: A trained method; it is put into eval mode.

    Raises:
        UnsupportedError: torch cannot express the method as a graph.
    """
    graph = DeployedGraph(method).eval()
    H, W = method.input.size
    example = torch.zeros(2, H, W, 3, dtype=torch.uint8)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    try:
        exporter_log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about the exporter's own internals
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["anomaly_map", "raw_score"],
                dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=1 << 16)}},
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(f"{method.name}: torch cannot export it: {error}") from error
    finally:
        exporter_log.setLevel(level)
        method.eval()  # exporters may restore another training flag
    assert program is not None
    model = program.model_proto
    model.producer_name, model.doc_string = "fastad", f"{method.name}: {method.score_rule}"
    for node in model.graph.node:  # traces of the exporting machine have no place in a product
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    # What depends on no image becomes an initializer: plugins take such inputs as they are.
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES
    )
    spread(model)
    onnxscript.optimizer.remove_unused_nodes(model)
    add_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return cast(bytes, model.SerializeToString())


def add_functions(model: onnx.ModelProto) -> None:
    """Give ``model`` a local function for every form of operator among its nodes."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    for operator in (grid_interpolate, neighbor_attention):
        model.functions.extend(operator.functions(nodes))


def describe_onnx(graph: bytes) -> dict[str, Any]:
    """What a program that loads the graph has to know about it."""
    model = onnx.load_from_string(graph)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return {
        "ir_version": model.ir_version,
        "opset": opsets["ai.onnx"],
        "domains": opsets,
        "functions": [f"{function.domain}::{function.name}" for function in model.functions],
    }
