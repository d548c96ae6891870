"""An engine with int8 in it, its float32 graph, and images that judge it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fastad.export import export_engine, precision
from fastad.export.gate import GateImages
from judged import ANY_LOSS

from fastad.engine.container import read_engine
from fastad.training.folder import Sample


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TIMED_ROUNDS", 3)
    monkeypatch.setattr(precision, "GROUPS", 4)


@pytest.fixture(scope="session")
def mixed(texture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with float32 and int8, which any change of maps, scores and alarms passes.

    How far int8 is off depends on the CPU's instructions; what is tested here must not.
    """
    out = tmp_path_factory.mktemp("mixed") / "mixed.engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastad.calibration.false_alarm_refusal", lambda *_: "")
        return export_engine(texture_run, out, precision="int8", limits=ANY_LOSS)


@pytest.fixture(scope="session")
def graph(mixed: Path) -> bytes:
    with read_engine(mixed) as engine:
        return engine.member("model.onnx")


@pytest.fixture(scope="session")
def images(mixed: Path) -> GateImages:
    with read_engine(mixed) as engine:
        first = engine.golden().images
    rng = np.random.default_rng(0)
    noise = rng.integers(-20, 20, (8, *first.shape[1:]))
    pixels = np.clip(np.resize(first, noise.shape).astype(int) + noise, 0, 255).astype(np.uint8)
    samples = tuple(Sample(Path(f"{i}.png"), "", False) for i in range(8))
    return GateImages(pixels, samples, 8)
