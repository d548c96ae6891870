"""Reports and limits that several tests of precisions need."""

from __future__ import annotations

import pytest
from fastad.export import Limits

from fastad.engine.select import why_unsupported
from fastad.spec import GateReport, Variant

needs_quantizer = pytest.mark.skipif(
    why_unsupported("onnxruntime", "fp32") is not None, reason="the quantizer is onnxruntime's"
)
NO_LOSS = Limits(0.0, 0.0, 1.1, 0.0)  # a rank correlation above 1 does not exist
ANY_LOSS = Limits(1e3, 1e3, -2.0, 1e3)


def gate(runtime: str, name: str, ms: float, refused: str = "") -> GateReport:
    return GateReport(
        runtime, name, 8, 0, 0.1, 0.01, 0.99, None, None, None, None, None, ms, ms, refused
    )


def variants(**ms: float) -> tuple[Variant, ...]:
    """Variants for openvino with these times; a negative one is refused."""
    return tuple(
        Variant(
            "model.onnx" if name == "fp32" else f"model.{name}.onnx",
            *(name, (), ("openvino",)),
            (gate("openvino", name, abs(time), "it lost 9 points" if time < 0 else ""),),
        )
        for name, time in ms.items()
    )
