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


def validate(patience: int) -> Validation:
    images: Any = Ones()
    return Validation(images, batch=2, patience=patience)


def run(losses: list[float], patience: int) -> tuple[Validation, Any, int]:
    """Validate after each epoch until it stops; the number of epochs it took."""
    validation = validate(patience)
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
    validation.restore(method)
    assert method.weight.item() == 3.0


def test_a_better_epoch_renews_patience() -> None:
    _, _, epochs = run([5.0, 6.0, 4.0, 6.0, 3.0, 6.0], patience=2)
    assert epochs == 6


def test_state_survives_a_kill() -> None:
    validation, method, _ = run([5.0, 3.0, 4.0], patience=9)
    again = validate(9)
    again.load_state(*validation.state())
    assert (again.best_loss, again.waited) == (3.0, 1)
    again.restore(method)
    assert method.weight.item() == pytest.approx(3.0)
