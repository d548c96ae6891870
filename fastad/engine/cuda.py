"""What the CUDA runtimes share without importing a framework: driver, device names, batch sizes."""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.errors import EngineError, InputError

BUCKETS = (1, 2, 4, 8, 16, 32)  # batch sizes with buffers and a graph of their own
DLPACK_CPU, DLPACK_CUDA = 1, 2  # device kinds of the DLPack standard


def device_index(device: str) -> int | None:
    """Number of a CUDA device, None for the CPU.

    Raises:
        InputError: the name is neither ``cpu``, ``cuda`` nor ``cuda:N``.

    >>> device_index("cuda:1")
    1
    """
    if device == "cpu":
        return None
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", device) if isinstance(device, str) else None
    if found is None:
        raise InputError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    return int(found[1] or 0)


def why_absent(runtime: str, packages: tuple[str, ...], extra: str, device: str) -> str | None:
    """What a runtime lacks on this machine before anything large is imported, in a sentence.

    The driver is loaded, never started: a started one cannot be used after a fork.

    Args:
        runtime: Its name, which begins the sentence.
        packages: Import names that it needs.
        extra: The extra of this project that brings them.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        return f"{runtime}: {', '.join(missing)} not installed; pip install 'fastad[{extra}]'"
    if device_index(device) is None:
        return None
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return (
            f"{runtime}: no NVIDIA driver on this machine ({library} not found); use device='cpu'"
        )
    return None


def check_images(runtime: str, images: NDArray[Any], size: tuple[int, ...]) -> None:
    """Refuse host images that would not fit a buffer of (H, W) ``size``, before it is filled.

    Raises:
        EngineError: they are not uint8 [B, H, W, 3].
    """
    H, W = size
    if images.dtype != np.uint8 or images.shape[1:] != (H, W, 3):
        raise EngineError(
            f"{runtime}: run failed: expected uint8 [B, {H}, {W}, 3], got {images.dtype} "
            f"{list(images.shape)}"
        )


def split(count: int) -> list[tuple[int, int, int]]:
    """(start, stop, bucket) of each run that a batch of ``count`` images takes.

    Whole runs of the largest bucket first; what is left is padded up to the next bucket.

    >>> split(35)
    [(0, 32, 32), (32, 35, 4)]
    """
    runs = []
    for start in range(0, count, BUCKETS[-1]):
        stop = min(start + BUCKETS[-1], count)
        runs.append((start, stop, next(b for b in BUCKETS if b >= stop - start)))
    return runs
