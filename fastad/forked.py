"""What a forked child does with the runtimes it inherits: nothing, it does not even free them."""

from __future__ import annotations

import ctypes
import os
import weakref

from fastad.engine.base import Runtime

# Freeing waits for threads that a child does not have: OpenVINO and ONNX Runtime hang or abort
# there, at the latest when the interpreter ends. So each child holds them for ever.
_loaded: weakref.WeakSet[Runtime] = weakref.WeakSet()


def register(runtime: Runtime) -> None:
    """Have children of this process leave ``runtime`` alone."""
    _loaded.add(runtime)


def _hold() -> None:
    for runtime in list(_loaded):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hold)
