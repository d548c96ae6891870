"""The process behind one row: it loads one way to run a model and times it when told to.

    python -m bench.peers.worker MODULE

``MODULE`` has ``open_peer(setup) -> Peer``. Messages are JSON, one a line. The first line in is a
`Setup`, its answer ``{"ready": {...}}``. Then ``{"run": n, "images": name, "start": i}`` gets
``{"times_ms": [...], "scores": [...]}``, one entry for each of n images from the i-th on, with one
image before them that is not timed: it meets what the other rows left in the caches and on the
cores. ``{"error": "..."}`` ends the process; so does the end of the input.

Runs in the virtual environments of other packages: nothing here or above imports fastad.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

MESSAGE_LENGTH = 400  # compilers and exporters quote whole graphs; the log has all of it

# Map float32 [h, w] at the size the model makes it, and the image's score.
Verdict = tuple[NDArray[np.float32], float]


@dataclass(frozen=True)
class Setup:
    """What a worker is told before it loads anything."""

    images: dict[str, str]  # .npy file of each set, uint8 [N, H, W, 3] RGB
    threads: int
    options: dict[str, Any] = field(default_factory=dict)  # what `open_peer` of the row takes


@dataclass(frozen=True)
class Peer:
    """A loaded model. ``about`` is JSON for the result file: network, size, weights, versions."""

    predict: Callable[[NDArray[np.uint8]], Verdict]  # of one frame [H, W, 3] RGB
    about: dict[str, Any]


def main(module: str) -> int:
    # Packages print as they like; the messages keep the real output to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(module, sys.stdin, answers)
    except Exception as error:  # whatever a peer raises is the row's reason
        traceback.print_exc()
        message = " ".join(str(error).split())[:MESSAGE_LENGTH]
        _answer(answers, {"error": f"{type(error).__name__}: {message}"})
        return 1
    return 0


def serve(module: str, requests: TextIO, answers: TextIO) -> None:
    """Load the peer, then answer until the input ends."""
    setup = Setup(**json.loads(requests.readline()))
    began = time.perf_counter()
    peer: Peer = importlib.import_module(module).open_peer(setup)
    load_s = round(time.perf_counter() - began, 2)
    images = {name: np.load(path) for name, path in setup.images.items()}
    for shown in images.values():
        peer.predict(shown[0])  # what compiles on the first call of a size does it now
    _answer(answers, {"ready": {**peer.about, "load_s": load_s}})
    for line in requests:
        asked = json.loads(line)
        shown = images[asked["images"]]
        _answer(answers, run(peer, shown, asked["run"], asked["start"]))


def run(peer: Peer, images: NDArray[np.uint8], count: int, start: int) -> dict[str, list[float]]:
    """Times and scores of ``count`` images, round and round, after one that is not timed."""
    times_ms, scores = [], []
    peer.predict(images[(start - 1) % len(images)])
    for i in range(start, start + count):
        image = images[i % len(images)]
        began = time.perf_counter_ns()
        _, score = peer.predict(image)
        times_ms.append((time.perf_counter_ns() - began) / 1e6)
        scores.append(float(score))
    return {"times_ms": times_ms, "scores": scores}


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
