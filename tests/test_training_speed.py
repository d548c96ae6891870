"""What makes training faster changes no loss curve beyond rounding, for every method."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from textures import Textures
from torch import Tensor

from fastad.errors import InputError
from fastad.models import Method, build, methods
from fastad.training.fit import train
from fastad.training.layers import LayersInBfloat16, weights_channels_last
from fastad.training.recipe import Recipe, TrainSettings, load_recipe

NET = {"name": "mobilenetv3_small_050", "taps": [1, 2]}
# Without noise of their own: its draws follow a tensor's layout, and would hide what is compared.
QUIET: dict[str, dict[str, Any]] = {
    "grad": {"backbone": NET, "size": [64, 64], "fusion": "crad-s", "blocks": 1}
    | {"feature_scale": "auto", "jitter_probability": 0.0},
    "uniad": {"backbone": NET, "size": [64, 64], "width": 32, "heads": 2, "ffn_width": 64}
    | {"encoder_layers": 1, "decoder_layers": 1, "window": [3, 3]}
    | {"dropout": 0.0, "jitter_probability": 0.0},
    "rd4ad": {"backbone": {"name": "mobilenetv2_035", "taps": [1, 2, 3]}, "size": [64, 64]},
    "intra": {"size": [64, 64], "width": 16, "heads": 2, "blocks": 3, "window": 3}
    | {"windows_per_image": 8, "windows_per_visit": 4},
}
RTOL = {
    # The same sums in another order, grown over two epochs of an optimiser that divides by the
    # gradient's own size; the same bound as for shuffled batches without cache.
    "channels_last": 2e-3,
    # Each value a layer hands on is off by up to 2^-9 = 0.2 %, signs mixed; ten layers in a row,
    # and weights that drift apart by as much per step, stay below ten times that.
    "autocast": 2e-2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "channels_last": {"channels_last": True},
    "autocast": {"autocast": "bf16"},
}


def losses(data: Path, run: Path, method: str, **changes: Any) -> list[float]:
    settings = TrainSettings(epochs=2, batch=8, lr=1e-3, holdout=0.5, seed=1, **changes)
    train(data, run, Recipe(method, settings, QUIET.get(method, {})), weights="random")
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def plain(
    textures: Textures, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[float]]:
    """Loss curves of all methods, with and without cache."""
    runs = tmp_path_factory.mktemp("plain")
    return {
        (name, cache): losses(textures.root, runs / f"{name}-{cache}", name, cache=cache)
        for name in methods()
        for cache in ("memory", "none")
    }


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("option", CHANGES)
@pytest.mark.parametrize("name", methods())
def test_option_keeps_the_loss_curve(
    name: str,
    option: str,
    cache: str,
    textures: Textures,
    plain: dict[tuple[str, str], list[float]],
    tmp_path: Path,
) -> None:
    curve = losses(textures.root, tmp_path / "run", name, cache=cache, **CHANGES[option])
    np.testing.assert_allclose(curve, plain[name, cache], rtol=RTOL[option])


class Recorder(torch.overrides.TorchFunctionMode):
    """Notes every floating type that a function called inside hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.seen.add(out.dtype)
        return out


def quiet(name: str) -> tuple[Method, Tensor]:
    """A method that is ready to train, and two images of its size."""
    torch.manual_seed(0)
    method = build(name, QUIET.get(name, {}), weights="random")
    images = torch.rand(2, 3, *method.input.size)
    method.adapt(method.features(images))
    return method.train(), images


@pytest.mark.parametrize("name", methods())
def test_whatever_compares_stays_float32(name: str) -> None:
    method, images = quiet(name)
    features = method.features(images)
    torch.manual_seed(1)
    exact = method.loss(features)
    torch.manual_seed(1)
    with LayersInBfloat16(torch.device("cpu")), Recorder() as recorder:
        rounded = method.loss(features)
    assert recorder.seen == {torch.float32}
    assert rounded.item() != exact.item()  # the layers did run in bfloat16


def test_layers_run_in_bfloat16() -> None:
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    with LayersInBfloat16(torch.device("cpu")):
        y, product = F.linear(x, weight), x @ weight.T
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()).float())
    assert torch.equal(product, x @ weight.T)


@pytest.mark.parametrize("name", ["grad", "rd4ad"])
def test_convolutions_get_channels_last(name: str) -> None:
    method, images = quiet(name)
    weights_channels_last(method)
    found = [
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in method.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ]
    assert found and all(found)
    assert torch.isfinite(method.loss(method.features(images)))


def test_resume_goes_on_with_channels_last(
    textures: Textures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastad.training.loop.SAVE_EVERY_S", 0.0)

    def stop(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train":
            raise RuntimeError("killed")

    settings = TrainSettings(epochs=2, batch=8, lr=1e-3, holdout=0.5, channels_last=True)
    recipe = Recipe("grad", settings, QUIET["grad"])
    train(textures.root, tmp_path / "whole", recipe, weights="random")
    with pytest.raises(RuntimeError, match="killed"):
        train(textures.root, tmp_path / "run", recipe, weights="random", report=stop)
    train(textures.root, tmp_path / "run", weights="random", resume=True)
    whole, resumed = (
        (tmp_path / name / "checkpoint" / "model.safetensors").read_bytes()
        for name in ("whole", "run")
    )
    assert whole == resumed


def test_refuses_other_precisions() -> None:
    with pytest.raises(InputError, match="autocast"):
        load_recipe("grad.quick", ["train.autocast=fp16"])
