"""Seconds per epoch of a recipe, with the feature cache and with the plain loop of the paper.

    python -m bench.training DATA --recipe grad.quick --weights FILE [--epochs 3]

The two loops take turns, epoch blocks interleaved; the first epoch of each block warms up and is
left out. The loss curves of both are compared before any figure is printed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import timing
from fastad.training.fit import train

LOSS_RTOL = 0.02  # shuffled batches round differently; a real difference shows as tens of percent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="grad.paper")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="turns of each loop")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--name", default="", help="of the result file")
    options = parser.parse_args(arguments)
    about = timing.machine()
    seconds: dict[str, list[float]] = {"none": [], "memory": []}
    losses: dict[str, list[float]] = {"none": [], "memory": []}
    images = 0
    with tempfile.TemporaryDirectory() as folder:
        for block in range(options.blocks):
            for cache in seconds:
                run = Path(folder) / f"{cache}-{block}"
                checkpoint = train(
                    options.data,
                    run,
                    options.recipe,
                    weights=options.weights,
                    overrides=[
                        *options.overrides,
                        f"train.epochs={options.epochs}",
                        f"train.cache={cache}",
                    ],
                )
                images = len(checkpoint.record.fit)
                with (run / "metrics.csv").open() as file:
                    table = list(csv.DictReader(file))
                losses[cache] = [float(row["loss"]) for row in table]
                seconds[cache] += [float(row["seconds"]) for row in table[1:]]
    apart = max(abs(a / b - 1) for a, b in zip(losses["none"], losses["memory"], strict=True))
    if apart > LOSS_RTOL:
        print(f"loss curves differ by {apart:.1%}, so no figures: {losses}")
        return 1
    plain = statistics.median(seconds["none"])
    rows: list[dict[str, Any]] = [
        {
            "loop": {"none": "backbone in every epoch", "memory": "features cached"}[cache],
            "images": images,
            "s per epoch": statistics.median(values),
            "times as fast": plain / statistics.median(values),
            "epochs timed": len(values),
        }
        for cache, values in seconds.items()
    ]
    timing.table(
        rows, title=f"{options.recipe} on {options.data.name}, loss curves within {apart:.1e}"
    )
    payload = {"recipe": options.recipe, "rows": rows, "loss_difference": apart}
    suite = "-".join(part for part in ("training", options.name or options.recipe) if part)
    print(timing.write_result(suite, payload, about=about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
