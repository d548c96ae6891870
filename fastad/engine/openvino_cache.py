"""Compiled models on disk, so that the next start imports what this one compiled.

OpenVINO has a cache of its own (``CACHE_DIR``). Measured with 2026.4: it imports a damaged blob
without an error and returns wrong maps, and it reads the ONNX graph first. Here a blob is used only
if its SHA-256 fits, and is found by the graph's bytes without reading the graph.

The folder is ``fastad/openvino`` below ``$XDG_CACHE_HOME`` or ``~/.cache``, on Windows below
``%LOCALAPPDATA%``. A blob is about as large as its graph; all together keep below `MAX_BYTES`, the
ones unused for longest go first. Whatever fails here, the model is compiled instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pkgutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino as ov

from fastad.atomic import user_cache, write_whole
from fastad.errors import EngineError

MAX_BYTES = 1 << 30
LEFT_OVER_S = 3600.0  # a partial file older than this belongs to a process that was killed
_DIGEST_BYTES = 32


def folder() -> Path | None:
    """Where blobs lie, whether or not it exists; None where there is no place for them."""
    return user_cache("openvino")


def blob_path(core: ov.Core, graph: bytes, config: Mapping[str, Any]) -> Path | None:
    """The file for this graph on this CPU, OpenVINO, configuration and form of the operators."""
    place = folder()
    translations = None
    with contextlib.suppress(OSError):
        translations = pkgutil.get_data("fastad.engine", "openvino_ops.py")
    if place is None or translations is None:
        return None
    about = (
        ov.get_version(),
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        sorted(config.items()),
        hashlib.sha256(translations).hexdigest(),
        hashlib.sha256(graph).hexdigest(),
    )
    return place / f"{hashlib.sha256(repr(about).encode()).hexdigest()}.blob"


def load(core: ov.Core, path: Path, config: Mapping[str, Any]) -> ov.CompiledModel | None:
    """The compiled model of a blob, or None if there is none that is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    blob = data[_DIGEST_BYTES:]
    if hashlib.sha256(blob).digest() == data[:_DIGEST_BYTES]:
        with contextlib.suppress(RuntimeError):
            model = core.import_model(blob, "CPU", dict(config))
            with contextlib.suppress(OSError):
                os.utime(path)  # in use: others are removed first
            return model
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def store(path: Path, model: ov.CompiledModel) -> None:
    """Keep a compiled model for the next start, if the disk allows it."""
    with contextlib.suppress(OSError, EngineError, RuntimeError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stream = io.BytesIO()
        model.export_model(stream)
        blob = stream.getbuffer()
        if len(blob) + _DIGEST_BYTES > MAX_BYTES:
            return
        digest = hashlib.sha256(blob).digest()
        write_whole(path, lambda file: (file.write(digest), file.write(blob)))
        _prune(path.parent, keep=path)


def _prune(place: Path, keep: Path) -> None:
    """Remove the oldest blobs above `MAX_BYTES`, and what killed processes left."""
    found = []
    for path in place.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it first
            status = path.stat()
            if path.suffix == ".partial" and time.time() - status.st_mtime > LEFT_OVER_S:
                path.unlink()
            elif path.suffix == ".blob":
                found.append((path == keep, status.st_mtime, status.st_size, path))
    total = 0
    for _, _, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()
