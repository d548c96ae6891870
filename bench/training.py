"""Seconds per epoch of a recipe: the plain loop of the papers, cached features, and options.

    python -m bench.training DATA --recipe grad.quick --weights FILE [--epochs 3]

All loops take turns, epoch blocks interleaved; the first epoch of each block warms up and is left
out. A loop whose loss curve leaves its bound around the plain one's prints no speed. For a method
without a backbone the cache holds decoded images.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import timing
from fastad.models import build
from fastad.training.fit import train
from fastad.training.recipe import load_recipe

# Relative bounds on an epoch's loss. Without cache a backbone sees shuffled batches and rounds
# differently, as do other memory layouts: a real difference shows as tens of percent.
ROUNDING_RTOL = 0.02
# Layers in bfloat16 keep 8 bits, 0.2 % of a value each; on top of the other rounding.
BFLOAT16_RTOL = 0.05


@dataclass(frozen=True)
class Loop:
    """One way to train: its name, the overrides that make it, and the bound on its losses."""

    name: str
    overrides: tuple[str, ...]
    loss_rtol: float = ROUNDING_RTOL


def loops(has_backbone: bool) -> list[Loop]:
    """The plain loop first, then what is compared with it."""
    plain, cached = "backbone in every epoch", "features cached"
    if not has_backbone:
        plain, cached = "images decoded in every visit", "decoded images cached"
    kept, exact = ("train.cache=memory",), ("train.autocast=none", "train.channels_last=false")
    return [
        Loop(plain, ("train.cache=none", *exact)),
        Loop(cached, (*kept, *exact)),
        Loop(f"{cached}, bf16 autocast", (*kept, *exact, "train.autocast=bf16"), BFLOAT16_RTOL),
        Loop(f"{cached}, channels last", (*kept, *exact, "train.channels_last=true")),
    ]


def has_backbone(recipe: str, overrides: Sequence[str]) -> bool:
    """Whether the method hands on something else than the image it is given."""
    chosen = load_recipe(recipe, overrides)
    method = build(chosen.method, chosen.config, weights="random").eval()
    image = torch.zeros(1, 3, *method.input.size)
    return not any(feature is image for feature in method.features(image))


def measured(
    data: Path, run: Path, recipe: str, weights: str, overrides: Sequence[str]
) -> tuple[list[float], list[float], int]:
    """Loss and seconds of every epoch of one block, and the number of images."""
    checkpoint = train(data, run, recipe, weights=weights, overrides=overrides)
    with (run / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    losses, seconds = ([float(row[key]) for row in table] for key in ("loss", "seconds"))
    return losses, seconds, len(checkpoint.record.fit)


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="grad.paper")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="turns of each loop")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args(arguments)
    if options.epochs < 2 or options.blocks < 1:
        parser.error("expected at least 2 epochs, of which the first is not timed, and 1 block")
    about = timing.machine()
    chosen = loops(has_backbone(options.recipe, options.overrides))
    seconds: dict[str, list[float]] = {loop.name: [] for loop in chosen}
    losses: dict[str, list[float]] = {}
    images = 0
    with tempfile.TemporaryDirectory() as folder:
        for block in range(options.blocks):
            for i, loop in enumerate(chosen):
                overrides = [*options.overrides, f"train.epochs={options.epochs}", *loop.overrides]
                run = Path(folder) / f"{i}-{block}"
                losses[loop.name], times, images = measured(
                    options.data, run, options.recipe, options.weights, overrides
                )
                seconds[loop.name] += times[1:]
    base = chosen[0].name
    rows: list[dict[str, Any]] = []
    for loop in chosen:
        pairs = zip(losses[loop.name], losses[base], strict=True)
        apart = max(abs(ours / plain - 1.0) for ours, plain in pairs)
        times = seconds[loop.name] if apart <= loop.loss_rtol else []
        ratios = [p / t for p, t in zip(seconds[base], times, strict=True)] if times else []
        rows.append(
            {
                "loop": loop.name,
                "images": images,
                "loss difference": apart,
                "bound": loop.loss_rtol,
                "s per epoch": statistics.median(times) if times else None,
                "times as fast": statistics.median(ratios) if ratios else None,
                "epochs timed": len(times),
            }
        )
    timing.table(rows, title=f"{options.recipe} on {options.data.name}")
    kept = all(row["epochs timed"] for row in rows)
    if not kept:
        print("a loss curve left its bound: no speed for that loop")
    payload = {"recipe": options.recipe, "rows": rows, "losses": losses}
    suite = timing.suite("training", options.name or options.recipe)
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
