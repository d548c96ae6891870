"""Large images in tiles of their own resolution: where tiles lie, and how their maps join.

Memory at work beside the image is one batch of B tiles with its maps and those of the batch before,
B * H * W * (3 + 4 + 4) bytes for a model of H x W, and one stitched map of 4 bytes a pixel. At
4096 x 3000 pixels with tiles of the model's size, 224, and 8 of them at a time, that is 37 MB of
image, 4 MB and 49 MB; with tiles of 448 pixels the map takes a quarter of it. A region adds a mask
of 1 byte a pixel of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastad import _native
from fastad.errors import InputError
from fastad.inspected import at_map, peak_and_share, too_thin
from fastad.preprocess import Frame

SMALLEST_TILE_PX = 16
LARGEST_OVERLAP = 0.9  # beyond it each pixel would be looked at more than a hundred times

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
    counted: NDArray[np.bool_] | None  # at model size; None where all of it counts


@dataclass(frozen=True, eq=False)
class Cut:
    """An image of one size in tiles, row by row; tiles that show nothing that counts are left out.

    ``map_size`` is (H, W) of the stitched map.
    """

    map_size: tuple[int, int]
    tiles: tuple[Tile, ...]


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
        InputError: what counts is too thin to be seen on any tile's map.
    """
    lone = all(n <= tile for n, tile in zip(size, tiling.size, strict=True))
    rows, columns = (
        _Axis(n, tile, m, tiling.overlap, m if lone else min(m, tile, n))
        for n, tile, m in zip(size, tiling.size, model_size, strict=True)
    )
    tiles: list[Tile] = []
    for y, row in enumerate(rows.starts_px):
        for x, column in enumerate(columns.starts_px):
            pixels = (slice(row, row + rows.tile_px), slice(column, column + columns.tile_px))
            own = None
            if counted is not None:
                # One map pixel more: the map is resized, and its neighbours reach what counts.
                around = tuple(
                    slice(max(0, part.start - axis.map_pixel_px), part.stop + axis.map_pixel_px)
                    for part, axis in zip(pixels, (rows, columns), strict=True)
                )
                if not counted[around].any():
                    continue
                if not counted[pixels].all():
                    own = at_map(counted[pixels], model_size)
            place = (rows.place(y), columns.place(x))
            tiles.append(Tile(pixels, place, rows.weight(y)[:, None], columns.weight(x), own))
    if all(tile.counted is not None and not tile.counted.any() for tile in tiles):
        raise too_thin(name, model_size)
    return Cut((rows.map_px, columns.map_px), tuple(tiles))


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
    for start in range(0, len(into.tiles), batch):
        tiles = into.tiles[start : start + batch]
        maps, scores = run([replace(frame, pixels=frame.pixels[tile.pixels]) for tile in tiles])
        for tile, model_map, score in zip(tiles, maps, scores, strict=True):
            own = score, 1.0
            if tile.counted is not None:
                assert window is not None
                own = peak_and_share(model_map, tile.counted, window)
            if own[1] > 0:
                peak, share = max(peak, own[0]), max(share, own[1])
            shape = (len(tile.rows), tile.columns.size)
            if model_map.shape != shape:
                model_map = _native.resize_map(model_map, shape)
            stitched[tile.place] += tile.rows * (tile.columns * model_map)
    return stitched, peak / share


class _Axis:
    """Tiles along one axis: ``starts_px`` on the image and ``starts`` on the map."""

    def __init__(self, n: int, tile: int, model: int, overlap: float, side: int) -> None:
        self.tile_px = min(tile, n)
        self.side = side  # of a tile's map
        # Not rounded down: two tiles would then not reach the end.
        self.map_px = max(side, math.ceil(n * side / self.tile_px))
        self.map_pixel_px = math.ceil(self.tile_px / side) + 1  # starts are rounded
        step = max(1, side - math.ceil(side * overlap))
        room, room_px = self.map_px - side, n - self.tile_px
        self.starts = [*range(0, room, step), room]
        self.starts_px = [round(start * room_px / room) if room else 0 for start in self.starts]
        at = np.arange(side) + 0.5
        self._fall = np.minimum(at, side - at)
        self._total = np.zeros(self.map_px)
        for i in range(len(self.starts)):
            self._total[self.place(i)] += self._fall

    def place(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i] + self.side)

    def weight(self, i: int) -> NDArray[np.float32]:
        weight: NDArray[np.float64] = self._fall / self._total[self.place(i)]
        return weight.astype(np.float32)
