"""A tiny trained model, once a session: two textures, painted defects, random backbone weights."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated import GatedRuntime
from numpy.typing import NDArray
from textures import CONFIG, FALSE_ALARM_RATE, Outcome, Textures, make_textures

from fastad.predictor import Predictor, load
from fastad.preprocess import Frame, to_batch


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None and "golden_state" in sys.modules:  # with torch: only if a test has it
        output["golden"] = sys.modules["golden_state"].errors


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has compared."""
    if golden := getattr(node, "workeroutput", {}).get("golden"):
        import golden_state

        for method, found in golden.items():
            golden_state.errors.setdefault(method, {}).update(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    compared = sys.modules.get("golden_state")
    if compared and (found := compared.lines()):
        terminalreporter.section("golden parity with the authors' code")
        for line in found:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def cache_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled models go to a folder of this session, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Textures:
    return make_textures(tmp_path_factory.mktemp("textures"))


@pytest.fixture(scope="session")
def texture_run(textures: Textures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and calibrated run folder. Copy it before changing anything in it."""
    from fastad.evaluation import calibrate_model
    from fastad.training.fit import train
    from fastad.training.recipe import Recipe, TrainSettings

    run = tmp_path_factory.mktemp("runs") / "textures"
    settings = TrainSettings(
        epochs=2, batch=8, lr=1e-3, groups={"grid_lr": 0.1}, gradient_clip=0.1, holdout=0.25
    )
    train(textures.root, run, Recipe("grad", settings, CONFIG), weights="random")
    calibrate_model(run, data=textures.calibration, false_alarm_rate=FALSE_ALARM_RATE)
    return run


@pytest.fixture(scope="session")
def texture_engine(texture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported engine. Copy it before changing anything in it."""
    from fastad.export import export_engine

    return export_engine(texture_run, tmp_path_factory.mktemp("engines") / "textures.engine")


@pytest.fixture(scope="session")
def predictor(texture_engine: Path) -> Iterator[Predictor]:
    """An open predictor on two threads."""
    with load(texture_engine, threads=2) as opened:
        yield opened


@pytest.fixture
def runtime() -> GatedRuntime:
    """A runtime that the test can hold."""
    return GatedRuntime()


@pytest.fixture
def opened(predictor: Predictor, runtime: GatedRuntime) -> Iterator[Predictor]:
    """An open predictor on `runtime`."""
    with Predictor(predictor.manifest, runtime) as opened:
        yield opened


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each batch had that was resized from here on, in order."""
    sizes: list[int] = []

    def counted(frames: list[Frame], *args: Any) -> NDArray[np.uint8]:
        sizes.append(len(frames))
        return to_batch(frames, *args)

    monkeypatch.setattr("fastad.feed.to_batch", counted)
    return sizes


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Run `fastad` in this process, 80 columns wide."""
    from fastad.cli import main

    def call(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fastad", *map(str, args)])
        monkeypatch.setitem(os.environ, "COLUMNS", "80")
        capsys.readouterr()
        code: Any = 0
        with warnings.catch_warnings():  # main() sets its own filters
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
