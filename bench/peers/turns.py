"""Workers take turns; their times become the rows of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench import timing
from bench.peers.process import WorkerError


class Runs(Protocol):
    """What a turn needs of a `Worker`."""

    def run(self, count: int, images: str, start: int) -> dict[str, list[float]]:
        """Times and scores of ``count`` images."""


@dataclass
class Measured:
    """What the turns of one row gave, by set of images; a failed row keeps its reason only."""

    times_ms: dict[str, list[list[float]]] = field(default_factory=dict)  # one list a turn
    scores: dict[str, list[float]] = field(default_factory=dict)  # of image 0, 1, ...
    reason: str = ""


def take_turns(
    workers: Mapping[str, Runs],
    images: Mapping[str, int],  # name of a set: how many images it has
    *,
    rounds: int,
    count: int,
    budget_s: float,
) -> dict[str, Measured]:
    """A B C A B C ...: each worker in turn times ``count`` images of every set.

    All rows of a round see the same images; the next round begins where it ended. After at least
    three rounds, ``budget_s`` ends it early. A worker that fails is left out from then on.
    """
    found = {name: Measured() for name in workers}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - began > budget_s:
            break
        for name, worker in workers.items():
            row = found[name]
            if row.reason:
                continue
            try:
                for shown, size in images.items():
                    start = done * count % size
                    answer = worker.run(count, shown, start)
                    row.times_ms.setdefault(shown, []).append(answer["times_ms"])
                    scores = row.scores.setdefault(shown, [])
                    # The first round through the set fills it; later ones repeat it.
                    scores += answer["scores"][: max(0, size - len(scores))]
            except WorkerError as error:
                found[name] = Measured(reason=str(error))
    return found


def summary(
    turns: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]] | None,
    ours: Sequence[Sequence[float]] | None,
) -> dict[str, Any]:
    """Median and 90th percentile over all images, and two ratios of speeds.

    ``ratio`` is how many times as fast as the baseline the row is, ``ours_ratio`` how many times
    as fast as the row ours is. Ratios are of medians within a round, and of those the median.
    """
    times_ms = [time_ms for turn in turns for time_ms in turn]
    return {
        "p50_ms": statistics.median(times_ms),
        "p90_ms": timing.percentile(times_ms, 90),
        "runs": len(times_ms),
        "ratio": None if baseline is None else _speed(turns, baseline),
        "ours_ratio": None if ours is None else _speed(ours, turns),
    }


def _speed(fast: Sequence[Sequence[float]], slow: Sequence[Sequence[float]]) -> float:
    """How many times as fast, within each round."""
    pairs = zip(fast, slow, strict=True)
    return statistics.median(statistics.median(s) / statistics.median(f) for f, s in pairs)


def score_difference(scores: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Largest difference from the baseline's raw scores over the largest of those."""
    pairs = list(zip(scores, baseline, strict=True))
    largest = max((abs(b) for _, b in pairs), default=0.0)
    return max(abs(s - b) for s, b in pairs) / largest if largest else None
