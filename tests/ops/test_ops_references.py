from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastad.errors import InputError, UnsupportedError
from fastad.ops.anomaly_map import anomaly_map, bilinear_matrix, distance_map
from fastad.ops.anomaly_map import op as map_op
from fastad.ops.check import require
from fastad.ops.grid_interpolate import grid_interpolate
from fastad.ops.grid_interpolate import op as grid_op
from fastad.ops.neighbor_attention import neighbor_attention, neighbor_mask
from fastad.ops.neighbor_attention import op as attention_op
from fastad.ops.neighbor_attention import reference as attention_reference
from fastad.ops.postprocess import op as postprocess_op
from fastad.ops.postprocess import postprocess
from fastad.ops.preprocess import op as preprocess_op
from fastad.ops.preprocess import preprocess

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=dtype)


def attention_by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    q_position: torch.Tensor | None = None,
    k_position: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query at a time, over the keys that are left."""
    q = q if q_position is None else q + q_position.expand_as(q)
    k = k if k_position is None else k + k_position.expand_as(k)
    out = torch.zeros_like(q)
    for i in range(grid[0] * grid[1]):
        y, x = divmod(i, grid[1])
        seen = [
            j
            for j in range(grid[0] * grid[1])
            for u, w in [divmod(j, grid[1])]
            if min(window) == 0 or abs(u - y) > window[0] // 2 or abs(w - x) > window[1] // 2
        ]
        if seen:
            scores = (k[:, :, seen] * q[:, :, i : i + 1]).sum(-1) / q.shape[-1] ** 0.5
            out[:, :, i] = (scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2)
    return out


GRIDS = [((4, 5), (3, 3)), ((5, 4), (1, 5)), ((3, 3), (3, 3)), ((2, 2), (5, 5)), ((3, 4), (0, 0))]


@pytest.mark.parametrize("registered", [False, True], ids=["reference", "registered"])
@pytest.mark.parametrize(("grid", "window"), GRIDS, ids=str)
def test_attention_is_a_softmax_over_the_keys_left(
    grid: tuple[int, int], window: tuple[int, int], registered: bool
) -> None:
    q, k, v = (rand(2, 3, grid[0] * grid[1], 4) for _ in range(3))
    if registered:
        out = torch.ops.fastad.neighbor_attention(q, k, v, grid, window)
    else:
        out = attention_reference.neighbor_attention(q, k, v, grid, window)
    torch.testing.assert_close(out, attention_by_hand(q, k, v, grid, window))


@pytest.mark.parametrize("registered", [False, True], ids=["reference", "registered"])
@pytest.mark.parametrize("names", ["q", "k", "qk"])
def test_attention_adds_positions_to_queries_and_keys_only(names: str, registered: bool) -> None:
    grid, window = (4, 5), (3, 1)
    q, k, v = (rand(2, 3, 20, 4) for _ in range(3))
    positions = {f"{name}_position": rand(3, 20, 4) for name in names}
    before = [t.clone() for t in (q, k)]
    with torch.set_grad_enabled(not registered):
        q.requires_grad_(not registered)
        out = neighbor_attention(q, k, v, grid=grid, window=window, **positions).detach()
    torch.testing.assert_close(out, attention_by_hand(q, k, v, grid, window, **positions).detach())
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_positions_get_gradients() -> None:
    q, k, v = (rand(2, 2, 6, 3) for _ in range(3))
    positions = tuple(rand(2, 6, 3).requires_grad_() for _ in range(2))

    def read(q_position: torch.Tensor, k_position: torch.Tensor) -> torch.Tensor:
        return neighbor_attention(
            q, k, v, grid=(2, 3), window=(1, 1), q_position=q_position, k_position=k_position
        )

    assert torch.autograd.gradcheck(read, positions)


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient() -> None:
    q, k, v = (rand(1, 1, 9, 4).requires_grad_() for _ in range(3))
    neighbor_attention(q, k, v, grid=(3, 3), window=(3, 3)).sum().backward()
    assert q.grad is not None and k.grad is not None
    assert q.grad[0, 0, 4].eq(0).all() and q.grad.isfinite().all() and k.grad.isfinite().all()


def test_mask_counts_are_those_of_uniad() -> None:
    mask = neighbor_mask((14, 14), (7, 7))
    assert mask.sum() == 7396
    visible = (~mask).sum(1)
    assert (visible.min(), visible.max()) == (147, 180)


def test_merging_the_heads_copies_nothing() -> None:
    q = rand(2, 4, 6, 8)
    out = neighbor_attention(q, q, q, grid=(2, 3), window=(1, 1))
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr()


ATTENTION_REFUSALS = [
    ({"q": rand(2, 6, 8)}, r"q: expected \[B, heads, N, D\]"),
    ({"q": torch.zeros(1, 1, 6, 4, dtype=torch.int32)}, "q: expected a floating dtype"),
    ({"k": rand(1, 1, 6, 4, dtype=torch.float32)}, "k: expected dtype torch.float64"),
    ({"v": rand(1, 1, 6, 5)}, "v: expected shape"),
    ({"grid": (2, 4)}, r"grid: expected \(H, W\) with H \* W = 6 tokens, got \(2, 4\)"),
    ({"window": (2, 3)}, "window: expected two odd sizes"),
    ({"window": (-1, 3)}, "window: expected two odd sizes"),
    ({"q_position": rand(1, 1, 6, 4)}, r"q_position: expected \[heads, N, D\], got 4 dimensions"),
    ({"q_position": rand(1, 5, 4)}, r"q_position: expected \[1, 6, 4\], .* got \[1, 5, 4\]"),
    ({"k_position": rand(2, 6, 4)}, r"k_position: expected \[1, 6, 4\], .* got \[2, 6, 4\]"),
    (
        {"k_position": rand(1, 6, 4, dtype=torch.float32)},
        "k_position: expected dtype torch.float64, got torch.float32",
    ),
    (
        {"q_position": torch.zeros(1, 6, 4, dtype=torch.float64, device="meta")},
        "q_position: expected device cpu, got meta",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), ATTENTION_REFUSALS, ids=[m for _, m in ATTENTION_REFUSALS]
)
def test_attention_refuses(change: dict[str, Any], message: str) -> None:
    t = rand(1, 1, 6, 4)
    arguments = {"q": t, "k": t, "v": t, "grid": (2, 3), "window": (1, 1)} | change
    with pytest.raises(InputError, match=message):
        neighbor_attention(**arguments)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (
            rand(1, 1, 6, 4, dtype=torch.float64),
            "takes float16, bfloat16, float32, got torch.float64",
        ),
        (torch.zeros(1, 1, 6, 160), "takes D up to 128, got 160"),
        (torch.zeros(1, 1, 4, 6).transpose(2, 3), "expected stride 1 along D"),
    ],
    ids=["float64", "wide head", "strided"],
)
def test_attention_kernel_says_why_not(q: torch.Tensor, message: str) -> None:
    reason = attention_op.why_unsupported(q, q, q)
    assert reason is not None and message in reason


POSITION_REASONS = [
    (
        {"q_position": torch.zeros(1, 4, 6).transpose(1, 2)},
        "q_position: expected stride 1 along D",
    ),
    (
        {"k_position": torch.zeros(4).as_strided((1, 1, 4), (0, 2**31, 1))},
        "k_position: strides .* exceed",
    ),
]


@pytest.mark.parametrize(("change", "message"), POSITION_REASONS, ids=["strided", "too far"])
def test_attention_kernel_says_why_not_these_positions(
    change: dict[str, torch.Tensor], message: str
) -> None:
    q = torch.zeros(1, 1, 6, 4)
    assert attention_op.why_unsupported(q, q, q, q[0], q[0]) is None
    with pytest.raises(UnsupportedError, match=message):
        require(attention_op.why_unsupported(q, q, q, **change))


@pytest.mark.parametrize("registered", [False, True], ids=["reference", "registered"])
@pytest.mark.parametrize("nodes", [(5, 4), (3, 4, 5), (2, 2)], ids=str)
def test_interpolation_equals_grid_sample(nodes: tuple[int, ...], registered: bool) -> None:
    D = len(nodes)
    table, coords = rand(*nodes, 7), rand(2, 40, D)
    axes = (D, *range(D))
    shape = (1, *[1] * (D - 1), -1, D)
    sampled = F.grid_sample(table.permute(axes)[None], coords.reshape(shape), align_corners=False)
    expected = sampled.reshape(7, -1).T.reshape(2, 40, 7)
    out = grid_interpolate(table.requires_grad_(not registered), coords)
    torch.testing.assert_close(out.detach(), expected)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_interpolation_writes_both_halves_of_a_buffer(grad: bool) -> None:
    C, H, W = 6, 3, 4
    local, whole = rand(3, 2, C), rand(2, 2, C * H * W)
    v_local, v_whole = rand(2, H, W, 2), rand(2, 2)
    both = torch.empty(2, 2 * C, H, W, dtype=torch.float64)
    local.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        grid_interpolate(whole, v_whole, out=both[:, :C].flatten(1))
        grid_interpolate(local, v_local, out=both[:, C:].permute(0, 2, 3, 1))
    expected = torch.cat(
        [
            grid_interpolate(whole, v_whole).reshape(2, C, H, W),
            grid_interpolate(local, v_local).permute(0, 3, 1, 2),
        ],
        1,
    )
    torch.testing.assert_close(both.detach(), expected.detach())


def test_each_image_reads_its_own_table() -> None:
    tables, coords = rand(3, 4, 5, 2), rand(3, 6, 2)
    together = grid_interpolate(tables, coords, per_image=True)
    apart = torch.stack([grid_interpolate(t, c) for t, c in zip(tables, coords, strict=True)])
    torch.testing.assert_close(together, apart)


def test_interpolation_fades_to_zero_outside() -> None:
    table = torch.ones(2, 2, 1)
    coords = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.5, 0.0], [9.0, 0.0]])
    torch.testing.assert_close(
        grid_interpolate(table, coords).flatten(), torch.tensor([1.0, 0.5, 0.0, 0.0])
    )


INTERPOLATION_REFUSALS = [
    ({"coords": rand(5, 3)}, r"coords: expected \[..., 2\] for a table"),
    ({"coords": rand(5, 2, dtype=torch.float32)}, "coords: expected dtype"),
    ({"per_image": True}, r"coords: expected \[B, ..., 1\]"),
    ({"out": rand(5, 7)}, r"out: expected \[5, 6\], got \[5, 7\]"),
]


@pytest.mark.parametrize(
    ("change", "message"), INTERPOLATION_REFUSALS, ids=[m for _, m in INTERPOLATION_REFUSALS]
)
def test_interpolation_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"table": rand(3, 4, 6), "coords": rand(5, 2)} | change
    with pytest.raises(InputError, match=message):
        grid_interpolate(**arguments)


def test_interpolation_kernel_says_why_not() -> None:
    table, coords = torch.zeros(3, 4, 6), torch.zeros(2, 5, 5, 2)
    out = torch.zeros(2, 12, 5, 5)[:, 6:].permute(0, 2, 3, 1)
    assert grid_op.why_unsupported(table, coords, out) is None
    apart = torch.zeros(2, 5, 7, 6)[:, :, :5]
    reason = grid_op.why_unsupported(table, coords, apart)
    assert reason is not None and "out: axes after the first must fold into one" in reason


MANY = 65536
LAUNCHES = {
    "grid_interpolate": lambda: grid_op.why_unsupported(
        torch.zeros(3, 4, 6), torch.empty(1, 1, 2).expand(MANY, 1, 2)
    ),
    "table per image": lambda: grid_op.why_unsupported(
        torch.zeros(MANY, 1, 1), torch.zeros(MANY, 1)
    ),
    "anomaly_map": lambda: map_op.why_unsupported(
        [torch.zeros(MANY, 1, 1, 1)], [torch.zeros(MANY, 1, 1, 1)]
    ),
    "preprocess": lambda: preprocess_op.why_unsupported(
        torch.zeros(MANY, 1, 1, 3, dtype=torch.uint8), [1, 1], torch.uint8
    ),
    "rows of preprocess": lambda: preprocess_op.why_unsupported(
        torch.zeros(1, 1, 1, 3, dtype=torch.uint8), [MANY, 1], torch.uint8
    ),
    "postprocess": lambda: postprocess_op.why_unsupported(torch.zeros(MANY, 1, 1), [1, 1]),
    "rows of postprocess": lambda: postprocess_op.why_unsupported(torch.zeros(1, 1, 1), [MANY, 1]),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_kernels_say_what_exceeds_a_launch(case: str) -> None:
    reason = LAUNCHES[case]()
    what = "rows" if "rows" in case else "images"
    assert reason is not None and f"takes up to 65535 {what}, got 65536" in reason


def test_one_axis_of_points_is_no_axis_of_images() -> None:
    assert grid_op.why_unsupported(torch.zeros(3, 6), torch.zeros(MANY, 1)) is None


def test_map_and_score_equal_resize_and_pooling() -> None:
    f, g = rand(2, 5, 4, 6).float(), rand(2, 5, 4, 6).float()
    to_h = torch.from_numpy(bilinear_matrix(9, 4, align_corners=True)).float()
    to_w = torch.from_numpy(bilinear_matrix(11, 6, align_corners=True)).float()
    made, score = anomaly_map("l2", f, g, to_h, to_w)
    d = (f - g).norm(dim=1)
    expected = F.interpolate(d[:, None], (9, 11), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(score, expected.amax((1, 2)))


@pytest.mark.parametrize("distance", ["cosine", "refined"])
def test_distances_use_the_cosine_of_torch(distance: Any) -> None:
    f, g = rand(2, 5, 4, 6), rand(2, 5, 4, 6)
    f[0, :, 0, 0] = 0.0  # no direction: cosine 0
    cosine = F.cosine_similarity(f, g, dim=1, eps=1e-8)
    e2 = (f - g).square().sum(1)
    S = 0.4 * (e2 / 5 <= 2.0) + 0.6 * cosine
    expected = 1 - cosine if distance == "cosine" else (1 - S).abs() * e2.sqrt()
    torch.testing.assert_close(distance_map(distance, f, g, (2.0, 0.4, 0.6)), expected)


def test_levels_are_summed() -> None:
    fine, coarse = rand(1, 5, 4, 4).float(), rand(1, 8, 2, 2).float()
    one, two = torch.eye(4), torch.from_numpy(bilinear_matrix(4, 2, align_corners=False)).float()
    to = torch.cat([one, two], 1)
    made, _ = anomaly_map("cosine", [fine, coarse], [fine + 1, coarse - 2], to, to)
    expected = distance_map("cosine", fine, fine + 1)
    expected = expected + two @ distance_map("cosine", coarse, coarse - 2) @ two.T
    torch.testing.assert_close(made, expected)


MAP_REFUSALS = [
    ({"distance": "l1"}, "distance: expected one of"),
    ({"feat_hat": []}, "feat_hat: expected 1 levels, got 0"),
    ({"map_h": torch.zeros(9, 5)}, "map_h: expected 4 columns"),
    ({"map_w": torch.zeros(9, 6, dtype=torch.float64)}, "map_w: expected float32"),
    ({"feat_hat": torch.zeros(2, 5, 4, 5)}, r"feat_hat\[0\]: expected shape"),
]


@pytest.mark.parametrize(("change", "message"), MAP_REFUSALS, ids=[m for _, m in MAP_REFUSALS])
def test_anomaly_map_refuses(change: dict[str, Any], message: str) -> None:
    f = torch.zeros(2, 5, 4, 6)
    arguments: dict[str, Any] = {"distance": "l2", "feat": f, "feat_hat": f}
    arguments |= {"map_h": torch.zeros(9, 4), "map_w": torch.zeros(9, 6)}
    with pytest.raises(InputError, match=message):
        anomaly_map(**(arguments | change))


@pytest.mark.parametrize("size", [(8, 9), (60, 20), (7, 90), (40, 31), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(40, 31), (224, 3), (5, 200)], ids=str)
def test_reference_resize_equals_pillow(shape: tuple[int, int], size: tuple[int, int]) -> None:
    random = np.random.default_rng(shape[0] * 100 + size[0])
    image = random.integers(-100, 355, (*shape, 3)).clip(0, 255).astype(np.uint8)
    # Two calls: from version 13 on, Pillow picks the order of its passes; ours is columns first.
    columns = Image.fromarray(image).resize((size[1], shape[0]), Image.Resampling.BILINEAR)
    expected = columns.resize(size[::-1], Image.Resampling.BILINEAR)
    resized = preprocess(torch.from_numpy(image)[None], size)[0].numpy()
    np.testing.assert_array_equal(resized, np.asarray(expected))


def test_normalisation_swaps_and_moves_the_channels() -> None:
    image = torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)
    out = preprocess(image, (1, 1), mean=(0.5, 0, 0), std=(0.5, 1, 1), swap_red_blue=True)
    torch.testing.assert_close(out, torch.tensor([-0.6, 0.0, 1.0]).reshape(1, 3, 1, 1))


PREPROCESS_REFUSALS = [
    ({"images": torch.zeros(1, 4, 4, 3)}, r"images: expected uint8 \[B, H, W, 3\]"),
    ({"images": torch.zeros(4, 4, 3, dtype=torch.uint8)}, "images: expected"),
    ({"size": (0, 4)}, r"size: expected \(H, W\)"),
    ({"mean": (0.0, 0.0, 0.0)}, "std: expected mean and std together"),
    ({"mean": (0.0, 0.0, 0.0), "std": (1.0, 0.0, 1.0)}, "std: expected three positive"),
]


@pytest.mark.parametrize(
    ("change", "message"), PREPROCESS_REFUSALS, ids=[m for _, m in PREPROCESS_REFUSALS]
)
def test_preprocess_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"images": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "size": (2, 2)} | change
    with pytest.raises(InputError, match=message):
        preprocess(**arguments)


def test_the_threshold_itself_is_normal() -> None:
    values = torch.tensor([[[0.1, 0.5, 0.6]]])
    _, mask = postprocess(values, (1, 3), float(values[0, 0, 0]))
    assert mask is not None and mask.tolist() == [[[False, True, True]]]
    # 0.1 as float32 is above 0.1 as a real number.
    _, mask = postprocess(values, (1, 3), 0.1)
    assert mask is not None and mask.tolist() == [[[True, True, True]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly_map": torch.zeros(3, 4)}, "anomaly_map: expected"),
        ({"anomaly_map": torch.zeros(1, 3, 4).half()}, "anomaly_map: expected float32"),
        ({"size": (3,)}, "size: expected"),
        ({"threshold": float("nan")}, "threshold: expected a finite"),
    ],
    ids=["rank", "dtype", "size", "threshold"],
)
def test_postprocess_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        postprocess(**({"anomaly_map": torch.zeros(1, 3, 4), "size": (3, 4)} | change))
