"""GRAD against the authors' code, its own definitions, and its promises."""

from __future__ import annotations

import dataclasses
from typing import Literal

import golden_state
import pytest
import torch
import torch.nn.functional as F

from fastad.errors import InputError
from fastad.models import build, rebuild
from fastad.models.backbone import Backbone, BackboneConfig
from fastad.models.grad import Grad, GradConfig
from fastad.training.import_checkpoint.grad import grad_from_authors

TINY = BackboneConfig("mobilenetv3_small_050", (1, 2))  # 8 x 8 and 4 x 4 at 64 px
TOLERANCE = 1e-5  # relative to the largest value: float32 rounding through forty layers


@pytest.fixture(scope="module", params=["grad", "crad"])
def golden(request: pytest.FixtureRequest):
    state, image, expected = golden_state.load(request.param)
    model = grad_from_authors(state)
    with torch.no_grad():
        features = model.features(image)
        f = model.reconstruct(features[0])
        S, _ = model.similarity(f, features[0])
        refined = S[:, None] * features[0] + (1 - S[:, None]) * f
        pred = F.interpolate(
            model.distance(features)[:, None],
            size=model.config.size,
            mode="bilinear",
            align_corners=True,
        )[:, 0]
    found = {
        "feature_align_mean": features[0].mean((2, 3)),
        "feature_align_0_every8": features[0][0, ::8],
        "feature_rec_mean": refined.mean((2, 3)),
        "feature_rec_0_every8": refined[0, ::8],
        "pred": pred,
    }
    return request.param, {k: v.numpy() for k, v in found.items()}, expected


@pytest.mark.parametrize(
    "quantity",
    ["feature_align_mean", "feature_align_0_every8", "feature_rec_mean", "feature_rec_0_every8"],
)
def test_features_equal_the_authors(golden, quantity: str) -> None:
    name, found, expected = golden
    error = golden_state.relative_error(name, quantity, found[quantity], expected[quantity])
    assert error < TOLERANCE


def test_map_equals_the_authors(golden) -> None:
    name, found, expected = golden
    assert golden_state.relative_error(name, "map", found["pred"], expected["pred"]) < TOLERANCE


def test_golden_state_misses_no_key() -> None:
    state, _, _ = golden_state.load("crad")
    del state["reconstruction.recover.weight"]
    with pytest.raises(InputError, match=r"recover\.weight is missing"):
        grad_from_authors(state)


def test_import_names_unknown_keys() -> None:
    state, _, _ = golden_state.load("crad")
    state["reconstruction.extra.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"1 unknown \['extra\.weight'\]"):
        grad_from_authors(state)


def tiny(**changes: object) -> Grad:
    torch.manual_seed(0)
    config = dataclasses.replace(
        GradConfig(backbone=TINY, size=(64, 64), fusion="crad-s", blocks=1), **changes
    )
    return Grad(config, weights="random")


@pytest.mark.parametrize(
    ("fusion", "fusion_size"), [("grad", 23_526_720), ("crad", 12_450_240), ("crad-s", 2_349_864)]
)
def test_published_sizes(fusion: Literal["grad", "crad", "crad-s"], fusion_size: int) -> None:
    model = Grad(GradConfig(fusion=fusion), weights="random")
    assert sum(p.numel() for p in model.fusion.parameters()) == fusion_size
    assert sum(p.numel() for p in model.backbone.parameters()) == 3_635_984
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == fusion_size + 2 * 47_306 + 13_824 + 2_709_504 + 93_312


def test_map_head_equals_the_three_steps() -> None:
    model = tiny(size=(96, 64)).eval()
    d = torch.rand(2, *model.grid, dtype=torch.float64)
    full = F.interpolate(d[:, None], size=(96, 64), mode="bilinear", align_corners=True)
    smooth = F.avg_pool2d(full, 21, 1, 10, count_include_pad=True, divisor_override=441)
    pooled = F.avg_pool2d(smooth, 32, 1)
    ours = model.map_h.double() @ d @ model.map_w.double().T
    # matrices are stored in float32
    torch.testing.assert_close(ours, smooth[:, 0], rtol=1e-6, atol=1e-7)
    ours_pooled = model.pooled_h.double() @ d @ model.pooled_w.double().T
    torch.testing.assert_close(ours_pooled, pooled[:, 0], rtol=1e-6, atol=1e-7)


def test_distance_equals_the_refined_output() -> None:
    model = tiny(feature_scale=1.0).eval()
    features = model.features(torch.randn(2, 3, 64, 64))
    x = features[0]
    with torch.no_grad():
        f = model.reconstruct(x)
        S, _ = model.similarity(f, x)
        refined = S[:, None] * x + (1 - S[:, None]) * f
        expected = (refined - x).norm(dim=1)
        loss = F.mse_loss(refined, x)
        torch.testing.assert_close(model.distance(features), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.loss(features), loss, rtol=1e-5, atol=1e-7)


def test_threshold_tie_passes() -> None:
    model = tiny(mse_threshold=4.0, cosine_weight=0.0)
    x = torch.zeros(1, model.C, *model.grid)
    S, _ = model.similarity(x + 2.0, x)  # mean squared difference is exactly 4
    assert S.eq(torch.tensor(0.3)).all()


def test_jitter_only_trains() -> None:
    model = tiny(jitter_probability=1.0)
    x = torch.randn(1, model.C, *model.grid)
    model.eval()
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    model.train()
    model.fusion.eval()
    assert not torch.equal(model.reconstruct(x), model.reconstruct(x))


def test_backbone_never_trains() -> None:
    model = tiny().train()
    assert not any(m.training for m in model.backbone.modules())
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    groups = model.parameter_groups(1e-2)
    optimizer = torch.optim.AdamW(groups)
    model.loss(model.features(torch.randn(4, 3, 64, 64))).backward()
    optimizer.step()
    after = model.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    in_groups = {id(p) for group in groups for p in group["params"]}
    assert in_groups == {id(p) for p in model.parameters() if p.requires_grad}


def test_grids_have_their_own_rate() -> None:
    groups = tiny().parameter_groups(1e-3, grid_lr=0.1)
    assert [group["lr"] for group in groups] == [1e-3, 0.1]
    assert len(groups[1]["params"]) == 2


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_any_coordinate_dimension(dims: int) -> None:
    model = tiny(local_dims=dims, global_dims=dims, global_nodes=3, local_nodes=3).eval()
    anomaly_map, raw_score = model(torch.randn(2, 3, 64, 64))
    assert anomaly_map.shape == (2, 64, 64)
    assert raw_score.shape == (2,)


def test_result_does_not_depend_on_the_batch() -> None:
    model = tiny().eval()
    image = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        together, alone = model(image)[0], torch.cat([model(image[i : i + 1])[0] for i in range(4)])
    # other batch sizes take other convolution kernels, which round differently
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_auto_scale_is_fixed_once() -> None:
    model = tiny(feature_scale="auto")
    features = model.features(torch.randn(4, 3, 64, 64))
    with pytest.raises(InputError, match="call adapt"):
        model.loss(features)
    model.adapt(features)
    scaled = features[0] * model.config.feature_scale
    assert scaled.square().mean().item() == pytest.approx(20.0, rel=1e-4)
    assert rebuild(model.spec, model.state_dict(), "test").config == model.config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": (16, 64)}, "size: expected at least 32 x 32"),
        ({"global_nodes": 20}, "at most 4096 local and 256 global nodes"),
        ({"local_dims": 0}, "local_dims: expected at least 1"),
        ({"fusion": "big"}, "fusion"),
        ({"colour": 1}, "colour"),
        ({"backbone": {"name": "resnet999", "taps": [1]}}, "got 'resnet999'"),
        ({"backbone": {"name": "resnet18", "taps": [9]}}, "taps"),
    ],
)
def test_refuses_settings(config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(
            "grad",
            {"backbone": {"name": TINY.name, "taps": list(TINY.taps)}} | config,
            weights="random",
        )


def test_frozen_padding_is_that_of_380_px() -> None:
    frozen = Backbone(BackboneConfig("tf_efficientnet_b4", (2, 3), 380), (224, 224), "random")
    actual = Backbone(BackboneConfig("tf_efficientnet_b4", (2, 3)), (224, 224), "random")
    assert frozen.net.blocks[2][0].conv_dw.padding == (2, 2)
    assert actual.net.blocks[2][0].conv_dw.pads == (1, 2, 1, 2)


def test_missing_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_args: object, pretrained: bool = False, **_kw: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="--weights PATH"):
        Backbone(BackboneConfig("resnet18", (1,)), (64, 64), "imagenet")


def test_weights_of_another_network_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="does not fit resnet18"):
        Backbone(BackboneConfig("resnet18", (1,)), (64, 64), str(path))
