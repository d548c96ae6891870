"""A small data set from the texture photographs that ship inside scikit-image.

Three photographs (brick, grass, gravel; 512 x 512, public domain) are cut into 4 x 4 tiles: two of
each row and column give training crops, one calibration and one test crops. No pixel of a test
image was seen in training or calibration, and light that changes across a photograph reaches all.
Some test crops get a painted defect, plain to the eye, and its mask: the set shows that the road
works, it does not rank methods. Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fastad.errors import UnsupportedError

CATEGORIES = ("brick", "grass", "gravel")
CROP_PX = 96
TILE_PX = 128
ROLES = ("train", "calibration", "train", "test")  # a tile's is ROLES[(row + column) % 4]
COUNTS = {"train": 80, "calibration": 100, "test": 20}  # normal crops per category
DEFECTS = ("scratch", "hole", "smear", "stain")
DEFECTS_EACH = 6  # test images per category and kind
VISIBLE = 20.0  # least mean change in grey levels under the mask: a defect nobody sees is none

STAINS = ((150.0, 80.0, 30.0), (40.0, 70.0, 150.0), (60.0, 130.0, 60.0))  # rust, ink, moss

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB, or [H, W] for masks


@dataclass(frozen=True)
class DemoData:
    """Folders of the demo set."""

    root: Path  # MVTec layout: train and test
    calibration: Path  # <category>/good, normal crops of tiles of their own


def prepare(folder: Path, seed: int = 0) -> DemoData:
    """Write the set below ``folder``; existing files of the same names are replaced.

    Raises:
        UnsupportedError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise UnsupportedError(
            "demo data: needs scikit-image; pip install 'fastad[demo]'"
        ) from error
    photographs = {name: _as_rgb(getattr(data, name)()) for name in CATEGORIES}
    rng = np.random.default_rng(seed)
    root, calibration = folder / "textures", folder / "calibration"
    for category, photograph in photographs.items():
        for i, crop in enumerate(_crops(photograph, "train", COUNTS["train"], rng)):
            _save(crop, root / category / "train" / "good" / f"{i:03}.png")
        for i, crop in enumerate(_crops(photograph, "calibration", COUNTS["calibration"], rng)):
            _save(crop, calibration / category / "good" / f"{i:03}.png")
        for i, crop in enumerate(_crops(photograph, "test", COUNTS["test"], rng)):
            _save(crop, root / category / "test" / "good" / f"{i:03}.png")
        for kind in DEFECTS:
            for i, crop in enumerate(_crops(photograph, "test", DEFECTS_EACH, rng)):
                painted, mask = _paint_visibly(crop, kind, rng)
                _save(painted, root / category / "test" / kind / f"{i:03}.png")
                _save(mask, root / category / "ground_truth" / kind / f"{i:03}_mask.png")
    return DemoData(root, calibration)


def _as_rgb(gray: NDArray[np.uint8]) -> Pixels:
    return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, axis=2)


def _crops(photograph: Pixels, role: str, count: int, rng: np.random.Generator) -> list[Pixels]:
    """Crops from the tiles of one role, all tiles in turn."""
    tiles = [(r, c) for r in range(4) for c in range(4) if ROLES[(r + c) % 4] == role]
    crops = []
    for i in range(count):
        row, column = tiles[i % len(tiles)]
        y = row * TILE_PX + rng.integers(0, TILE_PX - CROP_PX + 1)
        x = column * TILE_PX + rng.integers(0, TILE_PX - CROP_PX + 1)
        crops.append(photograph[y : y + CROP_PX, x : x + CROP_PX])
    return crops


def _save(pixels: Pixels, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _paint_visibly(crop: Pixels, kind: str, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Paint until the change shows; the strongest of 50 tries if none does."""
    best: tuple[float, Pixels, Pixels] | None = None
    for _ in range(50):
        painted, mask = _paint(crop, kind, rng)
        change = float(np.abs(painted.astype(np.float64) - crop)[mask > 0].mean())
        if best is None or change > best[0]:
            best = (change, painted, mask)
        if change >= VISIBLE:
            break
    assert best is not None
    return best[1], best[2]


def _paint(crop: Pixels, kind: str, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """The crop [H, W, 3] with one defect, and its mask [H, W] (255 = defect)."""
    mask = Image.new("L", (CROP_PX, CROP_PX), 0)
    draw = ImageDraw.Draw(mask)
    x, y = rng.integers(24, CROP_PX - 24, 2)
    if kind == "scratch":
        angle, half = rng.uniform(0, np.pi), rng.uniform(26, 40)
        dx, dy = half * np.cos(angle), half * np.sin(angle)
        draw.line([x - dx, y - dy, x + dx, y + dy], fill=255, width=int(rng.integers(4, 7)))
    else:
        rx, ry = rng.uniform(11, 20, 2)
        draw.ellipse([x - rx, y - ry, x + rx, y + ry], fill=255)
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.8)), np.float64)[..., None] / 255
    if kind == "scratch":
        paint = np.full(crop.shape, rng.choice([10.0, 245.0]))
    elif kind == "hole":
        paint = np.full(crop.shape, rng.uniform(5, 30))
    elif kind == "smear":
        paint = np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(9)), np.float64)
    else:
        paint = 0.45 * crop + 0.55 * np.array(STAINS[rng.integers(len(STAINS))])
    painted = crop * (1 - soft) + paint * soft
    return np.clip(np.rint(painted), 0, 255).astype(np.uint8), np.asarray(mask)
