"""What counts of an image: regions of interest, and parts to ignore.

Both are given in pixels of the original image. What does not count is 0 on `anomaly_map` and
belongs to no mask and no region, and the score is taken from what counts. On the model's map, where
the score is made, a pixel counts if at least half of its area does.

The network still sees all of the image: what changes there from image to image can colour the map
next to it, and further away in methods with attention. Paint such parts over with a constant
before, and find the threshold with images treated the same (`Predictor.find_threshold`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastad.errors import InputError, UnsupportedError
from fastad.images import read_levels

Box: TypeAlias = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, ends exclusive
Polygon: TypeAlias = Sequence[Sequence[float]]  # corners (x, y) in pixels, at least three
Area: TypeAlias = NDArray[np.bool_] | str | os.PathLike[str] | Sequence[Box | Polygon]

_Shape = Box | NDArray[np.float64]  # a polygon is [N, 2]
_Mask = NDArray[np.bool_]

_HALF = 127  # of 255: Pillow's mean rounds each of its two passes
_KINDS = "a bool mask [H, W], a path to a mask image, or a list of boxes and polygons"


class Inspected:
    """The part of each image that counts; owns the masks of the last image size it met.

    Thread-safe.

    Args:
        region: What counts; None for all. A bool mask [H, W] of the image's size, a path to an
            image of it (what is not black counts), or a list of boxes (x0, y0, x1, y1), end
            exclusive, and polygons [(x, y), ...], in pixels of the original image. A polygon holds
            the pixels whose centres it encloses, by the even-odd rule.
        ignore: What of that does not count, in the same forms.

    Raises:
        InputError: neither of these forms, or a mask that cannot be read.
    """

    def __init__(self, region: Area | None, ignore: Area | None) -> None:
        self._areas = [
            (name, None if area is None else _parsed(name, area))
            for name, area in (("region", region), ("ignore", ignore))
        ]
        self._pixels: tuple[tuple[int, int], _Mask | None] | None = None
        self._on_map: tuple[tuple[int, int], tuple[int, int], _Mask] | None = None

    def pixels(self, size: tuple[int, int], name: str) -> _Mask | None:
        """Bool [H, W], True where an image of ``size`` counts; None where all of it does.

        Results of a call share the array: it cannot be written to.

        Raises:
            InputError: a mask of another size, a shape that leaves the image, or nothing counts;
                the message calls the image ``name``.
        """
        kept = self._pixels  # read once: another thread may replace it
        if kept is None or kept[0] != size:
            kept = self._pixels = (size, self._made(size, name))
        return kept[1]

    def on_map(self, size: tuple[int, int], map_size: tuple[int, int], name: str) -> _Mask | None:
        """`pixels` on a map [h, w] of the whole image.

        Raises:
            InputError: as `pixels`, or no pixel of the map counts.
        """
        pixels = self.pixels(size, name)
        if pixels is None:
            return None
        kept = self._on_map
        if kept is None or kept[:2] != (size, map_size):
            counted = at_map(pixels, map_size)
            if not counted.any():
                raise too_thin(name, map_size)
            kept = self._on_map = (size, map_size, counted)
        return kept[2]

    def _made(self, size: tuple[int, int], name: str) -> _Mask | None:
        (_, region), (_, ignore) = self._areas
        counted = np.ones(size, np.bool_) if region is None else _mask("region", region, size, name)
        if ignore is not None:
            counted = counted & ~_mask("ignore", ignore, size, name)
        if not counted.any():
            raise InputError(
                f"region, ignore: nothing of {name}, {list(size)} (H, W), counts; leave something"
            )
        counted.setflags(write=False)
        return None if counted.all() else counted


def at_map(pixels: _Mask, map_size: tuple[int, int]) -> _Mask:
    """Bool [h, w]: map pixels of which at least half the area (to 1 in 255) counts."""
    shares = Image.fromarray(pixels.astype(np.uint8) * 255)
    box = Image.Resampling.BOX
    return np.asarray(shares.resize(map_size[::-1], box)) >= _HALF


def too_thin(name: str, map_size: tuple[int, int]) -> InputError:
    """The refusal of an area that the model's map cannot show."""
    return InputError(
        f"region, ignore: what counts of {name} covers half of no pixel of the model's map, "
        f"{list(map_size)} (H, W); widen it, or look closer with a smaller tile"
    )


def peak_and_share(
    anomaly_map: NDArray[np.float32],  # [H, W]
    counted: _Mask,  # [H, W]
    window: tuple[int, int],  # (h, w) in pixels of the map
) -> tuple[float, float]:
    """A score rule on what counts: the largest window mean, and the largest counted share.

    The rule of a method is the maximum, over all places of a window, of the map's mean in it (1 x 1
    is the map's maximum). Here pixels that do not count are 0 in that mean. The score is peak over
    share, so that a window that counts whole, if there is any, weighs as in the whole image; parts
    narrower than a window are diluted against it.

    Returns:
        The largest mean, and the largest share of a window that counts, in 0..1.

    >>> peak_and_share(np.float32([[1, 5], [2, 9]]), np.array([[1, 1], [1, 0]], bool), (1, 1))
    (5.0, 1.0)
    """
    if not counted.any():
        return 0.0, 0.0
    if window == (1, 1):
        return float(anomaly_map[counted].max()), 1.0
    area = window[0] * window[1]
    values = np.where(counted, anomaly_map, 0)
    return _largest_sum(values, window) / area, _largest_sum(counted, window) / area


def _largest_sum(values: NDArray[np.float32] | _Mask, window: tuple[int, int]) -> float:
    h, w = window
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    sums[1:, 1:] = values.cumsum(0, dtype=np.float64).cumsum(1)
    inside = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    return float(inside.max())


def check_window(window: tuple[int, int] | None) -> tuple[int, int]:
    """The score window of an engine.

    Raises:
        UnsupportedError: the engine file does not name it.
    """
    if window is None:
        raise UnsupportedError(
            "region, ignore: the engine was written by a version of fastad that did not record its "
            "score rule in numbers; export it again from its run folder"
        )
    return window


def _parsed(name: str, area: object) -> _Mask | list[_Shape]:
    if isinstance(area, str | os.PathLike):
        return np.asarray(np.atleast_3d(read_levels(area)).any(axis=2), np.bool_)
    if isinstance(area, np.ndarray):
        if area.dtype != np.bool_ or area.ndim != 2 or not area.size:
            raise InputError(
                f"{name}: expected a bool mask [H, W], got {area.dtype} {list(area.shape)}; "
                "pass mask > 0"
            )
        return area.copy()  # the caller's next change would meet the masks kept from this one
    if not isinstance(area, list | tuple) or not area:
        raise InputError(f"{name}: expected {_KINDS}, got {area!r}")
    return [_shape(f"{name}[{i}]", shape) for i, shape in enumerate(area)]


def _shape(name: str, shape: object) -> _Shape:
    try:
        corners = np.array(shape, np.float64)
    except (TypeError, ValueError):
        corners = np.empty(0)
    finite = bool(corners.size) and bool(np.isfinite(corners).all())
    if finite and corners.shape == (4,) and (corners == np.floor(corners)).all():
        x0, y0, x1, y1 = (int(edge) for edge in corners)
        if x0 < x1 and y0 < y1:
            return x0, y0, x1, y1
    if finite and corners.ndim == 2 and corners.shape[1] == 2 and len(corners) >= 3:
        return corners
    raise InputError(
        f"{name}: expected a box (x0, y0, x1, y1) of whole pixels with x0 < x1 and y0 < y1, or a "
        f"polygon of at least three (x, y), got {shape!r}"
    )


def _mask(name: str, area: _Mask | list[_Shape], size: tuple[int, int], image: str) -> _Mask:
    if isinstance(area, np.ndarray):
        if area.shape != size:
            raise InputError(
                f"{name}: expected a mask of the size of {image}, {list(size)} (H, W), got "
                f"{list(area.shape)}"
            )
        return area
    H, W = size
    mask = np.zeros(size, np.bool_)
    for i, shape in enumerate(area):
        corners = np.reshape(np.asarray(shape, np.float64), (-1, 2))
        low, high = corners.min(0), corners.max(0)
        if (low < 0).any() or (high > (W, H)).any():
            raise InputError(
                f"{name}[{i}]: spans x {low[0]:g}..{high[0]:g} and y {low[1]:g}..{high[1]:g}, "
                f"beyond {image} of {list(size)} (H, W); clip it, or give it for this size"
            )
        if isinstance(shape, tuple):
            x0, y0, x1, y1 = shape
            mask[y0:y1, x0:x1] = True
        else:
            mask |= _filled(shape, size)
    return mask


def _filled(polygon: NDArray[np.float64], size: tuple[int, int]) -> _Mask:
    """Pixels whose centres lie inside, by the even-odd rule."""
    H, W = size
    # Every edge turns over what lies to its right, row by row.
    turns = np.zeros((H, W + 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        first, last = np.ceil(np.sort([y0, y1]) - 0.5).astype(int)
        rows = np.arange(first, last)  # none for level edges
        if len(rows):
            x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            turns[rows, np.clip(np.ceil(x - 0.5), 0, W).astype(int)] ^= True
    filled: _Mask = np.logical_xor.accumulate(turns[:, :W], axis=1)
    return filled
