"""Progress of long work, told to whoever wants to hear it; fastad itself prints nothing."""

from __future__ import annotations

from typing import Protocol, cast

import lightning.pytorch as pl


class Report(Protocol):
    """Receives progress: a stage name, how much is done, how much there is, a short remark."""

    def __call__(self, stage: str, done: int, total: int, remark: str = "") -> None:
        """Take one step of progress."""


class EpochProgress(pl.Callback):
    """Reports every finished epoch with its mean loss."""

    def __init__(self, report: Report | None, epochs: int, first_epoch: int = 0) -> None:
        self.report, self.epochs, self.first_epoch = report, epochs, first_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell how far training is."""
        if self.report and trainer.is_global_zero:
            losses = cast(list[float], pl_module.losses)
            mean = float(sum(losses) / max(len(losses), 1))
            done = self.first_epoch + trainer.current_epoch + 1
            self.report("train", done, self.epochs, f"loss {mean:.4g}")
