"""InTra, the Inpainting Transformer: every patch painted from its surroundings, then compared.

Paper: Pirnay and Chai, Inpainting Transformer for Anomaly Detection, arXiv 2104.13897, ICIAP 2022.
There is no authors' code and there are no authors' weights; nothing of other implementations is
used. One model per category, trained from scratch, no backbone.

Where the paper leaves a choice open, these are the defaults, all of them part of the saved
configuration or constants of this file and `intra_losses`:
1. Long skips: block i feeds the input of block n + 1 - i, for i up to (n - 1) / 2: the symmetric
   reading, in which no block receives its own input twice.
2. LayerNorm after the last block, before the mean: the convention of vision transformers.
3. Queries and keys: one MLP each per block, hidden layer shared by the heads, biases everywhere,
   logits scaled by the root of a head's query width: the reading in which D/2 is a layer's width.
4. Loss: 0.01 for GMS and SSIM, GMS at one scale (``gms_scales=3`` averages 16, 8 and 4 px), SSIM
   with repeated borders: a patch of 16 px holds few complete 11 px windows.
5. Map: GMS at full size, mean over colours, mean pooling by 2 and 4, Gaussian of 21 taps and sigma
   2 px at that size, bilinear back, mean of both: the equation taken literally. Reconstructions
   are not clipped to 0..1 before.
6. Mean training map: from the images that were trained on, without augmentation, by the same
   pipeline as at test time; another pipeline would subtract another quantity.
7. Validation: the same loss over the full reconstruction, whose windows are fixed; random windows
   would add noise to early stopping.
8. Positions: learned global table; ``published_config`` takes local ones for textures, which do
   not need the place in the image.
9. Augmentation: flips with probability 0.5 and quarter turns of the whole image. With global
   positions it destroys the alignment of aligned objects, so both can be switched off.
10. Start: framework defaults for layers, truncated normal 0.02 for positions and covered token.
11. Resize: the one bilinear rule of all methods; values in 0..1 without mean and std, which the
    constants of GMS and SSIM assume.

What is shared between windows is exact: patch projection, and norm, queries, keys and values of
the first block. From its softmax on every token depends on which patch is covered.

This file is longer than others because a window's layout, the network and its two ways through it
(random windows, shared inference windows) are only checkable next to each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastad.errors import InputError
from fastad.models.intra_losses import GradientMap, PatchLoss
from fastad.models.registry import Features, Method, register, widened
from fastad.spec import InputSpec

TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
SIZE_PX = {  # of MVTec-AD categories; all others use 256
    "capsule": 320,
    "screw": 320,
    **dict.fromkeys(("carpet", "leather", "tile", "wood", "pill", "zipper"), 512),
}
WEIGHTS = ("imagenet", "random", "none")  # accepted for symmetry with methods that have a backbone


@dataclass(frozen=True)
class IntraConfig:
    """Settings of InTra; the defaults are the published ones for most MVTec-AD objects.

    ``size`` is (H, W) in pixels, a multiple of ``patch_px``; ``window`` is a side in patches.
    ``windows_per_image`` random windows are drawn per training image and epoch,
    ``windows_per_visit`` each time the image is in a batch. ``windows_per_step`` windows of each
    image are painted together at inference: it bounds memory and does not change results.
    ``pools``, ``blur_px`` (taps) and ``blur_sigma_px`` (at the pooled size) define the map.
    """

    size: tuple[int, int] = (256, 256)
    patch_px: int = 16
    window: int = 7
    width: int = 512
    blocks: int = 13
    heads: int = 8
    mlp_ratio: int = 4
    position: Literal["global", "local"] = "global"
    long_skips: bool = True
    final_norm: bool = True
    gms_weight: float = 0.01
    ssim_weight: float = 0.01
    gms_scales: int = 1
    windows_per_image: int = 600
    windows_per_visit: int = 8
    flips: bool = True
    quarter_turns: bool = True
    windows_per_step: int = 256
    pools: tuple[int, ...] = (2, 4)
    blur_px: int = 21
    blur_sigma_px: float = 2.0


def published_config(category: str) -> IntraConfig:
    """Published settings for one MVTec-AD category: its image size, and positions by principle.

    Categories that the paper does not know get the settings of an object at 256 px.
    """
    side = SIZE_PX.get(category, 256)
    return IntraConfig((side, side), position="local" if category in TEXTURES else "global")


class FeatureAttention(nn.Module):
    """Multi-head self-attention whose queries and keys come from MLPs D -> 2D -> D/2.

    Neighbouring patches are so alike that linear queries and keys give almost equal weights.
    """

    def __init__(self, D: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D // 2))
        self.key = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D // 2))
        self.value = nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [..., D/2] and values [..., D] of normed tokens ``x`` [..., D]."""
        return self.query(x), self.key(x), self.value(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each window: q, k [W, N, D/2] and v [W, N, D] to [W, N, D]."""
        W, N = q.shape[:2]
        q, k, v = (x.reshape(W, N, self.heads, -1).transpose(1, 2) for x in (q, k, v))
        # [W, heads, N, N]
        logits = (widened(q) * q.shape[-1] ** -0.5) @ widened(k).transpose(-2, -1)
        mixed = logits.softmax(-1).to(v.dtype) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm transformer block in three parts.

    Queries, keys and values are arguments of a call that ends before the MLP starts, so that they
    are freed before its hidden layer, four times as wide, is made.
    """

    def __init__(self, D: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = FeatureAttention(D, heads)
        self.mlp = nn.Sequential(
            nn.Linear(D, mlp_ratio * D), nn.GELU(), nn.Linear(mlp_ratio * D, D)
        )

    def streams(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [..., D] with their queries, keys and values: each token by itself."""
        return z, *self.attention.project(self.norm1(z))

    def attend(self, z: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add attention within each window to tokens ``z`` [W, N, D]."""
        return z + self.attention.mix(q, k, v)

    def feed(self, z: Tensor) -> Tensor:
        """Add the MLP to tokens ``z`` [W, N, D]."""
        out: Tensor = z + self.mlp(self.norm2(z))
        return out

    def forward(self, z: Tensor) -> Tensor:
        """Windows of tokens [W, N, D] to the same shape."""
        return self.feed(self.attend(*self.streams(z)))


class Step(nn.Module):
    """Index map of the windows that are painted together; owns constant buffers only.

    Each distinct token of these windows is computed once and then copied to where it is seen.
    """

    patch: Tensor  # [T] int64, patch of every distinct uncovered token
    place: Tensor  # [T] int64, its row in the position table
    covered: Tensor  # [T_c] int64, row in the position table of every distinct covered token
    window: Tensor  # [w * L * L] int64, tokens of all windows, into T uncovered, then T_c covered

    def __init__(self, patches: np.ndarray, places: np.ndarray, is_covered: np.ndarray) -> None:
        super().__init__()
        key = np.stack([patches, places], -1)[~is_covered]
        tokens, uncovered = np.unique(key, axis=0, return_inverse=True)
        rows, covered = np.unique(places[is_covered], return_inverse=True)
        window = np.empty(patches.shape, np.int64)
        window[~is_covered] = uncovered.reshape(-1)
        window[is_covered] = len(tokens) + covered.reshape(-1)
        for name, values in {
            "patch": tokens[:, 0],
            "place": tokens[:, 1],
            "covered": rows,
            "window": window.reshape(-1),
        }.items():
            self.register_buffer(name, torch.from_numpy(values.copy()), persistent=False)

    def spread(self, uncovered: Tensor, covered: Tensor, tokens: int) -> Tensor:
        """Copy [B, T, E] and [T_c, E] into windows [B * w, tokens, E]."""
        constant = covered.expand(uncovered.shape[0], -1, -1)
        table = torch.cat([uncovered, constant], 1)
        return table.index_select(1, self.window).reshape(-1, tokens, table.shape[-1])


def window_corner(t: np.ndarray, n: int, window: int) -> np.ndarray:
    """First row of the window that paints patch row ``t`` of ``n``, as central as it can be."""
    first: np.ndarray = np.clip(t - window // 2, 0, n - window)
    return first


@register
class Intra(Method):
    """InTra. There is no backbone: ``features`` hands the image on.

    Memory of an inference step, per image of the batch: the tensors alive at once are about
    ``17 * 4 * width * window**2 * windows_per_step`` bytes in float32 (six kept for the skips, the
    stream and its norm, the MLP's hidden layer before and after GELU): 1.7 MB per window with
    published settings. Measured growth of a process, eager on a CPU: 0.08 GB for 16 windows, 0.2 to
    0.3 GB for 64, 0.6 GB for 256.
    An ONNX graph repeats the network once per step, its weights once.

    Args:
        config: Settings.
        weights: Ignored apart from the check; there is nothing to load.

    Raises:
        InputError: settings that contradict each other, or a file as ``weights``.
    """

    name = "intra"
    Config = IntraConfig
    map_rule = (
        "1 - gradient magnitude similarity of image and reconstruction, pooled and blurred at "
        "several scales, minus its mean over training images, squared"
    )
    score_rule = "maximum of the anomaly map"
    # Painted values meet the image's own gradients, of which half precision leaves 8 or 11 bits.
    float32_parts = ("head",)

    config: IntraConfig
    offset: Tensor
    order: Tensor
    mean_map: Tensor

    def __init__(self, config: IntraConfig, weights: str = "none") -> None:
        super().__init__()
        if weights not in WEIGHTS:
            raise InputError(
                f"weights: InTra has no backbone, expected one of {', '.join(WEIGHTS)}, "
                f"got {weights!r}; drop the argument"
            )
        _check(config)
        self.config = config
        self.input = InputSpec(config.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        H, W = config.size
        K, L, D = config.patch_px, config.window, config.width
        self.grid: tuple[int, int] = (H // K, W // K)
        N, M = self.grid

        self.embed = nn.Linear(3 * K * K, D)
        rows = N * M if config.position == "global" else L * L
        self.position = nn.Parameter(torch.empty(rows, D))
        self.covered_token = nn.Parameter(torch.empty(D))
        self.blocks = nn.ModuleList(
            Block(D, config.heads, config.mlp_ratio) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(D) if config.final_norm else nn.Identity()
        self.head = nn.Linear(D, 3 * K * K)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.covered_token, std=0.02)

        self.patch_loss = PatchLoss(K, config.gms_weight, config.ssim_weight, config.gms_scales)
        self.gradient_map = GradientMap(
            config.size, config.pools, config.blur_px, config.blur_sigma_px
        )
        offset = torch.from_numpy(_offsets(L, M))
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("mean_map", torch.zeros(H, W))
        self.set_windows_per_step(config.windows_per_step)

    def set_windows_per_step(self, windows: int) -> None:
        """Paint this many windows of an image together from now on; results stay the same.

        Call it before export to trade memory against the number of copies of the network.

        Raises:
            InputError: ``windows`` is not positive.
        """
        self.config = dataclasses.replace(self.config, windows_per_step=windows)
        _check(self.config)
        steps, order = _plan(self.grid, self.config)
        device = self.offset.device
        self.steps = nn.ModuleList(steps).to(device)
        self.register_buffer("order", order.to(device), persistent=False)

    @property
    def visits_per_epoch(self) -> int:
        """How often a training epoch goes through the images to draw all their windows."""
        return self.config.windows_per_image // self.config.windows_per_visit

    def features(self, image: Tensor) -> Features:
        """The image itself, float32 [B, 3, H, W] in 0..1.

        Raises:
            InputError: another size; positions of one size mean other places at another.
        """
        if tuple(image.shape[1:]) != (3, *self.config.size):
            raise InputError(
                f"image: expected [B, 3, {self.config.size[0]}, {self.config.size[1]}], got "
                f"{list(image.shape)}; resize it, or build InTra for that size"
            )
        return (image,)

    def patches(self, image: Tensor) -> Tensor:
        """Cut [B, 3, H, W] into [B, N * M, 3 * K * K], values in (channel, row, column) order."""
        (N, M), K = self.grid, self.config.patch_px
        x = image.reshape(-1, 3, N, K, M, K).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(-1, N * M, 3 * K * K)

    def stitch(self, patches: Tensor) -> Tensor:
        """The inverse of `patches`."""
        (N, M), K = self.grid, self.config.patch_px
        x = patches.reshape(-1, N, M, 3, K, K).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, 3, N * K, M * K)

    def tokens(self, patches: Tensor, corner: Tensor, place: Tensor) -> Tensor:
        """Windows of tokens, one patch of each covered, nothing shared but the projection.

        Args:
            patches: [B, N * M, 3 * K * K].
            corner: int64 [B, w], patch index of each window's first patch.
            place: int64 [B, w], which of the window's L * L patches is covered.

        Returns:
            [B * w, L * L, D].
        """
        index = corner[..., None] + self.offset  # [B, w, L * L]
        image = torch.arange(len(patches), device=patches.device)[:, None, None]
        seen = self.embed(patches)[image, index]
        is_covered = torch.arange(len(self.offset), device=place.device) == place[..., None]
        row = self.position[index] if self.config.position == "global" else self.position
        return (torch.where(is_covered[..., None], self.covered_token, seen) + row).flatten(0, 1)

    def paint(self, tokens: Tensor) -> Tensor:
        """Values [W, 3 * K * K] of the covered patch of each window of tokens [W, L * L, D]."""
        return self._paint_on(self.blocks[0](tokens))

    def _paint_on(self, z: Tensor) -> Tensor:
        """`paint` from the output of the first block on."""
        n = len(self.blocks)
        skips = (n - 1) // 2 if self.config.long_skips else 0
        kept = [z] if skips else []
        for i in range(1, n):
            if i >= n - skips:
                z = z + kept.pop()
            z = self.blocks[i](z)
            if i < skips:
                kept.append(z)
        # The head is linear: after the mean it costs L * L times less and gives the same.
        out: Tensor = self.head(self.norm(z).mean(1))
        return out

    def shared_first_block(self, e: Tensor, step: Step) -> Tensor:
        """Output of the first block for a step's windows, [B * w, L * L, D].

        Args:
            e: Projected patches [B, N * M, D].
            step: The windows; each distinct token is normed and projected once.
        """
        first = self.blocks[0]
        assert isinstance(first, Block)
        seen = first.streams(e.index_select(1, step.patch) + self.position[step.place])
        # Covered tokens do not depend on the image: runtimes fold this line into constants.
        covered = first.streams(self.covered_token + self.position[step.covered])
        return first.feed(
            first.attend(
                *(step.spread(a, b, len(self.offset)) for a, b in zip(seen, covered, strict=True))
            )
        )

    def paint_all(self, patches: Tensor) -> Tensor:
        """Every patch painted from its surroundings, [B, N * M, 3 * K * K] in and out."""
        e = self.embed(patches)
        painted = []
        for step in self.steps:
            assert isinstance(step, Step)
            y = self._paint_on(self.shared_first_block(e, step))
            painted.append(y.reshape(-1, len(step.window) // len(self.offset), y.shape[-1]))
        return torch.cat(painted, 1).index_select(1, self.order)

    def reconstruct(self, image: Tensor) -> Tensor:
        """The normal image for float32 [B, 3, H, W], same shape, about 0..1 and not clipped."""
        return self.stitch(self.paint_all(self.patches(image)))

    def augment(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Flip and turn each image of [B, 3, H, W] at random, as the settings allow.

        Args:
            image: float32 [B, 3, H, W]; never changed in place.
            generator: On the CPU; None takes the global one. Draws are equal on every device.
        """
        flips = torch.rand(len(image), 2, generator=generator) < 0.5
        turns = torch.randint(4, (len(image),), generator=generator)
        out = []
        for one, flip, turn in zip(image, flips.tolist(), turns.tolist(), strict=True):
            if self.config.flips:
                one = one.flip([axis for axis, chosen in zip((1, 2), flip, strict=True) if chosen])
            out.append(one.rot90(turn, (1, 2)) if self.config.quarter_turns else one)
        return torch.stack(out)

    def draw_windows(
        self, B: int, windows: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Random corners (as patch index) and covered places, int64 [B, windows] each, uniform."""
        (N, M), L = self.grid, self.config.window
        r = torch.randint(N - L + 1, (B, windows), generator=generator)
        s = torch.randint(M - L + 1, (B, windows), generator=generator)
        return r * M + s, torch.randint(L * L, (B, windows), generator=generator)

    def loss(self, features: Features) -> Tensor:
        """Painting loss, a scalar; one visit of ``windows_per_visit`` random windows per image.

        In train mode images are augmented first. In eval mode all inference windows of the images
        as they are count, so that validation has no noise.
        """
        (image,) = features
        K = self.config.patch_px
        if self.training:
            patches = self.patches(self.augment(image))
            corner, place = (
                x.to(image.device)
                for x in self.draw_windows(len(image), self.config.windows_per_visit)
            )
            y = self.paint(self.tokens(patches, corner, place))
            which = corner + self.offset[place]  # [B, w]
            truth = patches.gather(1, which[..., None].expand(-1, -1, patches.shape[-1]))
        else:
            truth = self.patches(image)
            y = self.paint_all(truth)
        loss: Tensor = self.patch_loss(y.reshape(-1, 3, K, K), truth.reshape(-1, 3, K, K))
        return loss

    def difference(self, image: Tensor) -> Tensor:
        """Filtered ``1 - GMS`` between image and reconstruction, float32 [B, H, W] in 0..1."""
        difference: Tensor = self.gradient_map(image, self.reconstruct(image))
        return difference

    def score(self, features: Features) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, H, W] >= 0 at image size and raw score [B], float32.

        Until `finish` has set the mean training map, that map is zero.
        """
        anomaly_map = (self.difference(features[0]) - self.mean_map).square()
        return anomaly_map, anomaly_map.amax((1, 2))

    @torch.no_grad()
    def finish(self, batches: Iterable[Tensor]) -> None:
        """Set the mean training map, a part of the weights, after the last training step.

        Args:
            batches: Images that were trained on, float32 [B, 3, H, W] in 0..1, not augmented.

        Raises:
            InputError: there is no image, or one of another size.
        """
        total = torch.zeros_like(self.mean_map, dtype=torch.float64)
        count = 0
        for batch in batches:
            (image,) = self.features(batch.to(self.mean_map.device))
            total += self.difference(image).double().sum(0)
            count += len(image)
        if not count:
            raise InputError("batches: expected at least one training image, got none")
        self.mean_map.copy_(total / count)

    def parameter_groups(self, lr: float, **unknown: float) -> list[dict[str, Any]]:
        """One group: everything trains at ``lr``."""
        if unknown:
            raise InputError(f"intra: unknown optimiser settings {sorted(unknown)}, known: none")
        return [{"params": list(self.parameters()), "lr": lr}]


def _check(config: IntraConfig) -> None:
    for name in ("patch_px", "width", "blocks", "heads", "mlp_ratio", "gms_scales", "blur_px",
                 "windows_per_image", "windows_per_visit", "windows_per_step"):  # fmt: skip
        if getattr(config, name) < 1:
            raise InputError(f"{name}: expected at least 1, got {getattr(config, name)}")
    size, K, L = config.size, config.patch_px, config.window
    for wrong, message in (
        (L < 2, f"window: expected at least 2 patches to paint from others, got {L}"),
        (
            any(n % K or n < L * K for n in size),
            f"size: expected multiples of {K} px and at least {L * K} px, got {size}; images are "
            "resized to it, never cropped",
        ),
        (
            config.width % (2 * config.heads) != 0,
            f"width: expected a multiple of 2 * heads = {2 * config.heads}, got {config.width}",
        ),
        (
            not config.pools or any(p < 1 or n % p for p in config.pools for n in size),
            f"pools: expected divisors of the size {size}, got {list(config.pools)}",
        ),
        (
            config.blur_px % 2 == 0 or config.blur_sigma_px <= 0,
            "blur_px, blur_sigma_px: expected an odd number of taps and a positive sigma, got "
            f"{config.blur_px} and {config.blur_sigma_px}",
        ),
        (
            K >> (config.gms_scales - 1) < 1,
            f"gms_scales: a patch of {K} px cannot be halved {config.gms_scales - 1} times",
        ),
        (
            config.windows_per_image % config.windows_per_visit != 0,
            "windows_per_visit: expected a divisor of windows_per_image = "
            f"{config.windows_per_image}, got {config.windows_per_visit}",
        ),
        (
            config.quarter_turns and size[0] != size[1],
            f"quarter_turns: expected a square size, got {size}; set quarter_turns to false",
        ),
    ):
        if wrong:
            raise InputError(message)


def _offsets(L: int, M: int) -> np.ndarray:
    """Patch index of each of a window's L * L patches, relative to its corner; int64."""
    return (np.arange(L, dtype=np.int64)[:, None] * M + np.arange(L)).reshape(-1)


def _plan(grid: tuple[int, int], config: IntraConfig) -> tuple[list[Step], Tensor]:
    """Steps over all inference windows, and where each patch is found in their outputs."""
    (N, M), L = grid, config.window
    covered = np.arange(N * M, dtype=np.int64)
    t, u = np.divmod(covered, M)
    corner = window_corner(t, N, L) * M + window_corner(u, M, L)
    # Windows with one corner share all tokens but two, even with local positions.
    sequence = np.lexsort((covered, corner))
    patches = corner[:, None] + _offsets(L, M)  # [windows, L * L]
    places = (
        patches if config.position == "global" else np.broadcast_to(np.arange(L * L), patches.shape)
    )
    is_covered = patches == covered[:, None]
    steps = [
        Step(patches[part], places[part], is_covered[part])
        for part in np.split(
            sequence, range(config.windows_per_step, len(sequence), config.windows_per_step)
        )
    ]
    return steps, torch.from_numpy(np.argsort(sequence))
