"""Train one method on the normal images of a folder and leave a checkpoint."""

from __future__ import annotations

import csv
import io
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastad.errors import InputError
from fastad.models import Method, build
from fastad.models.registry import Features
from fastad.training.checkpoint import (
    Checkpoint,
    Record,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
    write_bytes,
)
from fastad.training.features import (
    EpochSampler,
    FeatureData,
    ImageData,
    cache_features,
    epoch_seed,
)
from fastad.training.folder import ImageFolder, Sample, scan, split_holdout
from fastad.training.progress import EpochProgress, Report
from fastad.training.recipe import Recipe, TrainSettings, dump_recipe, load_recipe, settings_of
from fastad.training.validation import Validation

RESUME = "resume.safetensors"
VALIDATION_MOST = 20  # images
SAVE_EVERY_S = 30.0  # a kill costs at most this much work, and disks stay idle in short epochs


class _Module(pl.LightningModule):
    """Lightning's view of a method: one loss, its optimiser, one seed per epoch."""

    def __init__(self, method: Method, settings: TrainSettings, first_epoch: int) -> None:
        super().__init__()
        self.method = method
        self.settings = settings
        self.first_epoch = first_epoch  # of a resumed run; Lightning counts from 0 again
        self.losses: list[Tensor] = []

    @property
    def epoch(self) -> int:
        return self.first_epoch + self.current_epoch

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(epoch_seed(self.settings.seed, self.epoch) + self.global_rank)
        self.losses.clear()

    def training_step(self, batch: Tensor | Features, index: int) -> Tensor:
        features = self.method.features(batch) if isinstance(batch, Tensor) else batch
        loss = self.method.loss(features)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = self.method.parameter_groups(s.lr, **s.groups)
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(groups, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
        if s.step_epochs is None:
            return optimizer
        every, factor, first = s.step_epochs, s.step_factor, self.first_epoch
        # Stepped with the explicit epoch after each epoch: the first stage is one epoch longer.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: factor ** (max(first + epoch - 1, 0) // every)
        )
        return [optimizer], [schedule]


class _Saver(pl.Callback):
    """Writes the loss table and, now and then, everything a killed run needs to go on."""

    def __init__(self, run: Path, rows: list[dict[str, float]], validation: Validation) -> None:
        self.run, self.rows, self.validation = run, rows, validation
        self.saved = self.started = time.monotonic()
        self.lr = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = cast(_Module, pl_module)
        loss = torch.stack(module.losses).mean().item()
        if not torch.isfinite(torch.tensor(loss)):
            raise InputError(
                f"training: the loss became {loss} in epoch {module.epoch}; lower the "
                "learning rate (--set train.lr=...) or check feature_scale for this backbone"
            )
        row = {
            "epoch": module.epoch,
            "loss": loss,
            "lr": self.lr,
            "seconds": time.monotonic() - self.started,
        }
        self.rows.append(row)
        last = trainer.should_stop or module.epoch + 1 == module.settings.epochs
        if trainer.is_global_zero and (last or time.monotonic() - self.saved > SAVE_EVERY_S):
            _write_metrics(self.run, self.rows)
            _save_resume(self.run, trainer, module, self.rows, self.validation)
            self.saved = time.monotonic()


def train(
    data: str | Path,
    run: str | Path,
    recipe: str | Path | Recipe = "grad.paper",
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
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`.
        weights: Of the backbone: ``imagenet`` (downloads), a file, or ``random``.
        categories: Which categories to train on; None takes all.
        value_range: Grey levels (low, high) that become 0 and 255, for images of more than 8 bits;
            the engine will expect the same.
        overrides: ``key=value`` changes to the recipe, such as ``train.epochs=5``.
        resume: Go on after a kill from the state in ``run``.
        report: Receives progress; None is silent.

    Returns:
        The checkpoint, in eval mode, as `load_checkpoint` would read it.

    Raises:
        InputError: unusable data, recipe, weights, or a run folder that is already in use.
        EngineError: the run folder cannot be written, or its resume state is damaged.
    """
    run = Path(run)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    settings = recipe.train
    _check_run(run, resume)
    folder = scan(data, categories)
    fit, holdout = _split(folder, settings)
    method = _build(recipe, weights, settings.seed)
    method.input = replace(method.input, value_range=value_range)
    write_bytes(run / "recipe.yaml", dump_recipe(recipe).encode())
    fit, kept = _split_validation(fit, settings)
    source = _training_data(method, fit, settings, run, report)
    validation = Validation(ImageData(kept, method), settings.batch, settings.patience)
    try:
        rows = _run(method, source, validation, settings, run, resume, report)
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
    used = run.exists() and (not run.is_dir() or any(run.iterdir()))
    if resume and not (run / RESUME).is_file():
        raise InputError(f"{run}: nothing to resume, expected {RESUME} in it")
    if used and not resume:
        raise InputError(
            f"{run}: expected a new or empty folder; choose another --out, or --resume a run "
            "that was killed"
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
    where = settings.cache
    if where == "off":
        sample = ImageData(fit, method)
        step = max(1, len(fit) // 64)
        with torch.no_grad():
            method.adapt(method.features(sample.__getitems__(list(range(0, len(fit), step)))))
        return sample
    progress = partial(report, "backbone features") if report else None
    data = cache_features(fit, method, where, run, progress)
    method.adapt(data.levels)
    return data


def _run(
    method: Method,
    data: Dataset[Any],
    validation: Validation,
    settings: TrainSettings,
    run: Path,
    resume: bool,
    report: Report | None,
) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    first_epoch, state = 0, None
    if resume:
        tensors, metadata = load_tensors(run / RESUME)
        rows = json.loads(metadata["rows"])
        first_epoch, state = int(metadata["epoch"]), tensors
        method.load_state_dict(_part(tensors, "model."))
        validation.load_state(tensors, metadata)
    module = _Module(method.train(), settings, first_epoch)
    loader = DataLoader(
        data,
        batch_size=settings.batch,
        sampler=EpochSampler(
            len(cast(Any, data)), settings.seed, first_epoch, method.visits_per_epoch
        ),
        collate_fn=lambda batch: batch,  # __getitems__ has stacked it already
        generator=torch.Generator(),  # else every new iterator draws from the epoch's numbers
    )
    disable_possible_user_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    trainer = pl.Trainer(
        max_epochs=settings.epochs - first_epoch,
        accelerator="auto",
        devices=1,
        gradient_clip_val=settings.gradient_clip or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            *([validation] if len(cast(Any, validation.data)) else []),
            _Saver(run, rows, validation),
            EpochProgress(report, settings.epochs, first_epoch),
            *([_Restore(state)] if state else []),
        ],
    )
    trainer.fit(module, loader)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return rows


class _Restore(pl.Callback):
    """Puts the optimiser's moments back where a killed run had them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            state = _part(self.tensors, f"optimizer.{index}.")
            if state:
                optimizer.state[p] = {
                    k: v if k == "step" else v.to(p.device) for k, v in state.items()
                }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _save_resume(
    run: Path,
    trainer: pl.Trainer,
    module: _Module,
    rows: list[dict[str, float]],
    validation: Validation,
) -> None:
    tensors = {f"model.{k}": v for k, v in module.method.state_dict().items()}
    optimizer = trainer.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    best, progress = validation.state()
    metadata = {"epoch": str(module.epoch + 1), "rows": json.dumps(rows), **progress}
    save_tensors(run / RESUME, tensors | best, metadata)


def _write_metrics(run: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", "loss", "lr", "seconds"])
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(run / "metrics.csv", text.getvalue().encode())


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
