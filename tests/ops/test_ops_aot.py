from __future__ import annotations

import importlib
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ops_aot
import pytest

from fastad.ops import OPS
from fastad.ops.aot import SHARED_LIMIT_BYTES


def _variants() -> list[Any]:
    pytest.importorskip("triton")
    return [
        pytest.param(op, variant.name, variant.max_registers, id=f"{op}-{variant.name}")
        for op in OPS
        for variant in importlib.import_module(f"fastad.ops.{op}.cases").aot()
    ]


@pytest.mark.parametrize("capability", ops_aot.ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize(("op", "variant", "max_registers"), _variants())
def test_compiles_within_its_ceilings_and_assembles_trimmed(
    compiler: ProcessPoolExecutor, op: str, variant: str, max_registers: int, capability: int
) -> None:
    built = compiler.submit(ops_aot.build, op, variant, capability).result()
    assert built.registers <= max_registers
    assert built.spill_bytes <= 8  # one register saved at the loop's edge, never inside
    assert built.shared_bytes <= SHARED_LIMIT_BYTES
    assert built.parameters > 0
