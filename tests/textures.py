"""Two generated textures with painted defects, and the settings of the tiny model of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

H, W = 72, 96  # of the images; the model sees 64 x 64
MODEL_SIZE = (64, 64)
CATEGORIES = ("grain", "stripes")
COUNTS = {"train": 16, "calibration": 24, "test": 5}  # normal images per category
FALSE_ALARM_RATE = 0.05  # 19 images support it
CONFIG = {
    "backbone": {"name": "mobilenetv3_small_050", "taps": [1, 2]},
    "size": list(MODEL_SIZE),
    "fusion": "crad-s",
    "blocks": 1,
    "feature_scale": "auto",
}


@dataclass(frozen=True)
class Textures:
    """Folders of the generated set."""

    root: Path  # MVTec layout
    calibration: Path  # normal images only

    def images(self) -> list[Path]:
        """All test images in order."""
        return sorted(self.root.glob("*/test/*/*.png"))


def texture(category: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One normal image, uint8 RGB [H, W, 3]."""
    if category == "grain":
        levels = rng.normal(110, 18, (H, W))
    else:
        phase = rng.uniform(0, 2 * np.pi)
        levels = 150 + 50 * np.sin(np.arange(W) / 4 + phase) + rng.normal(0, 6, (H, W))
    tint = np.array([1.0, 0.85, 0.7])  # red and blue differ: a swap shows
    return np.clip(levels[..., None] * tint, 0, 255).astype(np.uint8)


def _fill(folder: Path, category: str, count: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(texture(category, rng)).save(folder / f"{i:02}.png")


def make_textures(base: Path) -> Textures:
    """Write the set below ``base``."""
    rng = np.random.default_rng(0)
    data = Textures(base / "data", base / "calibration")
    for category in CATEGORIES:
        _fill(data.root / category / "train" / "good", category, COUNTS["train"], rng)
        _fill(data.root / category / "test" / "good", category, COUNTS["test"], rng)
        _fill(data.calibration / category / "good", category, COUNTS["calibration"], rng)
        for defect, level in (("hole", 0), ("chalk", 255)):
            images = data.root / category / "test" / defect
            masks = data.root / category / "ground_truth" / defect
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i in range(3):
                pixels, mask = texture(category, rng), np.zeros((H, W), np.uint8)
                y, x = rng.integers(8, H - 30), rng.integers(8, W - 30)
                mask[y : y + 20, x : x + 18] = 255
                pixels[mask > 0] = level
                Image.fromarray(pixels).save(images / f"{i:02}.png")
                Image.fromarray(mask).save(masks / f"{i:02}_mask.png")
    return data


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line left."""

    code: int
    out: str
    err: str
