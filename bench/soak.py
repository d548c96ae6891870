"""Memory over many frames: does a predictor that runs for days grow?

    python -m bench.soak [ENGINE] [--frames 200000] [--through predict]

Without an engine it is the small one of the tests (GRAD at 32 px), whose graph takes next to
nothing, so that 200,000 frames fit into minutes and what surrounds the graph does most of the work.
Frames change in content, size, colours and memory layout; every tenth result also gives its map at
original size, mask and regions. Resident memory is read every 1000 frames. The slope is that of a
line through the samples behind the first tenth, in which caches fill.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import timing
from bench.fresh import ROOT, peak_bytes, rss_bytes
from fastad.camera.events import StreamResult
from fastad.prediction import Prediction
from fastad.predictor import Predictor, load

ENGINE = ROOT / "tests" / "engines" / "grad-format1.engine"
SIDES = (16, 400)  # least and largest side of a frame
EVERY = 1000  # frames between two samples
LOOKED_AT = 10
WARM_UP = 0.1  # share of the samples before the line


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("engine", type=Path, nargs="?", default=ENGINE)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--through", choices=("predict", "stream"), default="predict")
    parser.add_argument("--every", type=int, default=EVERY, help="frames between two samples")
    options = parser.parse_args(arguments)
    if options.every < 1 or options.frames < 4 * options.every:
        parser.error(f"expected at least four samples, got --frames {options.frames}")
    about = timing.machine()
    began = time.perf_counter()
    samples = []
    with load(options.engine) as predictor:
        runtime = f"{predictor.runtime.name} {predictor.runtime.precision}"
        for count, result in enumerate(results(predictor, options.frames, options.through), 1):
            if count % LOOKED_AT == 0:
                # A map of the image's size, and what there is without it.
                _ = result.anomaly_map
                if result.threshold is not None:
                    _ = result.pred_mask, result.regions
            if count % options.every == 0:
                samples.append({"frames": count, "rss_bytes": rss_bytes()})
                if len(samples) % 10 == 0:
                    print(f"{count} frames: {samples[-1]['rss_bytes'] / 1e6:.1f} MB", flush=True)
    if count != options.frames:
        raise RuntimeError(f"{options.frames} frames gave {count} results")
    seconds = time.perf_counter() - began
    row = {"engine": options.engine.stem, "through": options.through, "runtime": runtime}
    row |= {"frames": count, "minutes": seconds / 60} | growth(samples)
    row["peak MB"] = peak_bytes() / 1e6
    timing.table([row], title="Resident memory")
    suite = timing.suite("soak", options.name)
    payload = {"rows": [row], "samples": samples}
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def results(predictor: Predictor, count: int, through: str) -> Iterator[Prediction]:
    """A prediction for every frame."""
    if through == "stream":
        for result in predictor.stream(frames(count)):
            if isinstance(result, StreamResult):
                yield result.prediction
        return
    for frame in frames(count):
        found = predictor.predict(frame)
        assert isinstance(found, Prediction)
        yield found


def frames(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Frames [H, W] or [H, W, 3], uint8 or now and then float32, half of them with gaps in memory.

    They are cut from one noise image, so that making them costs little, and a new one replaces it
    every 500 frames.
    """
    rng = np.random.default_rng(seed)
    low, high = SIDES
    for i in range(count):
        if i % 500 == 0:
            noise = rng.integers(0, 256, (high, high, 3), dtype=np.uint8)
        height, width = rng.integers(low, high + 1, 2)
        y, x = rng.integers(0, high - height + 1), rng.integers(0, high - width + 1)
        frame = noise[y : y + height, x : x + width]
        if i % 5 == 0:
            frame = frame[..., 1]
        if i % 20 == 1:
            frame = frame.astype(np.float32) / 255
        yield np.ascontiguousarray(frame) if i % 2 else frame


def growth(samples: Sequence[dict[str, int]]) -> dict[str, Any]:
    """First and last sample behind the warm-up in MB, and bytes per 1000 frames between them."""
    used = samples[int(len(samples) * WARM_UP) :]
    at = np.array([sample["frames"] for sample in used], np.float64) / 1000
    held = np.array([sample["rss_bytes"] for sample in used], np.float64)
    at -= at.mean()
    slope = float((at * held).sum() / (at * at).sum())
    return {
        "first MB": held[0] / 1e6,
        "last MB": held[-1] / 1e6,
        "bytes per 1000 frames": round(slope),
    }


if __name__ == "__main__":
    sys.exit(main())
