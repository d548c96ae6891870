"""Ahead-of-time compilation for chips that are not here, with the assembler of triton's wheel.

Runs in a process without TRITON_INTERPRET; triton is imported only there.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastad.ops import aot
from fastad.ops.case import Aot

ARCHITECTURES = (80, 90, 100, 120)


@dataclass(frozen=True)
class Assembled:
    registers: int
    spill_bytes: int
    shared_bytes: int
    parameters: int


def build(op: str, name: str, capability: int) -> Assembled:
    """Compile one variant, cut its PTX to the declared arguments and assemble that."""
    cases: Any = importlib.import_module(f"fastad.ops.{op}.cases")
    variant: Aot = next(v for v in cases.aot() if v.name == name)
    kernel = getattr(importlib.import_module(f"fastad.ops.{op}.triton_impl"), variant.kernel)
    run_time = [n for n in variant.types if n not in variant.constants]
    compiled = aot.compile_for(
        kernel,
        variant.types,
        variant.constants,
        capability,
        aligned=[n for n in run_time if n not in variant.unaligned],
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )
    registers, spill_bytes = assemble(compiled.ptx, capability)
    parameters = compiled.ptx.partition(".entry")[2].partition(")")[0].count(".param")
    assert parameters == len(run_time)
    return Assembled(registers, spill_bytes, compiled.shared_bytes, parameters)


def assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as ptxas reports them for the PTX's own target."""
    from triton import knobs

    blackwell = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)
    assembler = blackwell if capability >= 100 else knobs.nvidia.ptxas
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [assembler.path, "-v", f"-arch={target.group(1)}", source, "-o", f"{source}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers is not None and spills is not None, done.stderr
    return int(registers.group(1)), int(spills.group(1))
