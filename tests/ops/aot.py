"""Ahead-of-time compilation for chips that are not here, with the assembler of triton's wheel."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastad.ops.case import Aot

ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = 48 * 1024  # no launcher of TensorRT raises it
PTX_VERSION = 87  # a driver refuses what is newer than itself; sm_120 needs 8.7


@dataclass(frozen=True)
class Assembled:
    registers: int
    spill_bytes: int
    parameters: int


def compile_for(variant: Aot, module: Any, capability: int) -> Any:
    """Triton's compiled kernel: ``.metadata``, ``.asm``."""
    kernel = getattr(module, variant.kernel)
    names = kernel.arg_names
    run_time = [n for n in names if n in variant.types and n not in variant.constants]
    assert set(names) == set(variant.types) | set(variant.constants)
    aligned = [n for n in run_time if n not in variant.unaligned and variant.types[n] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature={n: variant.types[n] if n in run_time else "constexpr" for n in names},
        constexprs={n: v for n, v in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def trim(ptx: str, declared: int) -> str:
    """PTX without the scratch pointers that Triton appends to the declared arguments."""
    entry = re.search(r"\.entry\s+\w+\(\s*(.*?)\s*\)\s*\n", ptx, re.DOTALL)
    assert entry is not None
    parameters = entry.group(1).split(",\n")
    assert len(parameters) == declared + 2
    body = ptx[entry.end() :]
    for surplus in parameters[declared:]:
        name = surplus.split()[-1]
        assert f"[{name}]" not in body, f"{name} is in use"
    kept = ",\n".join(parameters[:declared])
    return ptx[: entry.start(1)] + kept + ptx[entry.end(1) :]


def assemble(ptx: str, capability: int, folder: Path) -> Assembled:
    """Run ptxas over PTX text."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    done = subprocess.run(
        [assembler.path, "-v", f"-arch={target.group(1)}", source, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers is not None and spills is not None, done.stderr
    parameters = ptx.partition(".entry")[2].partition(")")[0].count(".param")
    return Assembled(int(registers.group(1)), int(spills.group(1)), parameters)
