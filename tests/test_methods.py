"""Every registered method goes the whole road: train, calibrate, export, run. A fifth one too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastad.export import export_engine
from PIL import Image
from torch import Tensor, nn

import fastad
from fastad.engine.container import read_engine
from fastad.engine.parity import MAP_LIMIT
from fastad.evaluation import calibrate_model
from fastad.models import Method, methods
from fastad.models import registry as registry_module
from fastad.models.backbone import Backbone, BackboneConfig
from fastad.models.registry import Features, register
from fastad.spec import InputSpec
from fastad.training.fit import train
from fastad.training.recipe import Recipe, TrainSettings

NET = {"name": "mobilenetv3_small_050", "taps": [1, 2]}
# The smallest sensible form of each method; one without an entry is tested as it comes.
TINY: dict[str, dict[str, Any]] = {
    "grad": {"backbone": NET, "size": [64, 64], "fusion": "crad-s", "blocks": 1}
    | {"feature_scale": "auto"},
    "uniad": {
        "backbone": {"name": "resnet18", "taps": [0, 1]},
        "size": [160, 160],
        "width": 32,
        "heads": 2,
        "ffn_width": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "rd4ad": {"backbone": {"name": "resnet18", "taps": [1, 2, 3]}, "size": [64, 64]},
    "intra": {
        "size": [64, 64],
        "width": 16,
        "heads": 2,
        "blocks": 3,
        "window": 3,
        "windows_per_image": 8,
        "windows_per_visit": 4,
    },
}


@dataclass(frozen=True)
class MeanConfig:
    size: tuple[int, int] = (64, 64)


class MeanDistance(Method):
    """Distance to the mean training feature: the smallest method that is one."""

    name = "mean-distance"
    Config = MeanConfig
    map_rule = "distance to the mean feature, nearest up-sampling"
    score_rule = "maximum of the anomaly map"

    def __init__(self, config: MeanConfig, weights: str) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(BackboneConfig(NET["name"], (1,)), config.size, weights)
        self.input = InputSpec(config.size)
        self.mean = nn.Parameter(torch.zeros(self.backbone.channels[0]))

    def features(self, image: Tensor) -> Features:
        with torch.no_grad():
            return self.backbone(image)

    def loss(self, features: Features) -> Tensor:
        return (features[0] - self.mean[:, None, None]).square().mean()

    def score(self, features: Features) -> tuple[Tensor, Tensor]:
        d = (features[0] - self.mean[:, None, None]).square().sum(1).sqrt()
        anomaly_map = d.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return anomaly_map, d.amax((1, 2))

    def parameter_groups(self, lr: float, **settings: float) -> list[dict[str, Any]]:
        return [{"params": [self.mean], "lr": lr}]


@pytest.fixture
def fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_METHODS", dict(registry_module._METHODS))
    register(MeanDistance)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noise") / "plain"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(60, 190, (70, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def go_the_whole_road(method: str, data: Path, folder: Path) -> None:
    settings = TrainSettings(epochs=1, batch=3, lr=1e-3, holdout=0.4)
    checkpoint = train(
        data, folder / "run", Recipe(method, settings, TINY.get(method, {})), weights="random"
    )
    assert len(checkpoint.record.holdout) == 3
    fitted = calibrate_model(folder / "run", false_alarm_rate=0.25)
    assert fitted.pooled.count == 3
    engine = export_engine(folder / "run", folder / "a.engine")
    with read_engine(engine) as file:
        reports = [report for v in file.manifest.variants for report in v.parity]
    assert {report.runtime for report in reports} == {"openvino", "onnxruntime"}
    for report in reports:
        print(f"{method} on {report.runtime}: map differs by {report.map_max:.1e} of its range")
        assert report.map_max < MAP_LIMIT
    with fastad.load(engine) as predictor:
        results = predictor.predict(sorted(data.iterdir()))
        assert isinstance(results, list)
        assert [r.anomaly_map.shape for r in results] == [(70, 70)] * 8
        assert all(np.isfinite(r.raw_score) for r in results)


@pytest.mark.parametrize("method", methods())
def test_whole_road(method: str, data: Path, tmp_path: Path) -> None:
    go_the_whole_road(method, data, tmp_path)


def test_a_fifth_method_is_one_class(fifth: None, data: Path, tmp_path: Path) -> None:
    go_the_whole_road(MeanDistance.name, data, tmp_path)
