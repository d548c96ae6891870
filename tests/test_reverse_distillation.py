"""RD4AD meets the authors' numbers, keeps to its rules for maps and losses, exports and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_state
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

from fastad.errors import InputError
from fastad.models.backbone import BackboneConfig
from fastad.models.registry import build, rebuild
from fastad.models.reverse_distillation import (
    ResidualBlock,
    ReverseDistillation,
    ReverseDistillationConfig,
)
from fastad.spec import from_json, to_json
from fastad.training.import_checkpoint.rd4ad import rd4ad_from_authors, read_rd4ad_state
from fastad.training.recipe import load_recipe

# Largest difference / largest value: about 90 convolutions in float32, summed in another order
# than the authors' (measured: up to 3e-7).
GOLDEN_RELATIVE = 1e-5
TINY: dict[str, Any] = {
    "backbone": BackboneConfig("resnet18.tv_in1k", (1, 2, 3)),
    "size": (64, 96),
    "bottleneck_depth": 1,
    "decoder_depths": (1, 2, 1),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def authors() -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, np.ndarray]]:
    return golden_state.load("rd4ad")


@pytest.fixture(scope="module")
def imported(authors: Any) -> ReverseDistillation:
    return rd4ad_from_authors(authors[0])


@pytest.fixture(scope="module")
def outputs(authors: Any, imported: ReverseDistillation) -> dict[str, np.ndarray]:
    found: dict[str, torch.Tensor] = {}
    hooks = [
        stage.register_forward_hook(
            lambda _m, _i, out, level=level: found.__setitem__(
                f"student_mean_{level}", out.mean((2, 3))
            )
        )
        for level, stage in zip((2, 1, 0), imported.decoder, strict=True)
    ]
    with torch.no_grad():
        features = imported.features(authors[1])
        found["anomaly_map"], found["raw_score"] = imported.score(features)
    for hook in hooks:
        hook.remove()
    for level, f in enumerate(features):
        found[f"teacher_mean_{level}"] = f.mean((2, 3))
    return {name: value.numpy() for name, value in found.items()}


def tiny(**changes: Any) -> ReverseDistillation:
    torch.manual_seed(0)
    config = ReverseDistillationConfig(**{**TINY, **changes})
    return ReverseDistillation(config, weights="random").eval()


def images(model: ReverseDistillation, B: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, *model.config.size, generator=generator)


@pytest.mark.parametrize(
    "name",
    [f"{who}_mean_{level}" for who in ("teacher", "student") for level in range(3)]
    + ["anomaly_map", "raw_score"],
)
def test_agrees_with_authors(authors: Any, outputs: dict[str, np.ndarray], name: str) -> None:
    expected = authors[2][name]
    error = golden_state.relative_error("rd4ad", name, outputs[name], expected)
    assert error < GOLDEN_RELATIVE


def test_counts_the_published_parameters(imported: ReverseDistillation) -> None:
    found = [count(m) for m in (imported.backbone, imported.bottleneck, imported.decoder)]
    assert found == [24_862_528, 58_885_120, 24_917_504]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet50", (8.54, 30.83, 15.82)), ("resnet18", (2.78, 11.68, 3.70))],
)
def test_counts_parameters_of_smaller_teachers(
    name: str, millions: tuple[float, float, float]
) -> None:
    config = ReverseDistillationConfig(BackboneConfig(f"{name}.tv_in1k", (1, 2, 3)), (64, 64))
    model = ReverseDistillation(config, weights="random")
    found = [count(m) / 1e6 for m in (model.backbone, model.bottleneck, model.decoder)]
    assert found == pytest.approx(millions, abs=0.005)


def test_resnet34_has_a_bottleneck_of_three_blocks() -> None:
    config = ReverseDistillationConfig(BackboneConfig("resnet34.tv_in1k", (1, 2, 3)), (64, 64))
    model = ReverseDistillation(config, weights="random")
    assert (model.config.block, model.config.bottleneck_depth) == ("basic", 3)
    assert model.config.decoder_depths == (3, 4, 6)


def test_imports_half_width_bottlenecks(authors: Any) -> None:
    state = dict(authors[0])
    for key, value in authors[0].items():
        part = key.removeprefix("bn.bn_layer.")
        if part == key or part[1:].startswith((".downsample", ".bn3")):
            continue
        layer = part[2:].split(".")[0]
        halved = value[:512] if value.dim() and layer != "conv3" else value
        state[key] = halved[:, :512] if layer in ("conv2", "conv3") else halved
    model = rd4ad_from_authors(state)
    assert (model.config.bottleneck_width, model.config.decoder_width) == (64, 128)
    assert count(model.bottleneck) / 1e6 == pytest.approx(30.83, abs=0.005)


def test_import_leaves_out_what_is_never_called(authors: Any) -> None:
    state = {k: v for k, v in authors[0].items() if ".conv4." not in k and ".bn4." not in k}
    state["bn.memory.0.weight"] = torch.zeros(3)
    model = rd4ad_from_authors(state)
    assert not any("4." in key.split("blocks")[0] for key in model.bottleneck.state_dict())


def test_import_takes_a_teacher_without_counters(
    authors: Any, imported: ReverseDistillation
) -> None:
    head = {k: v for k, v in authors[0].items() if not k.startswith("encoder.")}
    teacher = {
        k.removeprefix("encoder."): v
        for k, v in authors[0].items()
        if k.startswith("encoder.") and not k.endswith("num_batches_tracked")
    }
    model = rd4ad_from_authors(head, teacher)
    key = "backbone.net.layer3.5.conv2.weight"
    assert torch.equal(model.state_dict()[key], imported.state_dict()[key])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("decoder.layer2.1.bn2.bias", r"1 keys missing \['decoder.1.1.norms.1.bias'\]"),
        ("encoder.layer1.0.conv1.weight", r"1 keys missing \['backbone.net.layer1.0.conv1"),
        ("bn.conv1.weight", "bn.conv1.weight is missing; is this another method"),
    ],
)
def test_import_names_missing_keys(authors: Any, key: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rd4ad_from_authors({k: v for k, v in authors[0].items() if k != key})


@pytest.mark.parametrize("key", ["bn.extra.weight", "decoder.layer4.0.conv1.weight", "head.bias"])
def test_import_names_unknown_keys(authors: Any, key: str) -> None:
    with pytest.raises(InputError, match=f"1 unknown.*{key}"):
        rd4ad_from_authors({**authors[0], key: torch.zeros(3)})


def test_reads_the_authors_file(tmp_path: Path) -> None:
    path = tmp_path / "wres50_carpet.pth"
    torch.save({"bn": {"conv1.weight": torch.ones(2)}, "decoder": {"a": torch.ones(1)}}, path)
    assert sorted(read_rd4ad_state(path)) == ["bn.conv1.weight", "decoder.a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, r"expected the keys bn and decoder, got \['state_dict'\]"),
        ([1], "expected the keys bn and decoder, got list"),
        ({"bn": {"a": 1}, "decoder": {}}, r"expected only tensors, \['bn.a'\] are not"),
        (Path("x"), "nothing in it was executed"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(InputError, match=message):
        read_rd4ad_state(tmp_path / "file.pth")


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing there"):
        read_rd4ad_state(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (64, 80)}, r"multiples of 32.*resnet18.tv_in1k.*gives.*\(4, 5\)"),
        ({"size": (16, 64)}, "at least 32 x 32"),
        ({"backbone": BackboneConfig("resnet18", (1, 2))}, "expected three"),
        ({"backbone": BackboneConfig("resnet18", (0, 1, 3))}, "three teacher maps that halve"),
        ({"decoder_depths": (1, 0, 1)}, "decoder_depths: expected at least 1 each"),
        ({"bottleneck_width": 0}, "bottleneck_width: expected at least 1"),
        ({"sigma_px": 0.0}, "sigma_px: expected more than 0"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    ("name", "taps", "signed"),
    [
        ("resnet18", (1, 2, 3), False),
        ("resnetv2_50.onnx_zoo", (1, 2, 3), True),
        ("efficientnet_lite0", (1, 2, 3), True),
    ],
)
def test_student_reaches_the_signs_of_its_teacher(
    name: str, taps: tuple[int, ...], signed: bool
) -> None:
    model = tiny(backbone=BackboneConfig(name, taps), size=(64, 64))
    with torch.no_grad():
        f = model.features(images(model, 1))
        g = model.reconstruct(f)
    assert [t.shape for t in g] == [t.shape for t in f]
    assert model.config.signed is signed
    assert [bool((t < 0).any()) for t in g] == [signed] * 3


@pytest.mark.parametrize("loss_form", ["flattened", "position"])
def test_loss_is_the_named_cosine(loss_form: str) -> None:
    model = tiny(loss_form=loss_form)
    with torch.no_grad():
        f = model.features(images(model, 3))
        found = model.loss(f)
        pairs = list(zip(f, model.reconstruct(f), strict=True))
    if loss_form == "flattened":
        pairs = [(a.flatten(1), b.flatten(1)) for a, b in pairs]
    expected = sum(
        (1 - F.cosine_similarity(a.double(), b.double(), dim=1)).mean() for a, b in pairs
    )
    assert found.item() == pytest.approx(float(expected), rel=1e-5)


def test_map_is_the_blurred_sum_of_the_levels() -> None:
    model = tiny()
    with torch.no_grad():
        f = model.features(images(model, 2))
        anomaly_map, raw_score = model.score(f)
        g = model.reconstruct(f)
    levels = sum(
        F.interpolate(
            (1 - F.cosine_similarity(a.double(), b.double(), dim=1))[:, None],
            size=model.config.size,
            mode="bilinear",
            align_corners=True,
        )
        for a, b in zip(f, g, strict=True)
    )
    expected = np.stack([gaussian_filter(level[0].numpy(), 4.0) for level in levels])
    # 1 - cosine has an absolute error of some 1e-7 in float32, and three levels are summed.
    np.testing.assert_allclose(anomaly_map.numpy(), expected, rtol=0, atol=2e-6)
    assert torch.equal(raw_score, anomaly_map.amax((1, 2)))


@pytest.mark.parametrize("inner", [None, 8])
def test_blocks_double_the_size(inner: int | None) -> None:
    block = ResidualBlock(16, 12, inner, "up")
    assert block(torch.randn(2, 16, 3, 5)).shape == (2, 12, 6, 10)


def test_dead_student_positions_have_finite_gradients() -> None:
    model = tiny(loss_form="position")
    last = model.decoder[-1][-1].norms[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-1e6)  # the last level is all 0 behind its ReLU
    f = model.features(images(model, 1))
    assert not model.reconstruct(f)[0].any()
    model.loss(f).backward()
    trained = model.parameter_groups(1e-3)[0]["params"]
    assert all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None)


def test_batch_does_not_change_an_image() -> None:
    model = tiny()
    image = images(model, 3)
    with torch.no_grad():
        together, alone = model(image), model(image[1:2])
    torch.testing.assert_close(together[0][1:2], alone[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(together[1][1:2], alone[1], rtol=1e-5, atol=0)


def test_only_bottleneck_and_decoder_learn() -> None:
    model = tiny().train()
    statistics = model.backbone.net.bn1.running_mean.clone()
    features = model.features(images(model, 2))
    model.loss(features).backward()
    trained = model.parameter_groups(1e-3)[0]["params"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert sum(p.numel() for p in trained) == count(model.bottleneck) + count(model.decoder)
    assert torch.equal(model.backbone.net.bn1.running_mean, statistics)


def test_loss_falls() -> None:
    model = tiny().train()
    features = model.features(images(model, 2))
    optimizer = torch.optim.Adam(model.parameter_groups(5e-3), betas=(0.5, 0.999))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(features)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_exports_with_any_batch() -> None:
    model = tiny()
    batch = torch.export.Dim("B", min=1, max=64)
    program = torch.export.export(model, (images(model, 2),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for found, expected in zip(
            program.module()(images(model, 3)), model(images(model, 3)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_rebuilds_from_its_spec() -> None:
    model = tiny(backbone=BackboneConfig("resnetv2_50.onnx_zoo", (1, 2, 3)), size=(32, 32))
    spec = from_json(type(model.spec), to_json(model.spec), "test")
    again = rebuild(spec, model.state_dict(), "test")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(images(model, 1))[0], model(images(model, 1))[0])


def test_refuses_unknown_optimiser_settings() -> None:
    with pytest.raises(InputError, match=r"unknown optimiser settings.*grid_lr"):
        tiny().parameter_groups(1e-3, grid_lr=0.1)


def test_paper_recipe_builds_the_published_network() -> None:
    recipe = load_recipe("rd4ad.paper")
    assert (recipe.train.epochs, recipe.train.batch, recipe.train.lr) == (200, 16, 5e-3)
    assert recipe.train.betas == (0.5, 0.999)
    model = build(recipe.method, recipe.config, weights="random")
    groups = model.parameter_groups(recipe.train.lr, **recipe.train.groups)
    assert sum(p.numel() for group in groups for p in group["params"]) == 83_802_624
