"""An engine file's graph as TensorRT's parser takes it, changed in memory in front of the parser.

Nodes of domain ``fastad`` become nodes of the
plugins that a build registers; a plugin's name carries the revision of its kernel, which an engine
file must not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx
from onnx import NodeProto, helper

from fastad.errors import EngineError

DOMAIN = "fastad"
_ATTENTION = re.compile("NeighborAttention(Q?)(K?)")
_INTERPOLATE = re.compile("GridInterpolate([0-9]+)D(PerImage)?(?:Gather)?")


def operators(graph: bytes) -> tuple[str, ...]:
    """Names of the fastad operators in a serialised graph, sorted."""
    model = onnx.load_from_string(graph)
    return tuple(sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN}))


def to_plugins(graph: bytes, names: Mapping[str, str], capability: int) -> bytes:
    """Graph whose fastad nodes ask for plugins and have no function to fall back on.

    Args:
        graph: Serialised ONNX.
        names: Registered plugin of ``NeighborAttention`` and ``GridInterpolate``.
        capability: 80 or 90, the form of the kernels; becomes an attribute.

    Raises:
        EngineError: the graph holds an operator that has no plugin.
    """
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if match := _ATTENTION.fullmatch(node.op_type):
            settings = _attention(node, given, bool(match[1]), bool(match[2]))
            kind = "NeighborAttention"
        elif match := _INTERPOLATE.fullmatch(node.op_type):
            settings, kind = {"per_image": int(match[2] is not None)}, "GridInterpolate"
        else:
            raise EngineError(
                f"graph: {node.op_type} has no TensorRT plugin; build with plugins off"
            )
        node.op_type = names[kind]
        # In the order of the plugin's fields, which TensorRT hands on by position.
        settings |= {"capability": capability, "plugin_namespace": DOMAIN, "plugin_version": "1"}
        settings |= {"aot": 1}
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(*setting) for setting in settings.items())
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    result: bytes = model.SerializeToString()
    return result


def _attention(
    node: NodeProto, given: Mapping[str, int | float], has_q: bool, has_k: bool
) -> dict[str, int | float | str]:
    """Attributes of the plugin; its inputs are always five, of which an absent one is not read."""
    q, k, v, *positions = node.input
    q_position = positions.pop(0) if has_q else q
    k_position = positions.pop(0) if has_k else k
    del node.input[:]
    node.input.extend((q, k, v, q_position, k_position))
    settings: dict[str, int | float | str] = {"positions": has_q + 2 * has_k}
    names = ("grid_width", "window_height", "window_width", "scale")
    return {name: given[name] for name in names} | settings
