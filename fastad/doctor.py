"""What this machine can run, and why not the rest."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastad import _native
from fastad.engine import opening
from fastad.engine.base import core_count
from fastad.engine.select import PRECISIONS, RUNTIMES, why_unsupported

PACKAGES = (
    *("openvino", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-core", "triton"),
    *("numpy", "pillow", "torch", "timm", "lightning", "onnx"),
)


@dataclass(frozen=True)
class Finding:
    """One runtime and precision on a device: usable, or the reason why not."""

    runtime: str
    precision: str
    reason: str | None
    device: str = "cpu"


@dataclass(frozen=True)
class Diagnosis:
    """Everything `fastad doctor` prints."""

    fastad: str
    machine: str
    cores: int
    native_threads: int
    int8_weight_bits: int  # 8, or 7 where sums of 8-bit weights saturate and do not run
    packages: dict[str, str | None]
    runtimes: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine."""
    return Diagnosis(
        fastad=version("fastad"),
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=core_count(),
        native_threads=_native.threads(),
        int8_weight_bits=8 if _native.sums_int8_exactly() else 7,
        packages={name: _version(name) for name in PACKAGES},
        runtimes=(
            *(
                Finding(runtime, precision, why_unsupported(runtime, precision))
                for runtime in RUNTIMES
                for precision in PRECISIONS
            ),
            *(
                Finding(gpu, precision, opening.why_unsupported(gpu, precision), "cuda")
                for gpu in opening.GPU_RUNTIMES
                for precision in PRECISIONS
            ),
        ),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
