"""Runs and engines of all methods on the demo's photographs, for benches that need no other data.

    python -m bench.engines [demo]

`make demo` makes the folder, and with it the run of GRAD. The other quick recipes are trained here
for a few epochs on the same images and the same EfficientNet-Lite0: enough to have a model, whose
times do not depend on how well it was trained, and far from enough to judge its method. Every run
is exported through the accuracy gate into ``demo/bench``, InTra in float32 only and with thresholds
from one of the three surfaces. What is there already is kept. The last line names run and engine of
each method, as `bench.models` takes them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path

from fastad.export import export_engine

from fastad.demo import packaged_weights, run_demo
from fastad.errors import FastadWarning
from fastad.evaluation import calibrate_model
from fastad.training.fit import train

BACKBONE = ("config.backbone.name=tf_efficientnet_lite0",)
METHODS = {  # recipe: what is shorter than in the recipe
    "uniad.quick": (*BACKBONE, "train.epochs=8"),
    "rd4ad.quick": (*BACKBONE, "train.epochs=4"),
    "intra.quick": ("train.epochs=1", "config.windows_per_image=2", "config.windows_per_visit=2"),
}
# InTra's graph takes 24 GFLOP an image. The search for int8 layers runs it hundreds of times, and
# 300 images for thresholds, which no bench asks this engine for, would take minutes.
PRECISION = {"intra.quick": "fp32"}  # of the others: auto
CALIBRATION = {"intra.quick": "calibration/gravel"}  # 100 images; of the others: all 300


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--method", choices=("grad", *METHODS), action="append")
    parser.add_argument("--precision", help="auto, fp32, bf16, int8 or int8-bf16, for every method")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FastadWarning)  # small samples and few epochs are meant
    if not (options.demo / "textures.engine").is_file():
        run_demo(options.demo, 0, progress)
    pairs = []
    for name in options.method or ("grad", *METHODS):
        precision = options.precision or PRECISION.get(name, "auto")
        pairs += engine_of(options.demo, name, precision)
    print(*pairs)
    return 0


def engine_of(demo: Path, name: str, precision: str) -> tuple[Path, Path]:
    """Run folder and engine of ``grad``, the demo's own run, or of one of `METHODS`."""
    place = demo / "bench"
    place.mkdir(exist_ok=True)
    run = demo / "run" if name == "grad" else place / name
    engine = place / f"{name.partition('.')[0]}.engine"
    if engine.is_file():
        return run, engine
    if name in METHODS:
        shutil.rmtree(run, ignore_errors=True)  # a run without an engine was interrupted
        overrides = list(METHODS[name])
        weights = str(packaged_weights()) if BACKBONE[0] in overrides else "random"
        train(demo / "textures", run, name, weights=weights, overrides=overrides, report=progress)
        normal = demo / CALIBRATION.get(name, "calibration")
        calibrate_model(run, data=normal, progress=progress)
    test_data = demo / "textures"
    export_engine(run, engine, precision=precision, test_data=test_data, report=progress)
    return run, engine


def progress(stage: str, done: int, total: int, remark: str = "") -> None:
    """On stderr, at the end of each part: the last line of stdout is for the shell."""
    if done == total:
        print(stage, remark, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
