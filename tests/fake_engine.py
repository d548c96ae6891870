"""A predictor without a network: its map is a plain function of the pixels of its input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad.engine.base import Outputs, Precision
from fastad.inspected import peak_and_share
from fastad.predictor import Predictor
from fastad.spec import Calibration, InputSpec, Manifest, ModelSpec, Threshold


class MapIsRed:
    """The map is the red channel, the score its rule; remembers every batch it was given."""

    name = "fake"
    precision: Precision = "fp32"

    def __init__(self, window: tuple[int, int] = (1, 1), keep: bool = True) -> None:
        self.window, self.keep = window, keep
        self.batches: list[NDArray[np.uint8]] = []
        self.counts: list[int] = []

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        self.counts.append(len(images))
        if self.keep:
            self.batches.append(images.copy())
        maps = images[..., 0].astype(np.float32)
        all_counts = np.ones(maps.shape[1:], np.bool_)
        scores = [peak_and_share(one, all_counts, self.window)[0] for one in maps]
        return maps, np.array(scores, np.float32)

    def close(self) -> None:
        pass


CALIBRATION = Calibration(0.01, Threshold(100.0, 50.0, 99), {}, (50.0, 150.0))


def fake_predictor(
    size: tuple[int, int], window: tuple[int, int] | None = (1, 1), **changes: Any
) -> tuple[Predictor, MapIsRed]:
    """A predictor whose model sees ``size`` (H, W), without calibration unless one is given."""
    spec = ModelSpec("fake", InputSpec(size), {}, score_window=window)
    manifest = Manifest(spec, (), changes.get("calibration"), {})
    runtime = MapIsRed(window or (1, 1), changes.get("keep", True))
    return Predictor(manifest, runtime), runtime
