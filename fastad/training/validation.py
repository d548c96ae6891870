"""Early stopping on normal images that training does not see, for recipes that ask for it."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastad.models.registry import Features, Method
from fastad.training.processes import Processes

# Images per call where no gradient needs the recipe's batch. InTra compares all windows of an
# image at once: 32 images of 320 px, its published batch, would take some 14 GB.
MEASURE_BATCH = 4


class Validation(pl.Callback):
    """Measures the loss after each epoch, remembers the best weights, stops when patience ends.

    Owns a copy of the best weights; `restore` puts them back into the method.

    Args:
        data: Images or features to validate on; batches come from ``__getitems__``.
        batch: Images per training step; validation takes `MEASURE_BATCH` at most.
        patience: Epochs without a better loss after which training stops.
        group: The processes that train together: each measures its part, and all decide alike.
    """

    def __init__(
        self, data: Dataset[Any], batch: int, patience: int, group: Processes | None = None
    ) -> None:
        self.data, self.batch, self.patience = data, batch, patience
        self.group = group or Processes()
        self.best_loss = float("inf")
        self.waited = 0
        self.best: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with the best epoch so far."""
        method = cast(Method, cast(Any, pl_module).method)
        loss = self.measure(method, pl_module.device)
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            self.best = {k: v.detach().cpu().clone() for k, v in method.state_dict().items()}
        else:
            self.waited += 1
            trainer.should_stop = self.waited >= self.patience

    @torch.no_grad()
    def measure(self, method: Method, device: torch.device) -> float:
        """Mean loss over the validation images, in eval mode; the same number in each process."""
        method.eval()
        total, N = 0.0, len(cast(Any, self.data))
        part = max(1, min(self.batch // self.group.size, MEASURE_BATCH))
        for start in range(self.group.rank * part, N, self.group.size * part):
            indices = list(range(start, min(start + part, N)))
            batch: Tensor | Features = cast(Any, self.data).__getitems__(indices)
            if isinstance(batch, Tensor):
                features = method.features(batch.to(device))
            else:
                features = tuple(level.to(device) for level in batch)
            total += float(method.loss(features)) * len(indices)
        method.train()
        return float(self.group.sum(torch.tensor(total, dtype=torch.float64))) / N

    def restore(self, method: Method) -> None:
        """Put the best epoch's weights back."""
        if self.best:
            method.load_state_dict(self.best)

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text that `load_state` reads back after a kill."""
        tensors = {f"best.{k}": v for k, v in self.best.items()}
        return tensors, {"best_loss": repr(self.best_loss), "waited": str(self.waited)}

    def load_state(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Go on where a killed run was."""
        self.best = {k[len("best.") :]: v for k, v in tensors.items() if k.startswith("best.")}
        self.best_loss = float(metadata.get("best_loss", "inf"))
        self.waited = int(metadata.get("waited", "0"))
