"""UniAD meets the authors' numbers, sees nothing of a token's surroundings, exports and trains."""

from __future__ import annotations

from typing import Any

import golden_state
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastad.errors import InputError
from fastad.models.backbone import BackboneConfig
from fastad.models.registry import build, rebuild
from fastad.models.uniad import Attention, Uniad, UniadConfig
from fastad.spec import from_json, to_json
from fastad.training.import_checkpoint.uniad import uniad_from_authors
from fastad.training.recipe import load_recipe

# Largest difference / largest value: 21 convolutional blocks and 8 layers in float32, summed in
# another order than the authors' (measured: 2e-7 to 1.4e-6).
GOLDEN_RELATIVE = 1e-5
TINY: dict[str, Any] = {
    "backbone": BackboneConfig("resnet18", (2, 3)),
    "size": (128, 160),
    "width": 32,
    "heads": 4,
    "ffn_width": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "window": (5, 3),
}


@pytest.fixture(scope="module")
def authors() -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, np.ndarray]]:
    return golden_state.load("uniad")


@pytest.fixture(scope="module")
def outputs(authors: Any) -> dict[str, np.ndarray]:
    state, image, _ = authors
    model = uniad_from_authors(state)
    with torch.no_grad():
        (x,) = model.features(image)
        tokens = model.reconstruct(x.flatten(2).transpose(1, 2))
        x_hat = tokens.transpose(1, 2).unflatten(2, model.grid)
        found = {
            "pred": model.score((x,))[0],
            "feature_align_mean": x.mean((2, 3)),
            "feature_rec_mean": x_hat.mean((2, 3)),
            "feature_align_0_every8": x[0, ::8],
            "feature_rec_0_every8": x_hat[0, ::8],
        }
    return {name: value.numpy() for name, value in found.items()}


def tiny(**changes: Any) -> Uniad:
    torch.manual_seed(0)
    return Uniad(UniadConfig(**{**TINY, **changes}), weights="random").eval()


def images(model: Uniad, B: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, *model.config.size, generator=generator)


@pytest.mark.parametrize(
    "name",
    [
        "feature_align_0_every8",
        "feature_align_mean",
        "feature_rec_0_every8",
        "feature_rec_mean",
        "pred",
    ],
)
def test_agrees_with_authors(authors: Any, outputs: dict[str, np.ndarray], name: str) -> None:
    expected = authors[2][name]
    error = golden_state.relative_error("uniad", name, outputs[name], expected)
    assert error < GOLDEN_RELATIVE


def test_counts_the_published_parameters(authors: Any) -> None:
    model = uniad_from_authors(authors[0])
    assert sum(p.numel() for p in model.parameter_groups(1e-4)[0]["params"]) == 7_717_392
    assert sum(p.numel() for p in model.encoder.parameters()) == 3_159_040
    assert sum(p.numel() for p in model.backbone.parameters()) == 3_635_984


def test_imports_the_cifar_form(authors: Any) -> None:
    state = dict(authors[0])
    state["reconstruction.input_proj.weight"] = torch.zeros(256, 720)
    state["reconstruction.output_proj.weight"] = torch.zeros(720, 256)
    state["reconstruction.output_proj.bias"] = torch.zeros(720)
    model = uniad_from_authors(state)
    assert model.backbone.channels == (24, 32, 56, 160, 448)
    assert model.config.image_score == "mean"
    assert sum(p.numel() for p in model.parameter_groups(1e-4)[0]["params"]) == 7_947_216


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("reconstruction.transformer.decoder.norm.weight", r"1 keys missing \['norm.weight'\]"),
        ("reconstruction.input_proj.weight", "input_proj.weight is missing; is this another"),
        ("backbone._blocks.7._bn1.weight", r"1 keys missing \['backbone.net.blocks.2.1.bn2"),
    ],
)
def test_import_names_missing_keys(authors: Any, key: str, message: str) -> None:
    state = {k: v for k, v in authors[0].items() if k != key}
    with pytest.raises(InputError, match=message):
        uniad_from_authors(state)


@pytest.mark.parametrize("key", ["reconstruction.transformer.encoder.norm.weight", "neck.weight"])
def test_import_names_unknown_keys(authors: Any, key: str) -> None:
    with pytest.raises(InputError, match="1 unknown.*" + key.removeprefix("reconstruction.")):
        uniad_from_authors({**authors[0], key: torch.zeros(256)})


def test_import_refuses_other_backbones(authors: Any) -> None:
    state = {**authors[0], "reconstruction.input_proj.weight": torch.zeros(256, 640)}
    with pytest.raises(InputError, match="272 or 720 feature channels"):
        uniad_from_authors(state)


@pytest.mark.parametrize("size", [(256, 256), (320, 320), (448, 448), (224, 320)])
def test_takes_other_grids(size: tuple[int, int]) -> None:
    model = tiny(size=size, window=(7, 7))
    with torch.no_grad():
        anomaly_map, raw_score = model(images(model, 1))
    assert model.grid == (size[0] // 16, size[1] // 16)
    assert anomaly_map.shape == (1, *size)
    assert torch.isfinite(anomaly_map).all() and torch.isfinite(raw_score).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (112, 112), "window": (7, 7)}, "at least 128 rows or 128 columns"),
        ({"size": (224, 224), "window": (15, 15)}, "blind the middle of a grid"),
        ({"window": (8, 7)}, "odd sizes.*treats an even size n as n . 1"),
        ({"window": (-1, 7)}, "odd sizes"),
        ({"size": (224, 230)}, "multiples of the stride 16"),
        ({"width": 36, "heads": 8}, "even multiple of 8 heads"),
        ({"heads": 0}, "heads: expected at least 1"),
        ({"dropout": 1.5}, "dropout: expected 0..1"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"size": (112, 128), "window": (7, 7)},
        {"size": (112, 112), "window": (7, 0)},
        {"size": (112, 112), "window": (7, 7), "masked": (False, False, False)},
    ],
)
def test_takes_windows_that_leave_a_key(change: dict[str, Any]) -> None:
    model = tiny(**change)
    with torch.no_grad():
        assert torch.isfinite(model(images(model, 1))[0]).all()


def test_attention_ignores_the_neighbourhood() -> None:
    torch.manual_seed(0)
    config = UniadConfig(**TINY)
    attention = Attention(config, masked=True).eval()
    H, W = config.grid
    memory, position = torch.randn(1, H * W, 32), torch.randn(H * W, 32)
    query = torch.randn(1, H * W, 32)
    y, x = 3, 4
    changed = memory.reshape(1, H, W, 32).clone()
    changed[:, y - 2 : y + 3, x - 1 : x + 2] += 1.0
    with torch.no_grad():
        before = attention(query, memory, position)[0, y * W + x]
        inside = attention(query, changed.flatten(1, 2), position)[0, y * W + x]
        changed[:, y + 3, x] += 1.0
        outside = attention(query, changed.flatten(1, 2), position)[0, y * W + x]
    torch.testing.assert_close(inside, before, rtol=0, atol=1e-6)
    assert (outside - before).abs().max() > 1e-3


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the arguments of every call of the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.fastad.neighbor_attention.default:
            self.calls.append(args)
        return function(*args, **(kwargs or {}))


def test_inference_leaves_positions_to_the_operator() -> None:
    model = tiny()
    features = model.features(images(model, 2))
    with torch.no_grad(), Operators() as seen:
        model.score(features)
    N = model.grid[0] * model.grid[1]
    given = [tuple(t if t is None else tuple(t.shape) for t in args[5:]) for args in seen.calls]
    both, only_key = ((4, N, 8), (4, N, 8)), (None, (4, N, 8))
    # Layers of the encoder; of the decoder, whose learned queries hold their positions already.
    assert given == [both, both, only_key, both, only_key, both]


@pytest.mark.parametrize("learned", [False, True], ids=["tokens", "learned queries"])
def test_exported_attention_adds_once_to_queries_and_keys(learned: bool) -> None:
    torch.manual_seed(0)
    config = UniadConfig(**TINY)
    attention = Attention(config, masked=True).eval()
    N = config.grid[0] * config.grid[1]
    memory, position = torch.randn(2, N, 32), torch.randn(N, 32)
    inputs = (torch.randn(N, 32) if learned else memory, memory, position)
    program = torch.export.export(attention, inputs)
    added = [n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(added) == 3  # query, key, mask
    # The learned queries meet their position once for all images, not once for each.
    assert (2 in added[0].meta["val"].shape[:1]) is not learned
    with torch.no_grad():
        expected = attention(*inputs)
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-5, atol=1e-6)


def test_trains_the_attention_it_evaluates() -> None:
    model = tiny(dropout=0.0, jitter_probability=0.0)
    (x,) = model.features(images(model, 2))
    with torch.no_grad():
        evaluated = model.loss((x,))
        trained = model.train().loss((x,))
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=0)


def test_jitter_follows_each_token_norm() -> None:
    model = tiny(jitter_scale=20.0)
    x = torch.rand(4, 80, model.C) * torch.tensor([1.0, 10.0, 100.0, 0.0])[:, None, None]
    noise = model._jitter(x) - x
    expected = 20.0 / model.C * x.norm(dim=-1)
    deviation = noise.square().mean(-1).sqrt()
    # The deviation of C = 384 normal draws scatters by 1 / sqrt(2 C) = 3.6 %.
    torch.testing.assert_close(deviation, expected, rtol=0.2, atol=0)


def test_jitter_is_off_outside_training() -> None:
    model = tiny()
    features = model.features(images(model, 1))
    with torch.no_grad():
        assert torch.equal(model.loss(features), model.loss(features))
        model.train()
        assert not torch.equal(model.loss(features), model.loss(features))


def test_features_ignore_training_mode() -> None:
    model = tiny()
    image = images(model, 2)
    (before,) = model.features(image)
    (after,) = model.train().features(image)
    assert torch.equal(before, after) and not before.requires_grad


@pytest.mark.parametrize("image_score", ["max", "mean"])
def test_map_and_score_follow_their_rules(image_score: str) -> None:
    model = tiny(image_score=image_score)
    with torch.no_grad():
        features = model.features(images(model, 2))
        d = model.distance(features)[:, None].double()
        anomaly_map, raw_score = model.score(features)
    expected = F.interpolate(d, size=model.config.size, mode="bilinear", align_corners=True)
    # Matrices are rounded to float32 once: 1e-6 of values around 10.
    torch.testing.assert_close(anomaly_map.double(), expected[:, 0], rtol=1e-6, atol=1e-6)
    pooled = F.avg_pool2d(expected, 16, stride=1).amax((1, 2, 3))
    score = pooled if image_score == "max" else expected.mean((1, 2, 3))
    torch.testing.assert_close(raw_score.double(), score, rtol=1e-6, atol=1e-6)


def test_batch_does_not_change_an_image() -> None:
    model = tiny()
    image = images(model, 3)
    with torch.no_grad():
        together, alone = model(image), model(image[1:2])
    torch.testing.assert_close(together[0][1:2], alone[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(together[1][1:2], alone[1], rtol=1e-5, atol=0)


def test_only_the_transformer_learns() -> None:
    model = tiny().train()
    model.loss(model.features(images(model, 2))).backward()
    trained = model.parameter_groups(1e-4)[0]["params"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert len(trained) + sum(1 for _ in model.backbone.parameters()) == sum(
        1 for _ in model.parameters()
    )


def test_loss_falls() -> None:
    model = tiny().train()
    features = model.features(images(model, 4))
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3), weight_decay=1e-4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(features)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_layers_start_as_published() -> None:
    model = tiny()
    first, second = model.decoder[0], model.decoder[1]
    assert torch.equal(first.queries, second.queries)
    assert torch.equal(first.attention_memory.qkv.weight, second.attention_memory.qkv.weight)
    assert not torch.equal(first.ffn[0].weight, second.ffn[0].weight)
    bound = (6 / (32 + 3 * 32)) ** 0.5
    assert 0.9 * bound < first.attention_memory.qkv.weight.abs().max() <= bound
    assert not first.attention_memory.qkv.bias.any()


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
    model = tiny()
    spec = from_json(type(model.spec), to_json(model.spec), "test")
    again = rebuild(spec, model.state_dict(), "test")
    with torch.no_grad():
        assert torch.equal(again(images(model, 1))[0], model(images(model, 1))[0])


def test_refuses_unknown_optimiser_settings() -> None:
    with pytest.raises(InputError, match=r"unknown optimiser settings.*grid_lr"):
        tiny().parameter_groups(1e-4, grid_lr=0.1)


def test_paper_recipe_builds_the_published_network() -> None:
    recipe = load_recipe("uniad.paper")
    assert (recipe.train.epochs, recipe.train.batch, recipe.train.lr) == (1000, 8, 1e-4)
    model = build(recipe.method, recipe.config, weights="random")
    groups = model.parameter_groups(recipe.train.lr, **recipe.train.groups)
    assert sum(p.numel() for group in groups for p in group["params"]) == 7_717_392


def test_cifar_recipe_builds_the_published_network() -> None:
    recipe = load_recipe("uniad.cifar")
    assert (recipe.train.epochs, recipe.train.batch, recipe.train.seed) == (1000, 16, 131)
    model = build(recipe.method, recipe.config, weights="random")
    assert (model.C, model.config.image_score) == (720, "mean")
    assert model.backbone.channels == (24, 32, 56, 160, 448)
    groups = model.parameter_groups(recipe.train.lr, **recipe.train.groups)
    assert sum(p.numel() for group in groups for p in group["params"]) == 7_947_216
