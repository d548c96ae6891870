from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastad.errors import UnsupportedError
from fastad.ops import OPS
from fastad.ops.anomaly_map import anomaly_map
from fastad.ops.check import require
from fastad.ops.grid_interpolate import grid_interpolate
from fastad.ops.neighbor_attention import neighbor_attention

FIRST = [
    pytest.param(op, case, id=f"{op}-{case.name}")
    for op in OPS
    for case in importlib.import_module(f"fastad.ops.{op}.cases").CASES[:4]
]
NAMED = {op: importlib.import_module(f"fastad.ops.{op}.cases") for op in OPS}


def called(op: str, case: Any) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and arguments that it takes."""
    arguments = case.make(torch.float32)
    for setting in ("tiles", "tile", "form", "channels_first"):
        arguments.pop(setting, None)
    registered, positional = NAMED[op].call_op(**arguments)
    return registered, positional


@pytest.mark.parametrize(("op", "case"), FIRST)
def test_passes_opcheck(op: str, case: Any) -> None:
    registered, arguments = called(op, case)
    torch.library.opcheck(registered, arguments)


class Registered(torch.nn.Module):
    def __init__(self, op: str, case: Any) -> None:
        super().__init__()
        self.registered, arguments = called(op, case)
        self.rest = arguments[1:]
        self.is_anomaly_map = op == "anomaly_map"

    def forward(self, first: Tensor) -> Any:
        if self.is_anomaly_map:
            feat_hat, *matrices = self.rest
            return self.registered("l2", [first], feat_hat, *matrices)
        return self.registered(first, *self.rest)


SINGLE = [pytest.param(op, NAMED[op].CASES[0], id=op) for op in OPS]


def first_tensor_of(arguments: tuple[Any, ...]) -> Tensor:
    return next(a[0] if isinstance(a, list) else a for a in arguments if not isinstance(a, str))


def first_tensor(op: str, case: Any) -> Tensor:
    return first_tensor_of(called(op, case)[1])


def registered_module(op: str, case: Any) -> Registered:
    module = Registered(op, case)
    if op == "anomaly_map":
        module.rest = module.rest[1:]
    return module.eval()


@pytest.mark.parametrize(("op", "case"), SINGLE)
def test_stays_one_node_in_an_export(op: str, case: Any) -> None:
    module, first = registered_module(op, case), first_tensor(op, case)
    program = torch.export.export(module, (first,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert f"fastad.{op}.default" in targets
    torch.testing.assert_close(program.module()(first), module(first))


@pytest.mark.parametrize(("op", "case"), SINGLE)
def test_compiles_without_a_graph_break(op: str, case: Any) -> None:
    module, first = registered_module(op, case), first_tensor(op, case)
    # The tracing backend: what is tested is the operator's fake, not Inductor's code.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(first), module(first))


class Models(torch.nn.Module):
    """The three functions as models call them."""

    def forward(self, q: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = neighbor_attention(q, q, q, grid=(4, 5), window=(3, 3))
        points = grid_interpolate(table, q[:, 0, :, :2].tanh())
        identity = torch.eye(4)
        levels = q.transpose(2, 3).flatten(1, 2).unflatten(2, (4, 5))
        to_map, _ = anomaly_map("l2", levels, levels * 0.5, identity, torch.eye(5))
        return read, points, to_map


Q, TABLE = torch.randn(2, 2, 20, 8), torch.randn(3, 4, 6)


def test_models_export_to_standard_operations() -> None:
    program = torch.export.export(Models().eval(), (Q, TABLE))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if "fastad" in t]
    for ours, theirs in zip(program.module()(Q, TABLE), Models()(Q, TABLE), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inference_calls_the_registered_operators() -> None:
    seen: list[str] = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Listen(), torch.no_grad():
        Models()(Q, TABLE)
    names = {f"fastad.{n}.default" for n in ("neighbor_attention", "grid_interpolate")}
    assert names | {"fastad.anomaly_map.default"} <= set(seen)


def test_models_train_through_all_of_them() -> None:
    q, table = Q.double().requires_grad_(), TABLE.double().requires_grad_()

    def losses(q: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        read = neighbor_attention(q, q, q, grid=(4, 5), window=(3, 3))
        return read, grid_interpolate(table, q[:, 0, :, :2].tanh())

    assert torch.autograd.gradcheck(losses, (q, table), fast_mode=True)


@pytest.mark.parametrize("op", ["neighbor_attention", "grid_interpolate", "anomaly_map"])
def test_registered_operators_refuse_gradients(op: str) -> None:
    registered, arguments = called(op, NAMED[op].CASES[0])
    first_tensor_of(arguments).requires_grad_()
    out = registered(*arguments)
    with pytest.raises(UnsupportedError, match="for inference; call the function"):
        (out[0] if isinstance(out, tuple) else out).sum().backward()


def test_float16_exports_keep_their_dtype() -> None:
    program = torch.export.export(Models().eval(), (Q.half(), TABLE.half()))
    read, points, _ = program.module()(Q.half(), TABLE.half())
    assert (read.dtype, points.dtype) == (torch.float16, torch.float16)


def test_a_reason_becomes_the_refusal() -> None:
    require(None)
    with pytest.raises(UnsupportedError, match=r"q: strides"):
        require("q: strides")


def test_all_operators_import_and_run_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it now fails
import importlib, torch
from fastad.ops import OPS
for op in OPS:
    cases = importlib.import_module(f"fastad.ops.{op}.cases")
    arguments = cases.CASES[0].make(torch.float32)
    arguments.pop("tiles", None)
    arguments.pop("tile", None)
    registered, positional = cases.call_op(**arguments)
    registered(*positional)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
