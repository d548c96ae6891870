"""The real ``tensorrt`` bindings drive our plugins, over stand-ins for the libraries below them.

Run in a process of its own, where ``tensorrt`` resolves to NVIDIA's bindings and their three
libraries are empty ones. Real are the bindings' Python: what it accepts as a plugin, the creator,
the plugin class and everything it asks of us up to the kernel. Stand-ins are the registry, the
expressions (`Expression`, `Builder`) and the receivers of the launch.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp

DTYPES = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}


class Registry:
    """Keeps creators, as the library's registry does."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        assert version == "1"
        return self.creators[namespace, name]


class Expression:
    """A dimension: a constant, the batch ``"B"``, or an operation."""

    def __init__(self, value: int | str | tuple[Any, ...]) -> None:
        self.value = value

    @property
    def __class__(self) -> Any:
        return trt.IDimensionExpr  # the bindings ask isinstance, and only the library makes one

    def is_constant(self) -> bool:
        return isinstance(self.value, int)

    def get_constant_value(self) -> int:
        assert isinstance(self.value, int)
        return self.value

    def at(self, B: int) -> int:
        if isinstance(self.value, int):
            return self.value
        if self.value == "B":
            return B
        op, a, b = self.value
        a, b = a.at(B), b.at(B)
        known = {"SUM": a + b, "SUB": a - b, "PROD": a * b, "MAX": max(a, b), "MIN": min(a, b)}
        if b:
            known |= {"CEIL_DIV": -(-a // b), "FLOOR_DIV": a // b}
        return known[op.name]


class Builder:
    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, op: Any, a: Expression, b: Expression) -> Expression:
        found = Expression((op, a, b))
        return Expression(found.at(0)) if a.is_constant() and b.is_constant() else found


class Symbol:
    """Takes the place of SymExprImpl, whose native base holds library expressions only."""

    def __init__(self, expression: Any) -> None:
        assert isinstance(expression, trtp.SymInt32), type(expression)
        self.expression = expression._expr


class Receiver:
    """The launch and the scalars, as the library receives them."""

    nbSymExprs = 0  # noqa: N815 - the name that the bindings set

    def __setitem__(self, i: int, symbol: Symbol) -> None:
        assert i < self.nbSymExprs
        self.__dict__.setdefault("scalars", {})[i] = symbol


def described(dtype: Any, shape: list[int | str]) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.dims = trt.Dims([-1 if s == "B" else s for s in shape])
    inner.type, inner.format = dtype, trt.TensorFormat.LINEAR
    desc.desc = inner
    for name, batch in (("min", 1), ("opt", 4), ("max", 8)):
        setattr(desc, name, trt.Dims([batch if s == "B" else s for s in shape]))
    return desc


def drive(case: dict[str, Any]) -> list[dict[str, Any]]:
    """From the registered creator to PTX and launch, for every tactic, static or dynamic batch."""
    op = importlib.import_module(f"fastad.ops.{case['op']}.tensorrt_impl")
    compiled: list[dict[str, Any]] = []
    original = compile_for = op.__dict__["compile_for"]

    def recording(kernel: Any, types: Any, constants: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append({"kernel": kernel.__name__, "constants": dict(constants)})
        return compile_for(kernel, types, constants, *args, **kwargs)

    op.__dict__["compile_for"] = recording
    try:
        return _drive(op, case, compiled)
    finally:
        op.__dict__["compile_for"] = original


def _drive(op: Any, case: dict[str, Any], compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    creator = REGISTRY.get_creator(op.NAME, "1", "fastad")
    fields = []
    for field in creator.field_names:  # the parser fills the creator's fields, in their order
        value = case["attributes"][field.name]
        kind = "FLOAT32" if isinstance(value, float) else "INT32"  # as ONNX attributes arrive
        array = np.array([value], kind.lower())
        fields.append(trt.PluginField(field.name, array, getattr(trt.PluginFieldType, kind)))
    plugin = creator.create_plugin(
        op.NAME,
        "fastad",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    dtypes = [DTYPES[name] for name in case["dtypes"]]
    shapes, n = case["shapes"], len(case["shapes"])
    out_types = plugin.get_output_data_types(dtypes, [len(shape) for shape in shapes])
    expressions = [[Expression(size) for size in shape] for shape in shapes]
    (out,) = plugin.get_output_shapes(expressions, [], Builder())
    out_shape = [e.value if e.value == "B" or e.is_constant() else "B" for e in out]
    ends = [
        described(t, s) for t, s in zip([*dtypes, *out_types], [*shapes, out_shape], strict=True)
    ]
    offered = plugin.get_supported_format_combinations(ends, n)
    assert len(offered) == len(ends)  # one combination: the network's own types
    assert [end.type for end in offered] == [end.desc.type for end in ends]
    plugin.configure_plugin(ends[:n], ends[n:])
    found = []
    for tactic in sorted(plugin.get_valid_tactics()):
        plugin.set_tactic(tactic)
        launch, scalars = Receiver(), Receiver()
        plugin.get_launch_params(expressions, ends, n, launch, scalars, Builder())
        name, ptx = plugin.get_kernel([e.desc for e in ends[:n]], [e.desc for e in ends[n:]])
        values = [scalars.__dict__["scalars"][i].expression for i in range(scalars.nbSymExprs)]
        found.append(
            {
                "tactic": tactic,
                "name": name,
                "ptx": ptx.decode(),
                "out_shape": [e.at(case["B"]) for e in out],
                "out_type": out_types[0].name,
                "grid": [getattr(launch, f"grid_{a}").expression.at(case["B"]) for a in "xyz"],
                "block": [getattr(launch, f"block_{a}").expression.at(0) for a in "xyz"],
                "shared_bytes": launch.shared_mem.expression.at(0),
                "scalars": [value.at(case["B"]) for value in values],
                **compiled[-1],
            }
        )
    return found


REGISTRY = Registry()


def main() -> None:
    trt.get_plugin_registry = lambda: REGISTRY
    trt.DimsExprs = lambda length: [None] * length
    importlib.import_module("tensorrt.plugin._tensor").SymExprImpl = Symbol
    cases = json.loads(sys.stdin.read())
    print(json.dumps({"tensorrt": trt.__version__, "found": [drive(case) for case in cases]}))


if __name__ == "__main__":
    main()
