"""The epochs of a training run: Lightning around one method, and what survives a kill."""

from __future__ import annotations

import csv
import io
import json
import logging
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastad.errors import InputError
from fastad.models import Method
from fastad.models.registry import Features
from fastad.training.checkpoint import load_tensors, save_tensors, write_bytes
from fastad.training.features import BatchParts, EpochSampler, epoch_seed
from fastad.training.layers import (
    LayersInBfloat16,
    channels_last,
    share_statistics,
    weights_channels_last,
)
from fastad.training.processes import Processes, trainer_arguments
from fastad.training.progress import EpochProgress, Report
from fastad.training.recipe import TrainSettings
from fastad.training.validation import Validation

RESUME = "resume.safetensors"
SAVE_EVERY_S = 30.0  # a kill costs at most this much work, and disks stay idle in short epochs


class _Module(pl.LightningModule):
    """Lightning's view of a method: one loss, its optimiser, one seed per epoch."""

    def __init__(
        self, method: Method, settings: TrainSettings, first_epoch: int, batches: BatchParts
    ) -> None:
        super().__init__()
        self.method = method
        self.settings = settings
        self.first_epoch = first_epoch  # of a resumed run; Lightning counts from 0 again
        self.batches = batches
        self.losses: list[Tensor] = []

    @property
    def epoch(self) -> int:
        return self.first_epoch + self.current_epoch

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(epoch_seed(self.settings.seed, self.epoch) + self.global_rank)
        self.losses.clear()

    def training_step(self, batch: Tensor | Features, index: int) -> Tensor:
        with self._precision():
            features = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            if self.settings.channels_last:
                features = channels_last(features)
            if isinstance(batch, Tensor):
                features = self.method.features(features[0])
            loss = self.method.loss(features) * self.batches.weight(index)
        self.losses.append(loss.detach())
        return loss

    def _precision(self) -> AbstractContextManager[object]:
        is_bf16 = self.settings.autocast == "bf16"
        return LayersInBfloat16(self.device) if is_bf16 else nullcontext()

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = self.method.parameter_groups(s.lr, **s.groups)
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(groups, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
        per_epoch = len(self.batches)
        first = self.first_epoch * per_epoch
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: s.rate(first + step, per_epoch)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class _Saver(pl.Callback):
    """Writes the loss table and, now and then, everything a killed run needs to go on."""

    def __init__(
        self,
        run: Path,
        rows: list[dict[str, float]],
        validation: Validation,
        identity: str,
        group: Processes,
    ) -> None:
        self.run, self.rows, self.validation, self.identity = run, rows, validation, identity
        self.group = group
        self.started = time.monotonic()
        self.saved = float("-inf")  # the first epoch is always kept
        self.lr = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = cast(_Module, pl_module)
        whole = self.group.sum(torch.stack(module.losses).cpu()) / self.group.size
        module.losses = list(whole)  # of all processes: `EpochProgress` reports their mean
        loss = whole.mean().item()
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
            _save_resume(self.run, trainer, module, self.rows, self.validation, self.identity)
            self.saved = time.monotonic()


def run_epochs(
    method: Method,
    data: Dataset[Any],
    validation: Validation,
    settings: TrainSettings,
    run: Path,
    identity: str,
    resume: bool,
    report: Report | None,
    group: Processes,
) -> list[dict[str, float]]:
    """Train ``method`` in place and return a row per epoch: epoch, loss, lr, seconds.

    Args:
        method: Adapted to its features; ends in train mode with the last epoch's weights.
        data: Batches of images or cached features through ``__getitems__``.
        validation: Takes part if it has images.
        settings: The recipe's.
        run: Folder for the loss table and the resume state.
        identity: What a resumed run must agree on, stored with the state.
        resume: Start from the state in ``run``.
        report: Receives progress.
        group: Connected processes that train together; each one's rows are the same.

    Raises:
        InputError: the state is further than the recipe goes, or the loss is not finite.
        EngineError: the state is damaged or cannot be written.
        KeyboardInterrupt: somebody stopped it; the state of the last save is on disk.
    """
    rows: list[dict[str, float]] = []
    first_epoch, state = 0, None
    if resume:
        tensors, metadata = load_tensors(run / RESUME)
        rows = json.loads(metadata["rows"])
        first_epoch, state = int(metadata["epoch"]), tensors
        method.load_state_dict(_part(tensors, "model."))
        validation.load_state(tensors, metadata)
        group.sum(torch.zeros(1))  # all have read it: the first process may soon replace it
    if first_epoch > settings.epochs:
        raise InputError(
            f"{run}: {first_epoch} epochs are done, train.epochs is {settings.epochs}; ask for at "
            "least as many"
        )
    if first_epoch == settings.epochs or validation.waited >= settings.patience:
        return rows
    order = EpochSampler(len(cast(Any, data)), settings.seed, first_epoch, method.visits_per_epoch)
    batches = BatchParts(order, settings.batch, group.rank, group.size)
    loader = DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=lambda batch: batch,  # __getitems__ has stacked it already
        generator=torch.Generator(),  # else every new iterator draws from the epoch's numbers
    )
    module = _Module(method.train(), settings, first_epoch, batches)
    if settings.channels_last:
        weights_channels_last(method)
    if group.size > 1:
        share_statistics(method, group.device)
    disable_possible_user_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    trainer = pl.Trainer(
        max_epochs=settings.epochs - first_epoch,
        **trainer_arguments(group),
        gradient_clip_val=settings.gradient_clip or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            *([validation] if len(cast(Any, validation.data)) else []),
            _Saver(run, rows, validation, identity, group),
            EpochProgress(report, settings.epochs, first_epoch),
            *([_Restore(state)] if state else []),
        ],
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, loader)
    except SystemExit:  # Lightning's answer to Ctrl-C, after which it ignores the next one
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None
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
    identity: str,
) -> None:
    tensors = {f"model.{k}": v for k, v in module.method.state_dict().items()}
    optimizer = trainer.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    best, progress = validation.state()
    metadata = {"epoch": str(module.epoch + 1), "rows": json.dumps(rows), **progress}
    metadata["identity"] = identity
    save_tensors(run / RESUME, tensors | best, metadata)


def _write_metrics(run: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", "loss", "lr", "seconds"])
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(run / "metrics.csv", text.getvalue().encode())
