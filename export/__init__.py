"""The export layer: a checkpoint becomes one engine file, compared with PyTorch before it is kept.

Import name `fastad.export`; the folder lies beside `fastad/` so that inference code cannot reach
it by accident.
"""

if __name__ != "fastad.export":
    raise ImportError(f"this package is fastad.export, not {__name__}; import fastad.export")

from .engine import export_engine
from .to_onnx import OPSET, to_onnx

__all__ = ["OPSET", "export_engine", "to_onnx"]
