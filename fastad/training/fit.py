"""Train one method on the normal images of a folder and leave a checkpoint."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fastad.errors import InputError
from fastad.models import Method, build
from fastad.training.checkpoint import (
    Checkpoint,
    Record,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    write_bytes,
)
from fastad.training.features import FeatureData, ImageData, cache_features
from fastad.training.folder import ImageFolder, Sample, scan, split_holdout
from fastad.training.loop import RESUME, run_epochs
from fastad.training.progress import Report
from fastad.training.recipe import Recipe, TrainSettings, dump_recipe, load_recipe, settings_of
from fastad.training.validation import Validation

DEFAULT_RECIPE = "grad.paper"
VALIDATION_MOST = 20  # images
ADAPT_IMAGES = 64  # spread over the training images, to fix constants such as the feature scale


def train(
    data: str | Path,
    run: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    weights: str = "imagenet",
    categories: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    report: Report | None = None,
) -> Checkpoint:
    """Train on the normal images below ``data``; all categories share one model.

    Only normal training images are read. The weights of the last epoch are the result.

    Args:
        data: MVTec-style root, one category of it, or a plain folder of normal images.
        run: Folder for checkpoint, loss table and resume state; made if missing.
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`; None takes ``grad.paper``, or
            the run's own when resuming.
        weights: Of the backbone: ``imagenet`` (downloads), a file, or ``random``.
        categories: Which categories to train on; None takes all.
        value_range: Grey levels (low, high) that become 0 and 255, for images of more than 8 bits;
            the engine will expect the same.
        overrides: ``key=value`` changes to the recipe, such as ``train.epochs=5``.
        resume: Go on after a kill from the state in ``run``; all but ``train.epochs`` must be the
            same.
        report: Receives progress; None is silent.

    Returns:
        The checkpoint, in eval mode, as `load_checkpoint` would read it.

    Raises:
        InputError: unusable data, recipe, weights, or a run folder that is already in use.
        EngineError: the run folder cannot be written, or its resume state is damaged.
    """
    run = Path(run)
    if weights == "none":  # for rebuilding from a checkpoint only
        raise InputError("weights: expected imagenet, a file, or random, got 'none'")
    _check_run(run, resume)
    recipe = _recipe(recipe, overrides, run, resume)
    settings = recipe.train
    folder = scan(data, categories)
    fit, holdout = _split(folder, settings)
    method = _build(recipe, weights, settings.seed)
    method.input = replace(method.input, value_range=value_range)
    identity = _identity(recipe, weights, value_range, _relative(fit, folder.root))
    if resume:
        _check_identity(run, identity)
    fit, kept = _split_validation(fit, settings)
    source = _training_data(method, fit, settings, run, report)
    validation = Validation(ImageData(kept, method), settings.batch, settings.patience)
    try:
        write_bytes(run / "recipe.yaml", dump_recipe(recipe).encode())
        rows = run_epochs(method, source, validation, settings, run, identity, resume, report)
    finally:
        if isinstance(source, FeatureData):
            source.close()
    validation.restore(method)
    method.eval()
    with torch.no_grad():
        method.finish(ImageData(fit, method).batches(settings.batch))
    record = Record(
        spec=replace(method.spec, categories=folder.categories),
        data_root=str(folder.root.resolve()),
        fit=_relative(fit, folder.root),
        holdout=_relative(holdout, folder.root),
        recipe=dict(settings_of(recipe)),
        provenance=_provenance(weights, rows),
    )
    path = save_checkpoint(run / "checkpoint", method, record)
    (run / RESUME).unlink(missing_ok=True)
    return load_checkpoint(path)


def _check_run(run: Path, resume: bool) -> None:
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: expected a folder, it is a file; choose another --out")
    if resume and not (run / RESUME).is_file():
        raise InputError(f"{run}: nothing to resume, expected {RESUME} in it")
    left = [p for p in run.iterdir() if not resume] if run.exists() else []
    # A run that failed before its first epoch leaves nothing that anybody would miss.
    if any(p.name != "recipe.yaml" and not p.match("features.*.bin") for p in left):
        raise InputError(
            f"{run}: expected a new or empty folder; choose another --out, or --resume a run "
            "that was killed"
        )
    for path in left:
        path.unlink()


def _recipe(
    recipe: str | Path | Recipe | None, overrides: Sequence[str], run: Path, resume: bool
) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError("overrides: they change a recipe that is read, got a Recipe object")
        return recipe
    if recipe is None:
        recipe = run / "recipe.yaml" if resume else DEFAULT_RECIPE
    return load_recipe(recipe, overrides)


def _identity(
    recipe: Recipe, weights: str, value_range: tuple[float, float] | None, fit: tuple[str, ...]
) -> str:
    settings = dict(settings_of(recipe))
    del settings["train"]["epochs"]  # the one thing that a resumed run may change
    known = weights in ("imagenet", "random")
    facts = {
        "recipe": settings,
        "weights": weights if known else Path(weights).name,
        "value_range": value_range,
        "images": fit,
    }
    return json.dumps(facts, sort_keys=True)


def _check_identity(run: Path, identity: str) -> None:
    _, metadata = load_tensors(run / RESUME)
    before, now = json.loads(metadata["identity"]), json.loads(identity)
    for key in now:
        if before[key] != now[key]:
            old, new = (str(v)[:200] for v in (before[key], now[key]))
            raise InputError(
                f"{run}: was started with other {key}, so it cannot go on: {old} then, {new} now"
            )


def _split(folder: ImageFolder, settings: TrainSettings) -> tuple[list[Sample], list[Sample]]:
    fit, holdout = split_holdout(folder.train, settings.holdout, settings.seed)
    if len(fit) < 2:
        raise InputError(
            f"{folder.root}: expected at least 2 normal images to train on, got {len(fit)}"
        )
    return list(fit), list(holdout)


def _split_validation(
    fit: list[Sample], settings: TrainSettings
) -> tuple[list[Sample], list[Sample]]:
    if not settings.validation_fraction:
        return fit, []
    rest, kept = split_holdout(fit, settings.validation_fraction, settings.seed + 1)
    return [*rest, *kept[VALIDATION_MOST:]], list(kept[:VALIDATION_MOST])


def _build(recipe: Recipe, weights: str, seed: int) -> Method:
    torch.manual_seed(seed)
    return build(recipe.method, recipe.config, weights=weights)


def _training_data(
    method: Method, fit: list[Sample], settings: TrainSettings, run: Path, report: Report | None
) -> Dataset[Any]:
    images = ImageData(fit, method)
    sample = list(range(0, len(fit), max(1, len(fit) // ADAPT_IMAGES)))[:ADAPT_IMAGES]
    with torch.no_grad():
        method.adapt(method.features(images.__getitems__(sample)))
    if settings.cache == "none":
        return images
    progress = partial(report, "backbone features") if report else None
    return cache_features(fit, method, settings.cache, run, progress)


def _relative(samples: Sequence[Sample], root: Path) -> tuple[str, ...]:
    return tuple(s.path.relative_to(root).as_posix() for s in samples)


def _provenance(weights: str, rows: list[dict[str, float]]) -> dict[str, str]:
    name = weights if weights in ("imagenet", "random") else Path(weights).name
    return {
        "fastad": version("fastad"),
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
        "backbone_weights": name,
        "epochs": str(len(rows)),
        "final_loss": f"{rows[-1]['loss']:.6g}" if rows else "",
        "trained": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
