"""Large images in tiles of their own resolution: where tiles lie, and how their maps join.

Memory at work beside the image is one batch of B tiles with its maps and those of the batch before,
B * H * W * (3 + 4 + 4) bytes for a model of H x W, and one stitched map of 4 bytes a pixel. At
4096 x 3000 pixels with tiles of the model's size, 224, and 8 of them at a time, that is 37 MB of
image, 4 MB and 49 MB; with tiles of 448 pixels the map takes a quarter of it. A region adds 1 byte
a pixel of the image, and as much again for each mask it was given as. The number of tiles adds
nothing: they are made as they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fastad import _native
from fastad.errors import InputError
from fastad.inspected import at_map, peak_and_share, too_thin
from fastad.preprocess import Frame

SMALLEST_TILE_PX = 16
LARGEST_OVERLAP = 0.9  # beyond it each pixel would be looked at more than a hundred times
MOST_TILES = 100_000  # of an image: minutes on any machine, and mostly a slip of the arguments

Run = Callable[[list[Frame]], tuple[NDArray[np.float32], list[float]]]  # maps, raw scores


@dataclass(frozen=True)
class Tiling:
    """What a call asks for, checked."""

    size: tuple[int, int]  # (H, W) in pixels of the original image
    overlap: float  # least share of a tile, along each axis, that its neighbour sees too


@dataclass(frozen=True, eq=False)
class Tile:
    """One look of the model at an image."""

    pixels: tuple[slice, slice]  # of the original image
    place: tuple[slice, slice]  # on the stitched map
    rows: NDArray[np.float32]  # [h, 1] weights; those of all tiles sum to 1 at each pixel
    columns: NDArray[np.float32]  # [1, w]
    counted: NDArray[np.bool_] | None  # view of what counts of `pixels`; None where all of it does


@dataclass(frozen=True, eq=False)
class Cut:
    """An image of one size in tiles, row by row, without those whose map reaches nothing counted.

    ``counted`` is bool [H, W] of the image's pixels; None where all count.
    """

    rows: _Axis
    columns: _Axis
    counted: NDArray[np.bool_] | None

    @property
    def map_size(self) -> tuple[int, int]:
        """(H, W) of the stitched map."""
        return self.rows.map_px, self.columns.map_px

    def tiles(self) -> Iterator[Tile]:
        """The tiles, each made when it is asked for."""
        for y, x in np.ndindex(len(self.rows.starts), len(self.columns.starts)):
            pixels = self.rows.pixels(y), self.columns.pixels(x)
            own = None
            if self.counted is not None:
                if not self.counted[self.rows.reach(y), self.columns.reach(x)].any():
                    continue
                if not self.counted[pixels].all():
                    own = self.counted[pixels]
            place = self.rows.place(y), self.columns.place(x)
            yield Tile(pixels, place, self.rows.weight(y)[:, None], self.columns.weight(x), own)


def check_tiling(tile: tuple[int, int] | int | None, overlap: float) -> Tiling | None:
    """The tiling a call asks for; None for whole images.

    Raises:
        InputError: a size below 16 pixels or an overlap outside 0..0.9.
    """
    valid = isinstance(overlap, int | float) and not isinstance(overlap, bool)
    if not (valid and 0 <= overlap <= LARGEST_OVERLAP):
        raise InputError(f"overlap: expected a share in 0..{LARGEST_OVERLAP}, got {overlap!r}")
    if tile is None:
        return None
    size = tile if isinstance(tile, tuple | list) else (tile, tile)
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in size)
    if len(size) != 2 or not whole or min(size) < SMALLEST_TILE_PX:
        raise InputError(
            f"tile: expected (H, W) or one side in whole pixels, at least {SMALLEST_TILE_PX}, got "
            f"{tile!r}"
        )
    return Tiling((int(size[0]), int(size[1])), float(overlap))


def cut(
    size: tuple[int, int],
    model_size: tuple[int, int],
    tiling: Tiling,
    counted: NDArray[np.bool_] | None,
    name: str,
) -> Cut:
    """Lay tiles over an image.

    Along each axis tiles follow each other at a fixed step that keeps the overlap (to a pixel of
    the map); the last one is pushed back inside. An axis shorter than a tile is seen whole. The map
    has the resolution of the model's map of a tile, or that of the image if that is lower. An image
    that one tile covers is looked at as without tiling.

    Args:
        size: (H, W) of the image in pixels.
        model_size: (H, W) of the model's input and map.
        tiling: Size and overlap of the tiles.
        counted: Bool [H, W], what counts of the image; None for all.
        name: What errors call the image.

    Raises:
        InputError: more than 100,000 tiles, or what counts is too thin to be seen on any tile's
            map.
    """
    lone = all(n <= tile for n, tile in zip(size, tiling.size, strict=True))
    rows, columns = (
        _Axis(n, tile, tiling.overlap, m if lone else min(m, tile, n))
        for n, tile, m in zip(size, tiling.size, model_size, strict=True)
    )
    count = len(rows.starts) * len(columns.starts)
    if count > MOST_TILES:
        raise InputError(
            f"tile, overlap: {name}, {list(size)} (H, W), takes {count} tiles of "
            f"{list(tiling.size)} with overlap {tiling.overlap:g}; expected at most {MOST_TILES}: "
            "use larger tiles or less overlap"
        )
    into = Cut(rows, columns, counted)
    shown = (
        each.counted is None or at_map(each.counted, model_size).any() for each in into.tiles()
    )
    if not any(shown):
        raise too_thin(name, model_size)
    return into


def stitch(
    frame: Frame, into: Cut, run: Run, batch: int, window: tuple[int, int] | None
) -> tuple[NDArray[np.float32], float]:
    """The stitched map of an image, float32 ``into.map_size``, and its raw score.

    Where tiles overlap, the map is their mean with weights that fall linearly to each tile's edge.
    The raw score is the largest of the tiles' own raw scores; with a region it is the method's rule
    on what counts of each tile.

    Args:
        frame: The decoded image; tiles are views of its pixels.
        into: Its tiles.
        run: Resizes frames and runs the graph: maps [B, H, W] and raw scores.
        batch: Tiles that run together at most.
        window: Of the method's score rule, in pixels of the map; None where all tiles count whole.
    """
    stitched = np.zeros(into.map_size, np.float32)
    peak, share = -math.inf, 0.0
    waiting = into.tiles()
    while tiles := list(islice(waiting, batch)):
        maps, scores = run([replace(frame, pixels=frame.pixels[tile.pixels]) for tile in tiles])
        for tile, model_map, score in zip(tiles, maps, scores, strict=True):
            own = score, 1.0
            if tile.counted is not None:
                assert window is not None
                own = peak_and_share(model_map, at_map(tile.counted, model_map.shape), window)
            if own[1] > 0:
                peak, share = max(peak, own[0]), max(share, own[1])
            shape = (len(tile.rows), tile.columns.size)
            if model_map.shape != shape:
                model_map = _native.resize_map(model_map, shape)
            stitched[tile.place] += tile.rows * (tile.columns * model_map)
    return stitched, peak / share


class _Axis:
    """Tiles along one axis: ``starts_px`` on the image and ``starts`` on the map."""

    def __init__(self, n: int, tile: int, overlap: float, side: int) -> None:
        self.tile_px = min(tile, n)
        self.side = side  # of a tile's map
        # Not rounded down: two tiles would then not reach the end.
        self.map_px = max(side, math.ceil(n * side / self.tile_px))
        # Resizing a coarse map to the image reaches half a map pixel beyond it; starts are rounded.
        self._reach_px = 0 if side == self.tile_px else math.ceil(self.tile_px / side / 2) + 1
        step = max(1, side - math.ceil(side * overlap))
        room, room_px = self.map_px - side, n - self.tile_px
        self.starts = [*range(0, room, step), room]
        self.starts_px = [round(start * room_px / room) if room else 0 for start in self.starts]
        at = np.arange(side) + 0.5
        self._fall = np.minimum(at, side - at)
        self._total = np.zeros(self.map_px)
        for i in range(len(self.starts)):
            self._total[self.place(i)] += self._fall

    def pixels(self, i: int) -> slice:
        return slice(self.starts_px[i], self.starts_px[i] + self.tile_px)

    def reach(self, i: int) -> slice:
        """The pixels of the image whose anomaly the tile's map changes."""
        start = self.starts_px[i]
        return slice(max(0, start - self._reach_px), start + self.tile_px + self._reach_px)

    def place(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i] + self.side)

    def weight(self, i: int) -> NDArray[np.float32]:
        weight: NDArray[np.float64] = self._fall / self._total[self.place(i)]
        return weight.astype(np.float32)
