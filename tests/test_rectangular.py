"""Every method takes an input that is not square, from training to the engine file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textures import Textures

from fastad.errors import FastadWarning, InputError
from fastad.models import build
from fastad.prediction import Prediction
from fastad.predictor import load
from fastad.training.fit import train
from fastad.training.recipe import Recipe, TrainSettings

SIZE = (64, 96)
TINY = {"name": "mobilenetv3_small_050", "taps": [0, 1, 2]}
CONFIGS: dict[str, dict[str, Any]] = {
    "grad": {"backbone": TINY, "fusion": "crad-s", "blocks": 1, "feature_scale": "auto"},
    "uniad": {
        **{"backbone": TINY, "width": 16, "heads": 2, "ffn_width": 16, "start": "local"},
        **{"encoder_layers": 1, "decoder_layers": 1, "window": [3, 3]},
    },
    "rd4ad": {"backbone": TINY, "decoder_depths": [1, 1, 1], "bottleneck_depth": 1},
    "intra": {
        **{"patch_px": 16, "window": 3, "width": 16, "heads": 2, "blocks": 1, "pools": [1, 2]},
        **{"blur_px": 5, "quarter_turns": False, "windows_per_image": 4, "windows_per_visit": 4},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_exports_and_predicts(name: str, textures: Textures, tmp_path: Path) -> None:
    from fastad.export import export_engine

    run = tmp_path / "run"
    settings = TrainSettings(epochs=1, batch=8, lr=1e-3, holdout=0.25)
    recipe = Recipe(name, settings, {**CONFIGS[name], "size": list(SIZE)})
    train(textures.root, run, recipe, weights="random", categories=["grain"])
    with pytest.warns(FastadWarning, match="not calibrated"):
        engine = export_engine(run, tmp_path / "a.engine", precision="fp32")
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    with load(engine, device="cpu", precision="fp32", threads=1) as predictor:
        found = predictor.predict(image, region=[(0, 0, 60, 64)])
        tiled = predictor.predict(np.tile(image, (2, 2, 1)), tile=SIZE, overlap=0)
    assert isinstance(found, Prediction)
    assert isinstance(tiled, Prediction)
    assert found.model_map.shape == SIZE
    assert np.isfinite(found.raw_score)
    # Four equal tiles that share nothing: the map of one, four times.
    whole = np.tile(found.model_map, (2, 2))
    scale = float(np.ptp(whole))
    np.testing.assert_allclose(tiled.model_map, whole, rtol=0, atol=2e-5 * scale)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("grad", {"size": [64, 24]}, r"size: expected at least 32 x 32 .* got \(64, 24\)"),
    ("uniad", {"size": [64, 90]}, r"size: expected multiples of the stride 16.* got \(64, 90\)"),
    ("rd4ad", {"size": [64, 72]}, r"size: expected three teacher maps that halve.* \(64, 72\)"),
    ("intra", {"size": [64, 90]}, r"size: expected multiples of 16 px .* got \(64, 90\)"),
    (
        "intra",
        {"size": [64, 96], "quarter_turns": True},
        r"quarter_turns: expected a square size, got \(64, 96\); set quarter_turns to false",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS)
def test_refuses_sizes_that_a_method_cannot_take(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(name, {**CONFIGS[name], **changes}, weights="random")
