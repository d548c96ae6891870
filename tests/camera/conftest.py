"""What several camera tests need."""

from __future__ import annotations

from typing import Any

import pytest
from gated import LONG_S

from fastad.camera.readers import Batches


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are taken once every source was read to its end: they are as full as can be."""
    taken = Batches.next

    def after_all(self: Batches, *, wait: bool = True) -> Any:
        for reader in self._readers:
            reader.join(LONG_S)
        return taken(self, wait=wait)

    monkeypatch.setattr(Batches, "next", after_all)
