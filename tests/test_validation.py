"""Early stopping keeps the best epoch, not the last."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastad.training.validation import Validation


class Scripted(nn.Module):
    """Its loss is its one weight, which the test sets as training would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        return (image,)

    def loss(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.weight * features[0].mean()


class Ones:
    def __len__(self) -> int:
        return 5

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.ones(len(indices), 3, 2, 2)


def run(losses: list[float], patience: int) -> tuple[Validation, Scripted, int]:
    """Validate after each epoch until it stops; the number of epochs it took."""
    validation = Validation(Ones(), batch=2, patience=patience)  # type: ignore[arg-type]
    method: Any = Scripted()
    trainer: Any = SimpleNamespace(should_stop=False)
    module: Any = SimpleNamespace(method=method, device=torch.device("cpu"))
    for epoch, loss in enumerate(losses, 1):
        with torch.no_grad():
            method.weight.fill_(loss)
        validation.on_train_epoch_end(trainer, module)
        assert method.training
        if trainer.should_stop:
            return validation, method, epoch
    return validation, method, len(losses)


def test_stops_when_patience_ends_and_restores_the_best_epoch() -> None:
    validation, method, epochs = run([5.0, 3.0, 4.0, 3.5, 1.0], patience=2)
    assert epochs == 4
    validation.restore(method)  # type: ignore[arg-type]
    assert method.weight.item() == 3.0


def test_a_better_epoch_renews_patience() -> None:
    _, _, epochs = run([5.0, 6.0, 4.0, 6.0, 3.0, 6.0], patience=2)
    assert epochs == 6


def test_state_survives_a_kill() -> None:
    validation, method, _ = run([5.0, 3.0, 4.0], patience=9)
    again = Validation(Ones(), batch=2, patience=9)  # type: ignore[arg-type]
    again.load_state(*validation.state())
    assert (again.best_loss, again.waited) == (3.0, 1)
    again.restore(method)  # type: ignore[arg-type]
    assert method.weight.item() == pytest.approx(3.0)
