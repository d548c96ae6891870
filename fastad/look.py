"""Decoded frames through the graph: whole or in tiles, and all of them or the part that counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fastad import tiling
from fastad.errors import EngineError
from fastad.feed import Feed
from fastad.inspected import Area, Inspected, check_window, peak_and_share
from fastad.preprocess import Frame, Source
from fastad.spec import ModelSpec

BATCH = 8  # images or tiles per run: larger batches gain nothing on CPUs and cost memory

Frames = list[tuple[Source, Frame]]
Map = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Aim:
    """What of each image is looked at, and how closely, checked."""

    tiling: tiling.Tiling | None  # None: whole images
    inspected: Inspected | None  # None: all of each image counts


@dataclass(frozen=True, eq=False)
class Look:
    """What the graph said of one image."""

    model_map: Map  # [H, W] at model size, or stitched
    raw_score: float
    counted: NDArray[np.bool_] | None  # bool [H, W] of the image's pixels; None where all count


class Graph:
    """A runtime in one call: resizes and runs, and adds up the seconds of both and of waiting."""

    def __init__(self, feed: Feed, spec: ModelSpec) -> None:
        self.spec, self.size = spec, spec.input.size
        self.preprocess_s = self.inference_s = self.waited_s = 0.0
        self._feed = feed

    def look(self, frames: Frames, aim: Aim) -> list[Look]:
        """One result for each frame.

        Raises:
            InputError: an area that does not fit an image, before the graph runs.
            EngineError: the runtime fails, or a score is not finite.
        """
        return self._in_tiles(frames, aim) if aim.tiling else self._at_once(frames, aim)

    def _at_once(self, frames: Frames, aim: Aim) -> list[Look]:
        counted, on_map = [], []
        for source, frame in frames:
            area = aim.inspected
            counted.append(area.pixels(frame.size, source.name) if area else None)
            on_map.append(area.on_map(frame.size, self.size, source.name) if area else None)
        names = [source.name for source, _ in frames]
        maps, scores = self._run(names, [frame for _, frame in frames])
        looks = []
        for model_map, raw, mask, seen in zip(maps, scores, counted, on_map, strict=True):
            if seen is not None:
                window = check_window(self.spec.score_window)
                peak, share = peak_and_share(model_map, seen, window)
                raw = peak / share
            looks.append(Look(model_map, raw, mask))
        return looks

    def _in_tiles(self, frames: Frames, aim: Aim) -> list[Look]:
        assert aim.tiling is not None
        cuts = []
        for source, frame in frames:
            area, name = aim.inspected, source.name
            mask = area.pixels(frame.size, name) if area else None
            cuts.append((tiling.cut(frame.size, self.size, aim.tiling, mask, name), mask))
        looks = []
        for (source, frame), (into, mask) in zip(frames, cuts, strict=True):
            run = partial(self._run, [source.name] * BATCH)
            found = tiling.stitch(frame, into, run, BATCH, self.spec.score_window)
            looks.append(Look(*found, mask))
        return looks

    def _run(self, names: list[str], frames: list[Frame]) -> tuple[Map, list[float]]:
        fed = self._feed.run(frames)
        self.preprocess_s += fed.preprocess_s
        self.waited_s += fed.waited_s
        self.inference_s += fed.inference_s
        raw_scores: list[float] = fed.raw_score.tolist()
        for name, raw in zip(names, raw_scores, strict=False):
            if not math.isfinite(raw):  # no threshold holds back a NaN: it would pass as normal
                runtime = self._feed.runtime
                raise EngineError(
                    f"{name}: the raw score is {raw} on {runtime.name} {runtime.precision}; "
                    "run `fastad verify` on the engine"
                )
        return fed.anomaly_map, raw_scores


def aim_at(
    spec: ModelSpec,
    tile: tuple[int, int] | int | None,
    overlap: float,
    region: Area | None,
    ignore: Area | None,
) -> Aim:
    """Check what a call asks for; `Predictor.predict` describes the arguments.

    Raises:
        InputError: an argument that cannot be used.
        UnsupportedError: an area, and an engine that does not record its score rule.
    """
    tiles, inspected = tiling.check_tiling(tile, overlap), None
    if region is not None or ignore is not None:
        check_window(spec.score_window)
        inspected = Inspected(region, ignore)
    return Aim(tiles, inspected)
