"""Train one method on the normal images of a folder and leave a checkpoint."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.utils.data import Dataset

from fastad.errors import InputError
from fastad.models import Method, build
from fastad.training.checkpoint import (
    Checkpoint,
    Record,
    load_checkpoint,
    save_checkpoint,
    write_bytes,
)
from fastad.training.features import FeatureData, ImageData, cache_features
from fastad.training.folder import ImageFolder, Sample, scan, split_holdout
from fastad.training.loop import RESUME, run_epochs
from fastad.training.processes import Processes, following, processes
from fastad.training.progress import Report
from fastad.training.recipe import (
    Recipe,
    TrainSettings,
    dump_recipe,
    load_recipe,
    parse_recipe,
    settings_of,
)
from fastad.training.run_folder import check_identity, check_run, identity_of
from fastad.training.validation import MEASURE_BATCH, Validation

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
    devices: int = 1,
    report: Report | None = None,
) -> Checkpoint:
    """Train on the normal images below ``data``; all categories share one model.

    Only normal training images are read. The result is the weights of the last epoch, or with
    ``train.validation_fraction`` those of the best one.

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
            same, and that too where the learning rates follow from it (cosine, warm-up).
        devices: Processes that train together, one GPU each, or sharing the CPU's cores. Each
            computes its part of the recipe's batch; gradients, batch statistics, loss and files are
            those of one process up to rounding, random numbers (dropout, jitter, windows) are
            others. This process is one of them and starts the rest; they know the methods of this
            package only. A script under torchrun leaves this at 1: its processes find each other.
        report: Receives progress; None is silent. Of several processes the first one reports.

    Returns:
        The checkpoint, in eval mode, as `load_checkpoint` would read it.

    Raises:
        InputError: unusable data, recipe, weights, devices, or a run folder already in use.
        UnsupportedError: torchrun on several machines.
        EngineError: the run folder cannot be written, its resume state is damaged, or one of
            several processes died.
    """
    if weights == "none":  # for rebuilding from a checkpoint only
        raise InputError("weights: expected imagenet, a file, or random, got 'none'")
    request: dict[str, Any] = {
        "data": str(data),
        "run": str(run),
        "weights": weights,
        "categories": None if categories is None else list(categories),
        "value_range": value_range,
        "resume": resume,
    }
    with processes(devices, request) as group:
        text = group.first(
            lambda: _checked_recipe(recipe, overrides, Path(run), resume, group.size)
        )
        return _train(group, parse_recipe(text), report if group.rank == 0 else None, **request)


def follow() -> None:
    """Train as one of the processes that `train` starts; arguments: port, rank, size, request."""
    port, rank, size, request = sys.argv[1:]
    logging.disable(logging.WARNING)  # the first process says it already
    warnings.simplefilter("ignore")
    with following(int(port), int(rank), int(size)) as group:
        _train(group, parse_recipe(group.first(str)), None, **json.loads(request))


def _train(
    group: Processes,
    recipe: Recipe,
    report: Report | None,
    *,
    data: str,
    run: str,
    weights: str,
    categories: Sequence[str] | None,
    value_range: Sequence[float] | None,
    resume: bool,
) -> Checkpoint:
    """Train as one of ``group``; its first process alone writes and reports."""
    out, settings = Path(run), recipe.train
    folder = scan(data, categories)
    fit, holdout = _split(folder, settings)
    method = _build(recipe, weights, group)
    black_white = None if value_range is None else (value_range[0], value_range[1])
    method.input = replace(method.input, value_range=black_white)
    identity = identity_of(recipe, weights, black_white, _relative(fit, folder.root))
    if resume:
        group.first(lambda: check_identity(out, identity))
    fit, kept = _split_validation(fit, settings)
    group.join()
    source = _training_data(method, fit, settings, out, report, group)
    validation = Validation(ImageData(kept, method), settings.batch, settings.patience, group)
    try:
        if group.rank == 0:
            write_bytes(out / "recipe.yaml", dump_recipe(recipe).encode())
        rows = run_epochs(
            method, source, validation, settings, out, identity, resume, report, group
        )
    finally:
        if isinstance(source, FeatureData):
            source.close()
    validation.restore(method)

    def finish() -> str:
        method.eval().to(group.device)
        with torch.no_grad():
            method.finish(ImageData(fit, method).batches(min(settings.batch, MEASURE_BATCH)))
        record = Record(
            spec=replace(method.spec, categories=folder.categories),
            data_root=str(folder.root.resolve()),
            fit=_relative(fit, folder.root),
            holdout=_relative(holdout, folder.root),
            recipe=dict(settings_of(recipe)),
            provenance=_provenance(weights, rows),
        )
        path = save_checkpoint(out / "checkpoint", method, record)
        (out / RESUME).unlink(missing_ok=True)
        return str(path)

    return load_checkpoint(group.first(finish))


def _checked_recipe(
    recipe: str | Path | Recipe | None,
    overrides: Sequence[str],
    run: Path,
    resume: bool,
    processes: int,
) -> str:
    """YAML of the recipe, once the run folder and the number of processes are known to fit."""
    check_run(run, resume)  # first: without a state to resume, its recipe may be missing too
    chosen = _recipe(recipe, overrides, run, resume)
    if chosen.train.batch % processes:
        raise InputError(
            f"train.batch: expected a multiple of {processes} processes, got {chosen.train.batch}; "
            "it counts the images of all of them"
        )
    return dump_recipe(chosen)


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
    chosen = _spread(len(kept), VALIDATION_MOST)  # they come category by category
    back = [sample for i, sample in enumerate(kept) if i not in chosen]
    return [*rest, *back], [kept[i] for i in chosen]


def _spread(n: int, most: int) -> list[int]:
    """At most so many of the indices below ``n``, evenly spaced."""
    count = min(n, most)
    return [i * n // count for i in range(count)]


def _build(recipe: Recipe, weights: str, group: Processes) -> Method:
    built: list[Method] = []

    def work() -> str:
        torch.manual_seed(recipe.train.seed)
        built.append(build(recipe.method, recipe.config, weights=weights))
        return ""

    group.first(work)  # first alone: it may download
    if not built:
        work()
    return built[0]


def _training_data(
    method: Method,
    fit: list[Sample],
    settings: TrainSettings,
    run: Path,
    report: Report | None,
    group: Processes,
) -> Dataset[Any]:
    images = ImageData(fit, method)
    config = TypeAdapter(type(method.config))

    def adapted() -> str:
        sample = _spread(len(fit), ADAPT_IMAGES)
        with torch.no_grad():
            method.adapt(method.features(images.__getitems__(sample)))
        return config.dump_json(method.config).decode()

    method.config = config.validate_json(group.first(adapted))
    if settings.cache == "none":
        return images
    progress = partial(report, "backbone features") if report else None
    return cache_features(fit, method, settings.cache, run, progress, group)


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
