"""Resize one RGB frame: fastad, Pillow and OpenCV, run with `python -m bench.resize`.

A time contains the resize and nothing else: the source is in memory in the form each library likes
best, and the result is left as a uint8 array. Pillow has one thread; the others are run with one
and with all. OpenCV's INTER_AREA and Pillow's bilinear look at every pixel; OpenCV's INTER_LINEAR
reads four pixels per output and aliases when it shrinks, so it is a lower bound, not an equal.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from bench import timing
from fastad import _native

FRAMES = [(480, 640), (1080, 1920), (2160, 3840)]  # (H, W)
SIDES = [224, 256]
ROUNDS = 60


def main(arguments: list[str] | None = None) -> int:
    options = timing.parser(__doc__).parse_args(arguments)
    about = timing.machine()
    all_threads = _native.threads()
    rows: list[dict[str, Any]] = []
    for size in FRAMES:
        for side in SIDES:
            frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
            if not equals_pillow(frame, side):
                print(f"{size} to {side}: differs from Pillow, so no figures")
                return 1
            for threads in sorted({1, all_threads}):
                rows += measure(frame, side, threads)
    _native.set_threads(all_threads)
    timing.table(rows, title="One frame, times in ms; ratio: times as fast as Pillow")
    suite, payload = timing.suite("resize", options.name), {"unit": "ms", "rows": rows}
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def equals_pillow(frame: np.ndarray, side: int) -> bool:
    out = np.empty((1, side, side, 3), np.uint8)
    _native.resize_into([frame], out)
    expected = Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR)
    return np.array_equal(out[0], np.asarray(expected))


def measure(frame: np.ndarray, side: int, threads: int) -> list[dict[str, Any]]:
    image = Image.fromarray(frame)
    out = np.empty((1, side, side, 3), np.uint8)
    _native.set_threads(threads)
    variants: dict[str, Callable[[], object]] = {
        "Pillow": lambda: np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)),
        "fastad": lambda: _native.resize_into([frame], out),
        **opencv(frame, out[0], threads),
    }
    timings = timing.compare(variants, rounds=ROUNDS, baseline="Pillow", budget_s=10.0)
    height, width = frame.shape[:2]
    return [
        {"frame": f"{width}x{height}", "to": side, "threads": threads, "by": name, **asdict(row)}
        for name, row in timings.items()
    ]


def opencv(frame: np.ndarray, out: np.ndarray, threads: int) -> dict[str, Callable[[], object]]:
    if importlib.util.find_spec("cv2") is None:
        return {}
    import cv2

    cv2.setNumThreads(threads)
    size = (out.shape[1], out.shape[0])
    return {
        "OpenCV INTER_AREA": lambda: cv2.resize(frame, size, out, interpolation=cv2.INTER_AREA),
        "OpenCV INTER_LINEAR": lambda: cv2.resize(frame, size, out, interpolation=cv2.INTER_LINEAR),
    }


if __name__ == "__main__":
    sys.exit(main())
