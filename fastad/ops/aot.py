"""Triton kernels compiled ahead of time, into PTX that TensorRT or a bare driver can launch.

Runs on machines without a GPU, with the assembler of triton's wheel. Not in a process that was
started with TRITON_INTERPRET: kernels are interpreter objects there.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from fastad.errors import UnsupportedError

SHARED_LIMIT_BYTES = 48 * 1024  # no launcher of TensorRT raises it
PORTABLE = 80  # its PTX assembles for every newer chip
HOPPER = 90  # its PTX, sm_90a, runs on 9.0 only


@dataclass(frozen=True)
class Compiled:
    """One kernel for one chip.

    Attributes:
        name: Entry point in the PTX.
        ptx: Assembly whose entry takes the declared arguments and nothing else.
        block: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    name: str
    ptx: str
    block: int
    shared_bytes: int


def capability_for(major: int, minor: int, *, portable: bool = False) -> int:
    """Which PTX a GPU of compute capability ``major.minor`` gets: 80 or 90.

    Raises:
        UnsupportedError: the GPU is older than Ampere.
    """
    if major < 8:
        raise UnsupportedError(
            f"GPU: the kernels need compute capability 8.0 or newer, this one has {major}.{minor}; "
            "build without plugins"
        )
    return HOPPER if (major, minor) == (9, 0) and not portable else PORTABLE


def ptx_version(capability: int) -> int:
    """ISA version to emit: a driver refuses what is newer than itself; sm_120 needs 8.7."""
    return 80 if capability <= HOPPER else 87


def compile_for(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    aligned: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile a kernel whose run-time arguments are input pointers, int32 scalars, outputs.

    Args:
        kernel: A ``triton.jit`` function.
        types: Triton type of every run-time argument: ``"*fp16"``, ``"i32"``.
        constants: Compile-time arguments; one that is also in ``types`` is fixed to its value.
        capability: 80 for the portable form, 90 for Hopper alone, or another chip.
        aligned: Arguments that are multiples of 16 (pointers: bytes), for wide loads.
        num_warps: Of a block.
        num_stages: Of the software pipeline.

    Raises:
        UnsupportedError: the arguments stand in an order TensorRT cannot launch, or the kernel
            needs scratch memory or more than 48 KiB of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    run_time = [name for name in names if name in types and name not in constants]
    kinds = "".join("s" if types[name] == "i32" else "p" for name in run_time)
    label = kernel.__name__
    if set(names) != set(types) | set(constants) or not re.fullmatch("p+s*p+", kinds):
        raise UnsupportedError(
            f"{label}: expected input pointers, int32 scalars, output pointers, constants; got "
            f"{', '.join(names)}"
        )
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] if name in run_time else "constexpr" for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "ptx_version": ptx_version(capability),
        "enable_fp_fusion": True,  # the default ends with triton 3.10
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    meta = compiled.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise UnsupportedError(f"{label}: needs scratch memory, which no plugin can pass")
    if meta.shared > SHARED_LIMIT_BYTES:
        raise UnsupportedError(
            f"{label}: needs {meta.shared} bytes of shared memory, {SHARED_LIMIT_BYTES} are "
            "allowed; choose smaller tiles"
        )
    ptx = trim(compiled.asm["ptx"], len(run_time))
    return Compiled(meta.name, ptx, 32 * meta.num_warps, meta.shared)


def trim(ptx: str, declared: int) -> str:
    """PTX without the scratch pointers that Triton appends to the declared arguments.

    What a launch would read for them is undocumented, and TensorRT cannot pass them.

    Raises:
        UnsupportedError: there are not exactly two, or the body uses one.
    """
    entry = re.search(r"\.entry\s+\w+\(\s*(.*?)\s*\)\s*\n", ptx, re.DOTALL)
    parameters = entry.group(1).split(",\n") if entry else []
    if entry is None or len(parameters) != declared + 2:
        raise UnsupportedError(
            f"PTX: expected {declared} declared parameters and 2 scratch pointers, got "
            f"{len(parameters)}; this triton is not known to fastad"
        )
    body = ptx[entry.end() :]
    for surplus in parameters[declared:]:
        name = surplus.split()[-1]
        if re.search(rf"\b{name}\b", body):
            raise UnsupportedError(f"PTX: the scratch pointer {name} is in use")
    kept = ",\n".join(parameters[:declared])
    # Line tables of the Triton source double the size and serve no one in a plan.
    body = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", body, flags=re.MULTILINE)
    body = body.partition("\t.section\t.debug_")[0]
    return ptx[: entry.start(1)] + kept + ptx[entry.end(1) : entry.end()] + body


@cache
def revision(module: ModuleType) -> str:
    """Eight hex digits over a kernel file and this one, for the names of plugins.

    A timing cache knows a plugin by its name only, so another kernel needs another name.
    """
    text = inspect.getsource(module) + inspect.getsource(sys.modules[__name__])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
