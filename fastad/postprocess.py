"""From a map at model size to what people look at: original size, mask, regions, heat map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastad import _native

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Region:
    """One connected defect, in pixels of the original image."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1, end exclusive
    area_px: int
    peak: float  # of the anomaly map
    mean: float


def find_regions(
    model_map: Map,  # [h, w]
    size: tuple[int, int],  # (H, W) of the image
    value: float,
    counted: NDArray[np.bool_] | None,  # [H, W]
) -> tuple[Region, ...]:
    """Connected parts (8 neighbours) of the image where its map is above, highest peak first."""
    stats = _native.regions_above(model_map, size, value, counted)
    found = [
        Region((int(x0), int(y0), int(x1), int(y1)), int(area), float(peak), float(mean))
        for (x0, y0, x1, y1), area, peak, mean in zip(
            stats.box, stats.area_px, stats.peak, stats.mean, strict=True
        )
    ]
    return tuple(sorted(found, key=lambda region: -region.peak))


def _heat_colors() -> NDArray[np.uint8]:
    """256 RGB colours, dark blue to red through white-yellow, rising in lightness to the middle."""
    anchors = np.array(
        [
            [20, 20, 90],
            [40, 90, 200],
            [120, 190, 210],
            [250, 220, 90],
            [235, 110, 40],
            [170, 10, 30],
        ]
    )
    at = np.linspace(0, len(anchors) - 1, 256)
    columns = [np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.stack(columns, 1).astype(np.uint8)


_COLORS = _heat_colors()


def overlay(
    image: NDArray[np.uint8],  # [H, W, 3] RGB
    anomaly_map: Map,  # [H, W]
    scale: tuple[float, float],  # map values of the first and last colour
    mask: NDArray[np.bool_] | None = None,  # [H, W], drawn as outline
) -> NDArray[np.uint8]:  # [H, W, 3] RGB
    """Blend a heat map over an image; the blend grows with the heat, so normal parts stay as is."""
    heat = np.clip((anomaly_map - scale[0]) / (scale[1] - scale[0]), 0.0, 1.0)
    alpha = (0.75 * heat)[..., None]
    colors = _COLORS[(heat * 255).astype(np.uint8)]
    blended: NDArray[np.uint8] = (image * (1 - alpha) + colors * alpha).astype(np.uint8)
    if mask is not None:
        blended[_outline(mask)] = (255, 0, 255)
    return blended


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner: NDArray[np.bool_] = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner
