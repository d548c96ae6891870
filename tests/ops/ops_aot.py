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

from fastad.ops.case import Aot

ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT_BYTES = 48 * 1024  # no launcher of TensorRT raises it
PTX_VERSION = 87  # a driver refuses what is newer than itself; sm_120 needs 8.7


@dataclass(frozen=True)
class Assembled:
    registers: int
    spill_bytes: int
    shared_bytes: int
    parameters: int
    scratch_bytes: int


def build(op: str, name: str, capability: int) -> Assembled:
    """Compile one variant, cut its PTX to the declared arguments and assemble that."""
    cases: Any = importlib.import_module(f"fastad.ops.{op}.cases")
    variant: Aot = next(v for v in cases.aot() if v.name == name)
    module = importlib.import_module(f"fastad.ops.{op}.triton_impl")
    compiled = compile_for(variant, module, capability)
    declared = sum(n not in variant.constants for n in variant.types)
    ptx = trim(compiled.asm["ptx"], declared)
    registers, spill_bytes = assemble(ptx, capability)
    meta = compiled.metadata
    parameters = ptx.partition(".entry")[2].partition(")")[0].count(".param")
    scratch = meta.global_scratch_size + meta.profile_scratch_size
    return Assembled(registers, spill_bytes, meta.shared, parameters, scratch)


def compile_for(variant: Aot, module: Any, capability: int) -> Any:
    """Triton's compiled kernel: ``.metadata``, ``.asm``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(module, variant.kernel)
    names = kernel.arg_names
    run_time = [n for n in names if n in variant.types and n not in variant.constants]
    assert set(names) == set(variant.types) | set(variant.constants)
    # TensorRT launches inputs, int32 scalars, outputs, in this order.
    kinds = "".join("s" if variant.types[n] == "i32" else "p" for n in run_time)
    assert re.fullmatch("p+s+p+", kinds), f"order of arguments: {run_time}"
    aligned = [n for n in run_time if n not in variant.unaligned]
    source = ASTSource(
        fn=kernel,
        signature={n: variant.types[n] if n in run_time else "constexpr" for n in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": True,  # the default ends with triton 3.10
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
        assert f"[{name}" not in body, f"{name} is in use"
    kept = ",\n".join(parameters[:declared])
    return ptx[: entry.start(1)] + kept + ptx[entry.end(1) :]


def assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as ptxas reports them."""
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
