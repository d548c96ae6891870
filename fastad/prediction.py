"""The result of looking at one image."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastad import _native
from fastad.atomic import write_whole
from fastad.errors import InputError
from fastad.postprocess import Region, find_regions, overlay
from fastad.preprocess import Source


class Prediction:
    """Verdict, scores and map of one image; everything of image size is made on first access.

    Holds a reference to the caller's array or path (for `plot`), never a copy of the pixels.

    Attributes:
        raw_score: The method's own value, unclipped.
        pred_score: Calibrated, in (0, 1), 0.5 at the threshold, order of ``raw_score``; None
            without calibration.
        threshold: The value that was applied, in units of ``raw_score``; None if there is none.
        pred_label: True for anomalous (score above the threshold, a tie is normal); None without
            a threshold.
        category: As given to ``predict``.
        path: The file, or None for an image from memory.
        orig_shape: (H, W) of the original image.
        model_map: float32 at model size [H, W], straight from the graph; of a tiled image the maps
            of its tiles, joined.
        counted: bool [H, W] at original size, what counts; None where all does, as without
            ``region`` and ``ignore``.
        speed: Milliseconds per image, a mean over the images that ran together: ``decode`` (file
            or float array to uint8), ``preprocess``, ``inference``, ``postprocess``.
    """

    def __init__(
        self,
        *,
        raw_score: float,
        pred_score: float | None,
        threshold: float | None,
        category: str | None,
        source: Source,
        orig_shape: tuple[int, int],
        model_map: NDArray[np.float32],
        map_scale: tuple[float, float] | None,
        speed: dict[str, float],
        counted: NDArray[np.bool_] | None = None,
    ) -> None:
        self.raw_score = raw_score
        self.pred_score = pred_score
        self.threshold = threshold
        self.pred_label = None if threshold is None else raw_score > threshold
        self.category = category
        self.orig_shape = orig_shape
        self.model_map = model_map
        self.speed = speed
        self.counted = counted
        self._source = source
        self._map_scale = map_scale

    @property
    def path(self) -> Path | None:
        """The image file, or None."""
        return self._source.path

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32]:
        """float32 [H, W] at original size: ``model_map`` bilinearly resized, equal if same size.

        0 where a pixel does not count.
        """
        resized = _native.resize_map(self.model_map, self.orig_shape)
        if self.counted is not None:
            resized[~self.counted] = 0.0
        return resized

    @cached_property
    def pred_mask(self) -> NDArray[np.bool_]:
        """bool [H, W] at original size: pixels in the upper half of the calibrated map scale.

        A normal image has such pixels in 1 % of cases: the middle of the scale is the 99th
        percentile of the map's maximum over the calibration images. With tiles it has them more
        often, because that scale is one of whole images and ``threshold=`` does not move it: take
        ``mask_at(value)``.

        Raises:
            InputError: the engine is not calibrated; use ``mask_at(value)``.
        """
        return self.mask_at(self._mask_value())

    def mask_at(self, value: float) -> NDArray[np.bool_]:
        """bool [H, W] at original size: counting pixels with an anomaly map above ``value``."""
        return _native.mask_above(self.model_map, self.orig_shape, value, self.counted)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Connected parts of ``pred_mask``, highest peak first; neither mask nor map is made.

        Raises:
            InputError: as ``pred_mask``.
        """
        return find_regions(self.model_map, self.orig_shape, self._mask_value(), self.counted)

    def _mask_value(self) -> float:
        if self._map_scale is None:
            raise InputError(
                "pred_mask: the engine has no calibration; run `fastad calibrate`, or call "
                "mask_at(value) with a map value"
            )
        return (self._map_scale[0] + self._map_scale[1]) / 2

    @property
    def orig_img(self) -> NDArray[np.uint8]:
        """uint8 RGB [H, W, 3] of the original image, read again from its file on each access.

        Read-only, since it may be a view of the caller's array: draw on a copy.

        Raises:
            InputError: the file is gone, or now holds an image of another size.
        """
        frame = self._source.frame()
        if frame.size != self.orig_shape:
            raise InputError(
                f"{self._source.name}: was {list(self.orig_shape)} (H, W) when it was predicted "
                f"and is {list(frame.size)} now; predict it again"
            )
        pixels = frame.pixels if frame.pixels.ndim == 3 else frame.pixels[..., None].repeat(3, 2)
        image = pixels[..., 2::-1] if frame.swap_red_blue else pixels[..., :3]
        image.flags.writeable = False  # of this view alone
        return image

    def plot(self, *, per_image_scale: bool = False) -> NDArray[np.uint8]:
        """uint8 RGB [H, W, 3]: the image with its heat map and the outline of the mask.

        Args:
            per_image_scale: Spread the colours over this image's own map instead of the calibrated
                scale. Normal images then show red; it is also what is done without calibration.

        Raises:
            InputError: the image came from a file that is gone.
        """
        image = self.orig_img
        if self._map_scale is None or per_image_scale:
            seen = self.anomaly_map if self.counted is None else self.anomaly_map[self.counted]
            low, high = float(seen.min()), float(seen.max())
            return overlay(image, self.anomaly_map, (low, high if high > low else low + 1.0))
        return overlay(image, self.anomaly_map, self._map_scale, self.pred_mask)

    def save(self, path: str | Path) -> Path:
        """Write `plot` as an image file, complete or not at all; returns the path.

        Raises:
            InputError: the suffix is no image format, or the image came from a file that is gone.
            EngineError: the folder cannot be written, or the disk is full.
        """
        path = Path(path)
        check_image_suffix(path)
        return save_image(self.plot(), path)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: scores, verdict, regions, provenance, timing; no pixels."""
        return {
            "path": None if self.path is None else str(self.path),
            "category": self.category,
            "raw_score": self.raw_score,
            "pred_score": self.pred_score,
            "threshold": self.threshold,
            "pred_label": self.pred_label,
            "orig_shape": list(self.orig_shape),
            "regions": None
            if self._map_scale is None
            else [
                {"box": list(r.box), "area_px": r.area_px, "peak": r.peak, "mean": r.mean}
                for r in self.regions
            ],
            "speed": {stage: round(ms, 3) for stage, ms in self.speed.items()},
        }

    def to_json(self) -> str:
        """`to_dict` on one line."""
        return json.dumps(self.to_dict())

    def __repr__(self) -> str:
        verdict = {None: "no threshold", True: "anomalous", False: "normal"}[self.pred_label]
        return f"Prediction({verdict}, raw_score={self.raw_score:.6g}, path={self.path})"


def save_image(pixels: NDArray[np.uint8], path: Path) -> Path:
    """Write an image complete or not at all; returns ``path``.

    Raises:
        InputError: the suffix is no image format.
        EngineError: the folder cannot be written, or the disk is full.
    """
    check_image_suffix(path)
    kind = Image.registered_extensions()[path.suffix.lower()]
    return write_whole(path, lambda file: Image.fromarray(pixels).save(file, kind))


def check_image_suffix(path: Path) -> None:
    """Refuse a name whose suffix is no image format, before any pixel is made."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path}: expected a name that ends in .png, .jpg or another image suffix")
