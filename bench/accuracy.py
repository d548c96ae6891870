"""What recipes reach on a labelled data set: accuracy, training time, parity, speed.

    python -m bench.accuracy DATA --recipe grad.quick --recipe uniad.quick --weights FILE
        [--weights random] [--seed 0 --seed 1] [--epochs 10 --epochs 40] [--mask-folder NAME]

Every row is the whole road: train on all categories at once (normal images, last epoch), calibrate,
export with parity on every runtime, evaluate the engine in float32 on the test images. Several
``--epochs`` give the learning curve of a recipe, each point with its own full schedule. A random
backbone shows whether the figures can tell good features from bad. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from fastad.export import export_engine

from bench import timing
from fastad.engine.container import read_engine
from fastad.errors import FastadError, FastadWarning
from fastad.evaluation import calibrate_model, evaluate
from fastad.models import method_class
from fastad.training.fit import train
from fastad.training.recipe import load_recipe

FALSE_ALARM_RATE = 0.05  # 19 held-out images carry it
SHOWN = ("recipe", "weights", "seed", "epochs", "minutes", "image AUROC", "pixel AUROC", "AUPRO",
         "image AP", "pixel AP", "parity", "ms per image")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", action="append", required=True, dest="recipes")
    parser.add_argument("--weights", action="append", help="a file, imagenet or random; repeat")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--epochs", action="append", type=int)
    parser.add_argument("--mask-folder", default="ground_truth")
    parser.add_argument("--keep", type=Path, help="existing folder for runs and engines")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FastadWarning)  # small samples are this bench's daily bread
    about = timing.machine()
    rows: list[dict[str, Any]] = []
    payload = {"data": options.data.name, "mask_folder": options.mask_folder, "rows": rows}
    suite = timing.suite("accuracy", options.name or options.data.name)
    for recipe, weights, epochs, seed in jobs(options):
        overrides = [f"train.seed={seed}", *([f"train.epochs={epochs}"] if epochs else [])]
        with tempfile.TemporaryDirectory() as folder:
            kept = f"{options.data.name}-{recipe}-{Path(weights).stem}-{seed}"
            run = (options.keep or Path(folder)) / kept
            row = measure(options.data, run, recipe, weights, overrides, options.mask_folder)
        rows.append(row | {"seed": seed})
        print(" ".join(f"{key}={rows[-1][key]}" for key in SHOWN), flush=True)
        path = timing.write_result(suite, payload, about=about, results=options.results)
    timing.table([{key: row[key] for key in SHOWN} for row in rows], title=options.data.name)
    print(path)
    return 0


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, int | None, int]]:
    """Recipe, weights, epochs (None: the recipe's) and seed of each row."""
    for recipe in options.recipes:
        fields = method_class(load_recipe(recipe).method).Config.__dataclass_fields__
        weights = (options.weights or ["imagenet"]) if "backbone" in fields else ["random"]
        yield from product([recipe], weights, options.epochs or [None], options.seed or [0])


def measure(
    data: Path, run: Path, recipe: str, weights: str, overrides: list[str], mask_folder: str
) -> dict[str, Any]:
    """Train, calibrate, export and evaluate once; the engine lies beside the run."""
    engine = run.with_name(f"{run.name}.engine")
    began = time.perf_counter()
    checkpoint = train(data, run, recipe, weights=weights, overrides=overrides)
    minutes = (time.perf_counter() - began) / 60
    try:
        calibrate_model(run, false_alarm_rate=FALSE_ALARM_RATE)
    except FastadError as error:  # too few images are held out: the engine has no threshold
        print(error, file=sys.stderr)
    export_engine(run, engine, precision="fp32")
    with read_engine(engine) as opened:
        parity = opened.manifest.variants[0].parity
    result = evaluate(engine, data, mask_folder=mask_folder, precision="fp32")
    mean = result.mean
    return {
        "recipe": recipe,
        "weights": weights if weights in ("imagenet", "random") else Path(weights).name,
        "epochs": int(checkpoint.record.provenance["epochs"]),
        "images": len(checkpoint.record.fit),
        "minutes": round(minutes, 2),
        "final loss": float(checkpoint.record.provenance["final_loss"]),
        **{
            title: None if value is None else round(value, 4)
            for title, value in {
                "image AUROC": mean.image_auroc,
                "pixel AUROC": mean.pixel_auroc,
                "AUPRO": mean.aupro,
                "image AP": mean.image_ap,
                "pixel AP": mean.pixel_ap,
                "false alarms": mean.false_alarm_rate,
                "found": mean.detection_rate,
            }.items()
        },
        "categories": {
            row.category: [row.image_auroc, row.pixel_auroc] for row in result.categories
        },
        "parity": float(f"{max(p.map_max for p in parity):.1e}"),
        "engine bytes": engine.stat().st_size,
        "ms per image": round(result.ms_per_image, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
