"""The export layer: a checkpoint becomes one engine file, compared with PyTorch before it is kept.

Import name `fastad.export`; the folder lies beside `fastad/` so that inference code cannot reach
it by accident.
"""

if __name__ != "fastad.export":
    raise ImportError(f"this package is fastad.export, not {__name__}; import fastad.export")

from .engine import export_engine
from .gate import Limits
from .plain import export_plain
from .to_onnx import OPSET, to_onnx

__all__ = ["OPSET", "Limits", "export_engine", "export_plain", "to_onnx"]
