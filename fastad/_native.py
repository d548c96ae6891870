"""The compiled core, with arguments checked: resize, map resize, thresholding, regions.

C++ sees pointers and sizes only; every refusal is raised here, before any work. All functions are
thread-safe and release the GIL while they work.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastad.errors import EngineError, InputError

__all__ = [
    "Regions",
    "connected_components",
    "mask_above",
    "regions_above",
    "resize_into",
    "resize_map",
    "set_threads",
    "sums_int8_exactly",
    "threads",
]

# Sizes travel as C int, and 2^24 is the last size whose pixel edges float32 boxes can name.
_LARGEST_SIDE_PX = 1 << 24

_Box = tuple[float, float, float, float]

try:
    _ext = importlib.import_module("fastad._ext")
except ModuleNotFoundError as error:
    # A module that is there and does not load raises another ImportError, which passes through.
    if error.name != "fastad._ext":
        raise
    raise EngineError(
        "fastad._ext: the compiled module is not built; run `pip install .` in the source tree"
    ) from None


class Regions(NamedTuple):
    """What `regions_above` measures, one row per region."""

    box: npt.NDArray[np.int32]  # [N, 4] x0 y0 x1 y1 in pixels, ends exclusive
    area_px: npt.NDArray[np.int64]  # [N]
    peak: npt.NDArray[np.float32]  # [N] largest map value
    mean: npt.NDArray[np.float32]  # [N] mean map value


def threads() -> int:
    """Threads that work on one call, the caller's own included."""
    count: int = _ext.threads()
    return count


DEFAULT_THREADS = threads()  # the CPUs allowed, at most 8: more would mostly wait


def set_threads(count: int) -> None:
    """Set how many threads work on one call; the default is the CPUs allowed, at most 8.

    Any number of Python threads may call at once: they share ``count - 1`` helpers.

    Raises:
        InputError: ``count`` is not an integer from 1 to 256.
    """
    if not isinstance(count, int) or not 1 <= count <= 256:
        raise InputError(f"count: expected an integer from 1 to 256, got {count!r}")
    _ext.set_threads(count)


def sums_int8_exactly() -> bool:
    """Whether kernels for int8 sum products exactly on this CPU.

    Those for x86 CPUs without AVX512-VNNI and AVX-VNNI add pairs of products in 16 bits, which
    saturates unless one factor has 7 bits.
    """
    exactly: bool = _ext.sums_int8_exactly()
    return exactly


def resize_into(
    images: Sequence[npt.NDArray[np.uint8]],  # each [h, w] or [h, w, C], C = 1, 3 or 4
    out: npt.NDArray[np.uint8],  # [B, H, W, 3] C-contiguous
    *,
    swap_red_blue: bool = False,
    boxes: Sequence[_Box | None] | None = None,
) -> None:
    """Resize images of any sizes into a batch, bit for bit as Pillow does.

    Every image equals ``Image.resize((W, H), BILINEAR, box=box)`` of Pillow for modes L and RGB:
    first rows, then columns. Pillow 13 and later takes columns first where the height shrinks by
    more than twice as many pixels as the width; this function keeps the one order, so that a model
    sees the same pixels whichever Pillow is installed.
    A fourth channel is dropped without influence, as in modes RGBX and CMYK; Pillow's RGBA, which
    multiplies colour by alpha first, is not reproduced. One channel is written three times.

    Args:
        images: uint8 pixels. Rows may lie any number of bytes apart, so slices of rows and columns
            cost nothing; an image whose pixels are not adjacent within a row is copied first.
        out: Filled completely; ``out[i]`` is ``images[i]`` resized.
        swap_red_blue: Exchange channels 0 and 2: BGR in, RGB out.
        boxes: For each image, the part to resize as ``(x0, y0, x1, y1)`` in pixels, fractions
            allowed, or None for the whole image. Read as float32, as Pillow does.

    Raises:
        InputError: an image, ``out`` or a box is not as described, the counts differ, or an image
            shares memory with ``out``.
    """
    _check_batch(out)
    if len(images) != len(out):
        raise InputError(f"images: expected {len(out)}, one per row of out, got {len(images)}")
    if boxes is None:
        boxes = [None] * len(images)
    elif len(boxes) != len(images):
        raise InputError(f"boxes: expected {len(images)}, one per image, got {len(boxes)}")
    rows = [_adjacent(f"images[{i}]", image) for i, image in enumerate(images)]
    for i, image in enumerate(rows):
        if np.may_share_memory(image, out):
            raise InputError(f"images[{i}]: expected memory apart from out's; pass a copy")
    parts = [_box(f"boxes[{i}]", box, rows[i]) for i, box in enumerate(boxes)]
    _ext.resize_into(rows, out, bool(swap_red_blue), parts)


def resize_map(
    anomaly_map: npt.NDArray[np.float32],  # [h, w]
    size: tuple[int, int],  # (H, W)
) -> npt.NDArray[np.float32]:  # [H, W]
    """Resize an anomaly map bilinearly, with half-pixel centres, clamped edges, no antialiasing.

    Equals ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` and OpenCV's
    ``INTER_LINEAR`` up to float rounding. An equal size returns a copy with the same bits.

    Raises:
        InputError: ``anomaly_map`` is not float32 [h, w] or empty, or ``size`` is not (H, W).

    >>> resize_map(np.array([[0.0, 1.0]], np.float32), (1, 4))
    array([[0.  , 0.25, 0.75, 1.  ]], dtype=float32)
    """
    _check_plane("anomaly_map", anomaly_map, np.float32)
    _check_size(size)
    result: npt.NDArray[np.float32] = _ext.resize_map(np.ascontiguousarray(anomaly_map), *size)
    return result


def mask_above(
    anomaly_map: npt.NDArray[np.float32],  # [h, w]
    size: tuple[int, int],  # (H, W)
    threshold: float,
    counted: npt.NDArray[np.bool_] | None = None,  # [H, W]
) -> npt.NDArray[np.bool_]:  # [H, W]
    """True where the map, resized as `resize_map` does it, is strictly above the threshold.

    The resized map is not made: only what may be above is computed, so that a map that is below
    everywhere costs next to nothing. The comparison is exact: ``threshold`` is not rounded to
    float32 first. NaN is never above.

    Args:
        anomaly_map: At model size.
        size: Of the image.
        threshold: A map value.
        counted: Where it is False the mask is False; None counts all.

    Raises:
        InputError: ``anomaly_map`` is not float32 [h, w] or empty, ``size`` is not (H, W),
            ``threshold`` is NaN, or ``counted`` is not bool [H, W].

    >>> mask_above(np.array([[0.0, 1.0]], np.float32), (1, 4), 0.5)
    array([[False, False,  True,  True]])
    """
    result: npt.NDArray[np.bool_] = _ext.mask_above(
        *_enlarged(anomaly_map, size, threshold, counted)
    )
    return result


def regions_above(
    anomaly_map: npt.NDArray[np.float32],  # [h, w]
    size: tuple[int, int],  # (H, W)
    threshold: float,
    counted: npt.NDArray[np.bool_] | None = None,  # [H, W]
) -> Regions:
    """Measure the 8-connected regions of `mask_above`, without making the mask.

    They come in raster order of their first pixel. Means are summed in float64. Arguments and
    errors are those of `mask_above`.

    >>> regions_above(np.array([[0.0, 1.0]], np.float32), (1, 4), 0.5).box
    array([[2, 0, 4, 1]], dtype=int32)
    """
    return Regions(*_ext.regions_above(*_enlarged(anomaly_map, size, threshold, counted)))


def connected_components(
    mask: npt.NDArray[np.bool_],  # [H, W]
) -> tuple[npt.NDArray[np.int32], int]:  # [H, W], count
    """Number the 8-connected regions of a mask.

    Returns:
        Labels 1 to count in raster order of each region's first pixel, 0 for background; the count.

    Raises:
        InputError: ``mask`` is not bool [H, W] or empty.

    >>> connected_components(np.array([[True, False, True], [False, True, False]]))
    (array([[1, 0, 1],
           [0, 1, 0]], dtype=int32), 1)
    """
    _check_plane("mask", mask, np.bool_)
    labels, count = _ext.connected_components(np.ascontiguousarray(mask))
    return labels, count


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _check_plane(name: str, plane: object, dtype: type[np.generic]) -> None:
    fits = isinstance(plane, np.ndarray) and plane.dtype == dtype and plane.ndim == 2
    if not fits or not isinstance(plane, np.ndarray) or not _sides_fit(plane.shape):
        wanted = np.dtype(dtype).name
        raise InputError(f"{name}: expected {wanted} [H, W], not empty, got {_describe(plane)}")


def _check_size(size: Any) -> None:
    is_pair = isinstance(size, Sequence) and len(size) == 2
    if not is_pair or not all(isinstance(side, int | np.integer) for side in size):
        raise InputError(f"size: expected (H, W), two integers, got {size!r}")
    if not _sides_fit(size):
        raise InputError(f"size: expected sides of 1 to {_LARGEST_SIDE_PX} px, got {size}")


def _enlarged(
    anomaly_map: npt.NDArray[np.float32],
    size: tuple[int, int],
    threshold: float,
    counted: npt.NDArray[np.bool_] | None,
) -> tuple[Any, ...]:
    """Checked arguments of `mask_above` and `regions_above`, as C++ takes them."""
    _check_plane("anomaly_map", anomaly_map, np.float32)
    _check_size(size)
    if math.isnan(threshold):
        raise InputError("threshold: expected a number, got NaN; calibrate first or pass one")
    if counted is not None:
        _check_plane("counted", counted, np.bool_)
        if counted.shape != tuple(size):
            raise InputError(f"counted: expected bool {list(size)}, got {_describe(counted)}")
        counted = np.ascontiguousarray(counted)
    return np.ascontiguousarray(anomaly_map), *size, float(threshold), counted


def _check_batch(out: object) -> None:
    fits = isinstance(out, np.ndarray) and out.dtype == np.uint8 and out.ndim == 4
    if not fits or not isinstance(out, np.ndarray) or out.shape[3] != 3:
        raise InputError(f"out: expected uint8 [B, H, W, 3], got {_describe(out)}")
    if not _sides_fit(out.shape[1:3]):
        raise InputError(f"out: expected sides of 1 to {_LARGEST_SIDE_PX} px, got {out.shape}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError("out: expected a C-contiguous, writable array; allocate it with np.empty")


def _sides_fit(sides: tuple[int, ...]) -> bool:
    return all(1 <= side <= _LARGEST_SIDE_PX for side in sides)


def _adjacent(name: str, image: object) -> npt.NDArray[np.uint8]:
    """Check one image, and copy it if its pixels are not adjacent within a row."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise InputError(f"{name}: expected uint8 [H, W] or [H, W, C], got {_describe(image)}")
    channels = image.shape[2] if image.ndim == 3 else 1
    if channels not in (1, 3, 4):
        raise InputError(
            f"{name}: expected 1, 3 or 4 channels last, got {_describe(image)}; "
            "a [C, H, W] image needs transpose(1, 2, 0)"
        )
    if not _sides_fit(image.shape[:2]):
        raise InputError(f"{name}: expected sides of 1 to {_LARGEST_SIDE_PX} px, got {image.shape}")
    if image.strides[1:] != (channels, 1)[: image.ndim - 1]:
        return np.ascontiguousarray(image)
    return image


def _box(name: str, box: _Box | None, image: npt.NDArray[Any]) -> _Box:
    height, width = image.shape[:2]
    if box is None:
        return (0.0, 0.0, float(width), float(height))
    if len(box) != 4:
        raise InputError(f"{name}: expected (x0, y0, x1, y1), got {len(box)} numbers")
    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"{name}: expected 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, "
            f"got {(x0, y0, x1, y1)}; clip it to the image"
        )
    return (x0, y0, x1, y1)
