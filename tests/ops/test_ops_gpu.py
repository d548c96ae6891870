from __future__ import annotations

import importlib
from typing import Any

import ops_compare
import pytest
import torch

from fastad.ops import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NAMED = {op: importlib.import_module(f"fastad.ops.{op}.cases") for op in OPS}
CASES = [
    pytest.param(op, case.name, str(dtype).removeprefix("torch."))
    for op in OPS
    for case in NAMED[op].CASES
    for dtype in NAMED[op].TOLERANCE
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_kernel_equals_reference(op: str, case: str, dtype: str) -> None:
    ops_compare.compare(op, case, dtype, "cuda")


REGISTERED = [(op, NAMED[op].CASES[0].name) for op in OPS]
REGISTERED += [("neighbor_attention", f"{which} position") for which in ("key", "query")]


@pytest.mark.parametrize(("op", "name"), REGISTERED)
def test_registered_operator_reaches_the_kernel(op: str, name: str) -> None:
    cases, case = ops_compare.find_case(op, name)
    arguments: dict[str, Any] = case.make(torch.float32)
    for setting in ("tiles", "tile"):
        arguments.pop(setting, None)
    on_gpu = {k: ops_compare.move(v, "cuda") for k, v in arguments.items()}
    registered, positional = cases.call_op(**on_gpu)
    torch.library.opcheck(registered, positional)
    expected = ops_compare.as_tuple(ops_compare.judge(cases, arguments))
    rtol, atol = cases.TOLERANCE[torch.float32]
    for out, truth in zip(ops_compare.as_tuple(registered(*positional)), expected, strict=True):
        torch.testing.assert_close(out.cpu().double(), truth.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("op", OPS)
def test_replays_in_a_cuda_graph(op: str) -> None:
    cases, case = ops_compare.find_case(op, NAMED[op].CASES[0].name)
    arguments = {k: ops_compare.move(v, "cuda") for k, v in case.make(torch.float32).items()}
    for setting in ("tiles", "tile"):
        arguments.pop(setting, None)
    registered, positional = cases.call_op(**arguments)
    expected = ops_compare.as_tuple(registered(*positional))  # compiles, fills tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops_compare.as_tuple(registered(*positional))
    graph.replay()
    for out, truth in zip(captured, expected, strict=True):
        torch.testing.assert_close(out, truth, rtol=0, atol=0)
