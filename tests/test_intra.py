"""InTra against plain definitions: losses, windows, positions, sharing, map, size and export."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import ndimage
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastad.errors import InputError
from fastad.models.intra import (
    Block,
    FeatureAttention,
    Intra,
    IntraConfig,
    Step,
    published_config,
    window_corner,
)
from fastad.models.intra_losses import (
    GradientMap,
    PatchLoss,
    gms_distance,
    multi_scale_gms_loss,
)
from fastad.models.registry import build, rebuild
from fastad.spec import ModelSpec, from_json, to_json

TINY = IntraConfig(
    size=(32, 32), patch_px=4, window=3, width=16, blocks=5, heads=2, windows_per_step=24
)
POSITIONS = ("global", "local")
RECIPE = Path(__file__).parents[1] / "fastad" / "training" / "recipes" / "intra.paper.yaml"


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(seed: int = 0, **changes: Any) -> Intra:
    torch.manual_seed(seed)
    method = Intra(replace(TINY, **changes))
    with torch.no_grad():  # published starts are too small to tell positions apart
        method.position.normal_()
        method.covered_token.normal_()
    return method.double().eval()


def plain_gms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """GMS of two [H, W] arrays, as the definition has it."""
    kernel = np.array([[1, 0, -1]] * 3) / 3.0
    g1, g2 = (
        np.sqrt(
            ndimage.convolve(a, kernel, mode="nearest") ** 2
            + ndimage.convolve(a, kernel.T, mode="nearest") ** 2
            + 1e-12
        )
        for a in (x, y)
    )
    return (2 * g1 * g2 + 0.0026) / (g1**2 + g2**2 + 0.0026)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM of two [H, W] arrays with an 11 x 11 Gaussian window and repeated borders."""

    def mean(a: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(a, 1.5, mode="nearest", radius=5)

    c1, c2 = 0.01**2, 0.03**2
    mx, my = mean(x), mean(y)
    vx, vy = mean((x) ** 2) - mx**2, mean(y**2) - my**2
    cov = mean(x * y) - mx * my
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def each(plain: Any, x: Tensor, y: Tensor) -> np.ndarray:
    pairs = zip(x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy(), strict=True)
    return np.stack([plain(a, b) for a, b in pairs]).reshape(x.shape)


@pytest.mark.parametrize("side", [4, 16, 33])
def test_gms_distance_is_one_minus_the_defined_similarity(side: int) -> None:
    x, y = images(2, 3, side, side), images(2, 3, side, side, seed=1)
    got = gms_distance(x, y).numpy()
    np.testing.assert_allclose(got, 1 - each(plain_gms, x, y), rtol=0, atol=1e-13)


def test_gms_is_blind_to_a_constant_shift_and_zero_for_equal_images() -> None:
    x = images(1, 3, 16, 16)
    assert gms_distance(x, x).abs().max() == 0.0
    assert gms_distance(x, x + 0.1).max() < 1e-20


def test_multi_scale_gms_averages_halved_sizes() -> None:
    x, y = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    want = []
    for side in (16, 8, 4):
        k = 16 // side
        a, b = (t.reshape(2, 3, side, k, side, k).mean((3, 5)) for t in (x, y))
        want.append((1 - each(plain_gms, a, b)).mean())
    assert multi_scale_gms_loss(x, y, 3).item() == pytest.approx(np.mean(want), rel=1e-12)
    assert multi_scale_gms_loss(x, y, 1).item() == pytest.approx(want[0], rel=1e-12)


@pytest.mark.parametrize("side", [4, 16])
def test_ssim_is_the_defined_one_with_repeated_borders(side: int) -> None:
    x, y = images(2, 3, side, side), images(2, 3, side, side, seed=1)
    got = PatchLoss(side, 0.01, 0.01, 1).double()
    got.blur = blur64(side)
    np.testing.assert_allclose(got.ssim(x, y).numpy(), each(plain_ssim, x, y), rtol=0, atol=1e-12)


def blur64(side: int) -> Tensor:
    """The blur in float64: the module's own is rounded to float32."""
    eye = np.eye(side)
    columns = [ndimage.gaussian_filter1d(row, 1.5, mode="nearest", radius=5) for row in eye]
    return torch.from_numpy(np.stack(columns, 1))


def test_ssim_agrees_with_scikit_image_where_windows_are_complete() -> None:
    x, y = images(1, 1, 32, 32), images(1, 1, 32, 32, seed=1)
    _, want = structural_similarity(
        x[0, 0].numpy(),
        y[0, 0].numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    got = PatchLoss(32, 0.01, 0.01, 1).double().ssim(x, y)[0, 0].numpy()
    inner = slice(5, -5)
    # 1e-5: the blur is stored in float32 (6e-8), and variances are differences of means.
    np.testing.assert_allclose(got[inner, inner], want[inner, inner], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("gms", "ssim"), [(0.01, 0.01), (1.0, 0.0), (0.0, 1.0)])
def test_patch_loss_weighs_its_three_terms(gms: float, ssim: float) -> None:
    y, truth = images(3, 3, 16, 16), images(3, 3, 16, 16, seed=1)
    want = (
        np.mean((y - truth).numpy() ** 2)
        + gms * np.mean(1 - each(plain_gms, y, truth))
        + ssim * (1 - np.mean(each(plain_ssim, y, truth)))
    )
    got = PatchLoss(16, gms, ssim, 1).double()(y, truth).item()
    assert got == pytest.approx(want, rel=1e-6)  # the blur is stored in float32


def test_patches_are_cut_row_major_in_channel_row_column_order() -> None:
    method = tiny(size=(24, 32), quarter_turns=False)
    image = images(2, 3, 24, 32)
    patches = method.patches(image)
    for i, j in [(0, 0), (2, 5), (5, 7)]:
        want = image[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        assert torch.equal(patches[:, i * 8 + j].reshape(2, 3, 4, 4), want)
    assert torch.equal(method.stitch(patches), image)


@pytest.mark.parametrize("n", [7, 8, 16, 20, 32])
def test_window_corner_is_the_papers_one_based_formula(n: int) -> None:
    def paper(c: int) -> int:
        g = max(1, c - 7 // 2)
        return g - max(0, g + 7 - n - 1)

    want = [paper(t + 1) - 1 for t in range(n)]
    assert window_corner(np.arange(n), n, 7).tolist() == want


@pytest.mark.parametrize(("n", "corners", "centred"), [(16, 100, 39), (20, 196, 49), (32, 676, 66)])
def test_window_counts_of_the_published_sizes(n: int, corners: int, centred: int) -> None:
    first = window_corner(np.arange(n), n, 7)
    assert len(set(first)) ** 2 == corners
    share = np.mean(np.arange(n) - first == 3) ** 2
    assert round(100 * share) == centred


def inference_windows(method: Intra) -> tuple[Tensor, Tensor]:
    """Corner and covered place of the window of each patch, by the plain formula."""
    (N, M), L = method.grid, method.config.window
    corner, place = [], []
    for t in range(N):
        for u in range(M):
            r = min(max(t - L // 2, 0), N - L)
            s = min(max(u - L // 2, 0), M - L)
            corner.append(r * M + s)
            place.append((t - r) * L + (u - s))
    return torch.tensor(corner)[None], torch.tensor(place)[None]


@pytest.mark.parametrize("position", POSITIONS)
def test_tokens_are_patches_plus_positions_with_one_covered(position: str) -> None:
    method = tiny(position=position)
    patches = method.patches(images(1, 3, 32, 32))
    corner, place = inference_windows(method)
    got = method.tokens(patches, corner, place)
    e = method.embed(patches)[0]
    for w in (0, 7, 20, 36, 63):  # corners, edges and the inside of the 8 x 8 grid
        r, s = divmod(int(corner[0, w]), 8)
        for i in range(r, r + 3):
            for j in range(s, s + 3):
                f = i * 8 + j if position == "global" else (i - r) * 3 + (j - s)
                body = method.covered_token if i * 8 + j == w else e[i * 8 + j]
                want = body + method.position[f]
                torch.testing.assert_close(got[w, (i - r) * 3 + (j - s)], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("windows", [7, 24, 64])
def test_inference_steps_hold_every_window_once(position: str, windows: int) -> None:
    method = tiny(position=position, windows_per_step=windows)
    patches = method.patches(images(2, 3, 32, 32))
    e = method.embed(patches)
    spread = []
    for step in method.steps:
        assert isinstance(step, Step)
        seen = e[:, step.patch] + method.position[step.place]
        covered = method.covered_token + method.position[step.covered]
        spread.append(step.spread(seen, covered, 9).reshape(2, -1, 9, 16))
    got = torch.cat(spread, 1)[:, method.order]
    corner, place = (x.expand(2, -1) for x in inference_windows(method))
    want = method.tokens(patches, corner, place).reshape(2, 64, 9, 16)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("windows", [7, 24, 64])
def test_shared_inference_equals_every_window_on_its_own(position: str, windows: int) -> None:
    method = tiny(position=position, windows_per_step=windows)
    patches = method.patches(images(2, 3, 32, 32))
    corner, place = (x.expand(2, -1) for x in inference_windows(method))
    with torch.no_grad():
        want = method.paint(method.tokens(patches, corner, place)).reshape(2, 64, 48)
        got = method.paint_all(patches)
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_painted_patch_does_not_see_its_own_pixels(position: str) -> None:
    method = tiny(position=position)
    image = images(1, 3, 32, 32)
    other = image.clone()
    other[:, :, 12:16, 16:20] += 0.5  # patch (3, 4) of 8 x 8: no border window holds it
    with torch.no_grad():
        change = (method.reconstruct(other) - method.reconstruct(image)).abs()
    change = change.reshape(3, 8, 4, 8, 4).amax((0, 2, 4))
    assert change[3, 4] == 0.0
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[2:5, 3:6] = True
    seen[3, 4] = False
    assert (change[seen] > 1e-4).all()
    seen[3, 4] = True
    assert (change[~seen] == 0.0).all()


def test_training_windows_hide_the_covered_patch_only() -> None:
    method = tiny()
    patches = method.patches(images(1, 3, 32, 32)).requires_grad_()
    corner, place = torch.tensor([[2 * 8 + 4]]), torch.tensor([[5]])  # covers patch (3, 6)
    method.paint(method.tokens(patches, corner, place)).square().sum().backward()
    assert patches.grad is not None
    slope = patches.grad.abs().amax(-1).reshape(8, 8)
    assert slope[3, 6] == 0.0
    assert int((slope > 0).sum()) == 8
    assert (slope[2:5, 4:7] > 0).sum() == 8


def test_training_loss_meets_each_window_with_its_own_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = tiny(flips=False, quarter_turns=False).train()
    image = images(2, 3, 32, 32)
    corner = torch.tensor([[0, 21], [45, 9]])
    place = torch.tensor([[8, 1], [3, 4]])
    truth = []
    for b in range(2):
        for c, p in zip(corner[b].tolist(), place[b].tolist(), strict=True):
            i, j = c // 8 + p // 3, c % 8 + p % 3
            truth.append(image[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1))
    painted = torch.stack(truth)
    monkeypatch.setattr(method, "draw_windows", lambda *_: (corner, place))
    monkeypatch.setattr(method, "paint", lambda _: painted)
    assert method.loss((image,)).abs().item() < 1e-9
    painted = painted.flip(0)
    assert method.loss((image,)).item() > 0.01


def test_random_windows_are_uniform_over_corners_and_places() -> None:
    method = tiny(size=(20, 32), quarter_turns=False)
    corner, place = method.draw_windows(30, 600, torch.Generator().manual_seed(0))
    r, s = corner // 8, corner % 8
    assert (r.unique().tolist(), s.unique().tolist()) == ([0, 1, 2], [0, 1, 2, 3, 4, 5])
    for counts in (torch.bincount((r * 6 + s).flatten()), torch.bincount(place.flatten())):
        mean = 18_000 / len(counts)
        chi2 = ((counts - mean) ** 2 / mean).sum().item()
        df = len(counts) - 1
        assert chi2 < df + 5 * math.sqrt(2 * df)  # five standard deviations; the seed is fixed


def test_attention_is_softmax_over_each_head_of_projected_tokens() -> None:
    torch.manual_seed(0)
    attention = FeatureAttention(16, 2).double()
    x = images(2, 9, 16) * 8 - 4
    q, k, v = attention.project(x)
    for made, mlp in ((q, attention.query), (k, attention.key)):
        hidden = x @ mlp[0].weight.T + mlp[0].bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        torch.testing.assert_close(made, hidden @ mlp[2].weight.T + mlp[2].bias)
    heads = []
    for h in range(2):
        a = torch.softmax(
            q[..., 4 * h : 4 * h + 4] @ k[..., 4 * h : 4 * h + 4].mT / math.sqrt(4), -1
        )
        heads.append(a @ v[..., 8 * h : 8 * h + 8])
    want = attention.out(torch.cat(heads, -1))
    torch.testing.assert_close(attention.mix(q, k, v), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("blocks", [1, 2, 4, 5])
@pytest.mark.parametrize("skips", [True, False])
def test_long_skips_join_block_i_to_the_input_of_its_mirror(blocks: int, skips: bool) -> None:
    method = tiny(blocks=blocks, long_skips=skips)
    z = tokens = images(4, 9, 16)
    kept = {}
    for i in range(1, blocks + 1):
        mirror = blocks + 1 - i
        if skips and mirror < i - 1:  # its own predecessor would only be doubled
            z = z + kept[mirror]
        z = kept[i] = method.blocks[i - 1](z)
    want = method.head(method.norm(z).mean(1))
    torch.testing.assert_close(method.paint(tokens), want, rtol=0, atol=1e-14)


def full_size(config: IntraConfig) -> Intra:
    with torch.device("meta"):
        return Intra(config).to("meta")


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (IntraConfig(position="local"), 25_088),
        (IntraConfig((256, 256)), 131_072),
        (IntraConfig((320, 320)), 204_800),
        (IntraConfig((512, 512)), 524_288),
    ],
    ids=["local", "256", "320", "512"],
)
def test_full_size_has_the_published_number_of_parameters(config: IntraConfig, table: int) -> None:
    method = full_size(config)
    block = method.blocks[0]
    assert isinstance(block, Block)
    count = {
        part: sum(p.numel() for p in module.parameters())
        for part, module in (("mfsa", block.attention), ("block", block), ("all", method))
    }
    assert count["mfsa"] == 2_100_736
    assert count["block"] == 4_202_496
    assert method.position.numel() == table
    assert count["all"] == 54_632_448 + 393_728 + 393_984 + 512 + table + 1_024
    trained = sum(p.numel() for p in method.parameter_groups(1e-4)[0]["params"])
    assert trained == count["all"]


def multiply_adds(call: Any, *args: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*args)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("side", "position", "distinct", "constants", "gain"),
    [
        (256, "global", 256, 256, 3.3),
        (320, "global", 400, 400, 3.3),
        (512, "global", 1024, 1024, 3.3),
        # Corners x 49, less the covered place where a corner has one window only.
        (256, "local", 100 * 49 - 8**2, 49, 2.0),
        (320, "local", 196 * 49 - 12**2, 49, 1.7),
        (512, "local", 676 * 49 - 24**2, 49, 1.2),
    ],
)
def test_full_size_costs_and_saves_what_sharing_promises(
    side: int, position: Any, distinct: int, constants: int, gain: float
) -> None:
    W = (side // 16) ** 2
    config = IntraConfig((side, side), position=position, windows_per_step=W)
    method = full_size(config)
    project = 2 * (512 * 1024 + 1024 * 256) + 512 * 512  # per token: q, k, v
    rest = 512 * 512 + 2 * 512 * 2048  # per token: output, MLP
    softmax = 49 * 49 * (256 + 512)  # per window: logits, mixing
    embed, head = W * 768 * 512, W * 512 * 768
    block = 49 * (project + rest) + softmax
    assert round(block / 1e6, 1) == 207.4
    assert round((13 * block + 48 * 768 * 512 + 512 * 768) / 1e9, 3) == 2.715
    dense = multiply_adds(method.paint, torch.empty(W, 49, 512, device="meta")) + embed
    assert dense == 13 * W * block + embed + head
    shared = multiply_adds(method.paint_all, torch.empty(1, W, 768, device="meta"))
    assert shared == dense - (49 * W - distinct - constants) * project
    folded = shared - constants * project  # what runtimes turn into constants
    assert round(100 * (1 - folded / dense), 1) == gain


def test_augmentation_makes_the_eight_arrangements_and_nothing_else() -> None:
    method = tiny()
    image = images(1, 3, 32, 32).expand(200, -1, -1, -1)
    before = image.clone()
    got = method.augment(image, torch.Generator().manual_seed(0))
    want = [f.rot90(k, (1, 2)) for f in (image[0], image[0].flip(1)) for k in range(4)]
    which = [[torch.equal(one, w) for w in want].index(True) for one in got]
    assert set(which) == set(range(8))
    assert min(which.count(i) for i in range(8)) > 8  # 25 expected, 3.6 standard deviations
    assert torch.equal(image, before)
    again = method.augment(image, torch.Generator().manual_seed(0))
    assert torch.equal(got, again)


@pytest.mark.parametrize(
    ("flips", "turns", "arrangements"), [(False, False, 1), (True, False, 4), (False, True, 4)]
)
def test_augmentation_can_be_switched_off(flips: bool, turns: bool, arrangements: int) -> None:
    method = tiny(flips=flips, quarter_turns=turns)
    image = images(1, 3, 32, 32).expand(100, -1, -1, -1)
    got = method.augment(image, torch.Generator().manual_seed(0))
    assert len(torch.unique(got.flatten(1), dim=0)) == arrangements


def test_validation_loss_has_no_noise_and_is_that_of_the_full_reconstruction() -> None:
    method = tiny()
    image = images(2, 3, 32, 32)
    with torch.no_grad():
        loss = method.loss((image,))
        assert loss == method.loss((image,))
        y, truth = (method.patches(x) for x in (method.reconstruct(image), image))
        want = method.patch_loss(y.reshape(-1, 3, 4, 4), truth.reshape(-1, 3, 4, 4))
        torch.testing.assert_close(loss, want)
        method.train()
        assert method.loss((image,)) != method.loss((image,))


@pytest.mark.parametrize("position", POSITIONS)
def test_training_learns_to_paint_stripes(position: Any) -> None:
    torch.manual_seed(0)
    method = Intra(replace(TINY, position=position, quarter_turns=False)).train()
    row = (torch.arange(32) % 8 < 4).float()
    image = (0.2 + 0.6 * row).expand(4, 3, 32, 32)
    optimizer = torch.optim.Adam(method.parameter_groups(3e-3))
    with torch.no_grad():
        before = method.eval().loss((image,))
    method.train()
    for _ in range(60):
        optimizer.zero_grad()
        method.loss((image,)).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())
    with torch.no_grad():
        after = method.eval().loss((image,))
    assert after < 0.2 * before


def test_gradient_map_is_pool_blur_resize_and_mean() -> None:
    x, y = images(2, 3, 48, 64), images(2, 3, 48, 64, seed=1)
    d = torch.from_numpy(1 - each(plain_gms, x, y)).mean(1, keepdim=True)
    tap = torch.exp(-0.5 * (torch.arange(-10.0, 11.0, dtype=torch.float64) / 2.0) ** 2)
    kernel = torch.outer(tap, tap)[None, None] / tap.sum() ** 2
    want = []
    for pool in (2, 4):
        m = F.avg_pool2d(d, pool)
        m = F.conv2d(F.pad(m, (10, 10, 10, 10), mode="replicate"), kernel)
        want.append(F.interpolate(m, (48, 64), mode="bilinear", align_corners=False)[:, 0])
    got = GradientMap((48, 64), (2, 4), 21, 2.0).double()(x, y)
    # 1e-6: matrices are stored in float32, values are below 1.
    torch.testing.assert_close(got, (want[0] + want[1]) / 2, rtol=0, atol=1e-6)


def test_score_is_the_squared_excess_over_the_mean_training_map() -> None:
    method = tiny()
    train = images(5, 3, 32, 32)
    with torch.no_grad():
        mean = torch.stack([method.difference(one[None])[0] for one in train]).mean(0)
        method.finish([train[:2], train[2:]])
        torch.testing.assert_close(method.mean_map, mean, rtol=0, atol=1e-14)
        test = images(2, 3, 32, 32, seed=1)
        anomaly_map, raw_score = method(test)
        want = (method.difference(test) - mean) ** 2
    torch.testing.assert_close(anomaly_map, want, rtol=0, atol=1e-14)
    assert raw_score.tolist() == [anomaly_map[b].max().item() for b in range(2)]


def test_mean_training_map_travels_with_the_weights() -> None:
    method = Intra(TINY)
    method.finish([torch.rand(2, 3, 32, 32)])
    spec = from_json(ModelSpec, to_json(method.spec), "test")
    again = rebuild(spec, method.state_dict(), "test")
    assert method.mean_map.max() > 0
    assert torch.equal(again.get_buffer("mean_map"), method.mean_map)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image)[0], method.eval()(image)[0])


def test_another_number_of_windows_per_step_keeps_weights_and_result() -> None:
    method = tiny()
    image = images(2, 3, 32, 32)
    with torch.no_grad():
        want, keys = method(image)[0], method.state_dict().keys()
        method.set_windows_per_step(10)
        torch.testing.assert_close(method(image)[0], want, rtol=0, atol=1e-14)
    assert method.state_dict().keys() == keys
    assert (len(method.steps), method.spec.config["windows_per_step"]) == (7, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (32, 30)}, "size: expected multiples of 4 px and at least 12 px"),
        ({"size": (8, 32)}, "size: expected multiples of 4 px and at least 12 px"),
        ({"size": (32, 24)}, "quarter_turns: expected a square size"),
        ({"window": 1}, "window: expected at least 2 patches"),
        ({"width": 18}, "width: expected a multiple of 2 \\* heads = 4"),
        ({"pools": [3]}, "pools: expected divisors of the size"),
        ({"pools": []}, "pools: expected divisors of the size"),
        ({"blur_px": 20}, "blur_px, blur_sigma_px: expected an odd number"),
        ({"blur_sigma_px": 0.0}, "blur_px, blur_sigma_px: expected an odd number"),
        ({"gms_scales": 4}, "gms_scales: a patch of 4 px cannot be halved 3 times"),
        ({"windows_per_visit": 7}, "windows_per_visit: expected a divisor"),
        ({"windows_per_step": 0}, "windows_per_step: expected at least 1, got 0"),
        ({"position": "relative"}, "position"),
        ({"depth": 13}, "intra: depth"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refuses_settings_that_contradict(changes: dict[str, Any], message: str) -> None:
    tree = {name: getattr(TINY, name) for name in ("size", "patch_px", "window", "width", "heads")}
    with pytest.raises(InputError, match=message):
        build("intra", {**tree, "blocks": 1, **changes})


@pytest.mark.parametrize("weights", ["imagenet", "random", "none"])
def test_accepts_the_build_argument_of_methods_with_a_backbone(weights: str) -> None:
    assert build("intra", {"width": 16, "blocks": 1}, weights=weights).name == "intra"


def test_refuses_a_file_as_backbone() -> None:
    with pytest.raises(InputError, match=r"InTra has no backbone.*got 'resnet\.pth'"):
        Intra(TINY, weights="resnet.pth")


@pytest.mark.parametrize("shape", [(1, 3, 64, 16), (1, 1, 32, 32), (1, 3, 48, 48)])
def test_refuses_another_image_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[B, 3, 32, 32\]"):
        Intra(TINY)(torch.zeros(shape))


def test_refuses_to_finish_without_images() -> None:
    with pytest.raises(InputError, match="at least one training image"):
        Intra(TINY).finish([])


def test_refuses_unknown_optimiser_settings() -> None:
    with pytest.raises(InputError, match="unknown optimiser settings"):
        Intra(TINY).parameter_groups(1e-4, grid_lr=0.1)


@pytest.mark.parametrize(
    ("category", "side", "position"),
    [
        ("grid", 256, "local"),
        ("bottle", 256, "global"),
        ("screw", 320, "global"),
        ("carpet", 512, "local"),
        ("zipper", 512, "global"),
        ("pcb1", 256, "global"),
    ],
)
def test_published_size_and_position_of_a_category(category: str, side: int, position: str) -> None:
    config = published_config(category)
    assert (config.size, config.position) == ((side, side), position)


def test_recipe_is_600_windows_per_image_in_batches_of_256() -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    config = IntraConfig(**{**recipe["config"], "size": tuple(recipe["config"]["size"])})
    method = full_size(config)
    assert method.visits_per_epoch * config.windows_per_visit == 600
    assert recipe["train"]["batch"] * config.windows_per_visit == 256
    assert config == published_config("bottle")


@pytest.fixture(scope="module", params=POSITIONS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    method = Intra(replace(TINY, position=request.param)).eval()
    with torch.no_grad():
        method.position.normal_()
        method.covered_token.normal_()
    method.finish([images(2, 3, 32, 32).float()])
    program = torch.onnx.export(
        method,
        (torch.rand(2, 3, 32, 32),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("B")},),
        input_names=["image"],
        output_names=["anomaly_map", "raw_score"],
        verbose=False,
    )
    assert program is not None
    path = tmp_path_factory.mktemp("intra") / "intra.onnx"
    program.save(path)
    return method, path


def run_onnxruntime(path: Path, image: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": image}))


def run_openvino(path: Path, image: np.ndarray) -> list[np.ndarray]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", settings)
    result = model(image)
    return [result[0], result[1]]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("run", [run_onnxruntime, run_openvino])
def test_exported_graph_gives_the_same_map_and_score(exported: Any, run: Any, B: int) -> None:
    method, path = exported
    image = images(B, 3, 32, 32, seed=B).float()
    with torch.no_grad():
        want = [x.numpy() for x in method(image)]
    got = run(path, image.numpy())
    assert got[0].shape == (B, 32, 32)
    # Reconstructions agree to float32 rounding (1e-6); GMS and square keep it below that.
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert want[0].max() > 1e-4
