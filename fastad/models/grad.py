"""GRAD and its later form CRAD: features rebuilt from two small continuous grids.

Paper: Lee and Choi, Grid-Based Continuous Normal Representation for Anomaly Detection, arXiv
2402.18293v1, 2024; in later versions and at ECCV 2024: Continuous Memory Representation for
Anomaly Detection. Authors' code: repository tae-mo/CRAD, no licence: nothing of it is used here.
Backbone weights: EfficientNet-B4 ImageNet weights (Apache-2.0) through timm.

Differences from the authors' code:
1. The distance is computed as ``|1 - S| * |f - x|`` instead of through the refined output: the
   same number, one tensor less (golden map agrees to float32 rounding).
2. Up-sampling and both mean poolings of the evaluation are folded into two matrices per axis
   (float64 products, 2e-15 from the three steps); the anomaly map is the 21 x 21 mean already.
3. `mse <= k` replaces rounding of ``0.05 * mse``: the same decision, ties included.
4. Coordinates have D dimensions; the published networks use 2.
5. Other backbones: ``feature_scale`` brings features to the scale that ``mse_threshold`` is tied
   to; ``"auto"`` sets it once from training features. The published configuration keeps 1.
6. Training keeps the last epoch; the authors keep the best one on the test set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastad.errors import InputError
from fastad.models.backbone import RGB, Backbone, BackboneConfig
from fastad.models.registry import Features, Method, register, widened
from fastad.ops.anomaly_map import bilinear_matrix, mean_pool_matrix
from fastad.ops.grid_interpolate import grid_interpolate
from fastad.spec import InputSpec

SMOOTH_PX = 21  # mean over the map before both metrics
POOL_PX = 32  # mean whose maximum is the image score
AUTO_MEAN_SQUARE = 20.0  # of scaled features: reconstructions explaining half of it pass k = 10
PUBLISHED_BACKBONE = BackboneConfig("tf_efficientnet_b4.aa_in1k", (2, 3), same_padding_size=380)
FUSION_BLOCKS = {"grad": 7, "crad": 11, "crad-s": 11}


@dataclass(frozen=True)
class GradConfig:
    """Settings of GRAD; the defaults are the published ones for MVTec-AD.

    ``size`` is (H, W) in pixels; ``mean`` and ``std`` default to the backbone's own. ``blocks``
    defaults to the variant's count. ``mse_threshold`` is the paper's k, in squared feature units.
    """

    backbone: BackboneConfig = PUBLISHED_BACKBONE
    size: tuple[int, int] = (224, 224)
    mean: RGB | None = None
    std: RGB | None = None
    fusion: Literal["grad", "crad", "crad-s"] = "grad"
    blocks: int | None = None
    local_dims: int = 2
    global_dims: int = 2
    local_nodes: int = 8
    global_nodes: int = 4
    feature_scale: float | Literal["auto"] = 1.0
    mse_threshold: float = 10.0
    mse_weight: float = 0.3
    cosine_weight: float = 0.7
    jitter_sigma: float = 0.05
    jitter_probability: float = 0.5


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, [B, 2C, H, W] in and out (GRAD)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, h: Tensor) -> Tensor:
        """One residual step."""
        t = F.relu(self.bn1(self.conv1(h)))
        return F.relu(self.bn2(self.conv2(t)) + h)


class SqueezeExcite(nn.Module):
    """Channel gates from the spatial mean, without biases (CRAD)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(width, width // 4, bias=False)
        self.expand = nn.Linear(width // 4, width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        """Scale ``t`` [B, E, H, W] per channel."""
        gate: Tensor = F.hardsigmoid(self.expand(F.relu(self.reduce(t.mean((2, 3))))))
        return t * gate[:, :, None, None]


class InvertedBottleneck(nn.Module):
    """1 x 1, depthwise 3 x 3, gates, 1 x 1 around a shortcut (CRAD; CRAD-S contracts)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.gate = SqueezeExcite(inner)
        self.project = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, h: Tensor) -> Tensor:
        """One residual step; the sum stays signed."""
        t = F.hardswish(self.bn1(self.expand(h)))
        t = F.hardswish(self.gate(self.bn2(self.depthwise(t))))
        step: Tensor = self.bn3(self.project(t))
        return h + step


@register
class Grad(Method):
    """GRAD, CRAD and CRAD-S, told apart by ``config.fusion``.

    Args:
        config: Settings; unset ones are filled in from the backbone.
        weights: Of the backbone: ``"imagenet"``, a path, ``"random"`` or ``"none"``.

    Raises:
        InputError: settings that contradict each other, or weights that do not fit.
    """

    name = "grad"
    Config = GradConfig
    map_h: Tensor
    map_w: Tensor
    pooled_h: Tensor
    pooled_w: Tensor
    map_rule = (
        "L2 distance between features and their refined reconstruction, bilinear to image size, "
        "21 x 21 mean"
    )
    score_rule = "maximum of the 32 x 32 mean of the anomaly map"
    score_window = (POOL_PX, POOL_PX)
    # 8 bits of bfloat16 would place a coordinate to 1/32 of a node.
    float32_parts = ("local_coord", "global_coord")

    def __init__(self, config: GradConfig, weights: str = "imagenet") -> None:
        super().__init__()
        _check(config)
        self.backbone = Backbone(config.backbone, config.size, weights)
        self.config: GradConfig = dataclasses.replace(
            config,
            mean=config.mean or self.backbone.mean,
            std=config.std or self.backbone.std,
            blocks=config.blocks or FUSION_BLOCKS[config.fusion],
        )
        assert self.config.mean and self.config.std and self.config.blocks
        self.input = InputSpec(config.size, self.config.mean, self.config.std)
        self.C = C = sum(self.backbone.channels)
        with torch.no_grad():
            first = self.backbone(torch.zeros(1, 3, *config.size))[0]
        self.grid: tuple[int, int] = (first.shape[2], first.shape[3])
        H, W = self.grid

        self.local_coord = nn.Sequential(
            nn.Linear(C, C), nn.Tanh(), nn.Linear(C, config.local_dims), nn.Tanh()
        )
        self.global_coord = nn.Sequential(
            nn.Linear(C, C), nn.Tanh(), nn.Linear(C, config.global_dims), nn.Tanh()
        )
        self.local_table = nn.Parameter(torch.empty(*[config.local_nodes] * config.local_dims, C))
        # One node is a whole feature map, channel-major so that reading it gives [B, C, H, W].
        self.global_table = nn.Parameter(
            torch.empty(*[config.global_nodes] * config.global_dims, C * H * W)
        )
        self.fusion = nn.Sequential(
            *(
                BasicBlock(2 * C)
                if config.fusion == "grad"
                else InvertedBottleneck(2 * C, 4 * C if config.fusion == "crad" else C)
                for _ in range(self.config.blocks)
            )
        )
        self.recover = nn.Conv2d(2 * C, C, 1, bias=False)
        for axis, n_out, n_in in zip("hw", config.size, self.grid, strict=True):
            to_map, to_pooled = _map_head(n_out, n_in)
            self.register_buffer(f"map_{axis}", to_map, persistent=False)
            self.register_buffer(f"pooled_{axis}", to_pooled, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Published start: N(0, 0.01) for layers, Xavier normal on the stored grid shapes."""
        trained = (self.local_coord, self.global_coord, self.fusion, self.recover)
        for module in (m for part in trained for m in part.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.local_table, self.global_table):
            nodes = table[..., 0].numel()
            std = (2.0 / (nodes * (table.shape[-1] + 1))) ** 0.5
            nn.init.normal_(table, std=std)

    def features(self, image: Tensor) -> Features:
        """One level [B, C, H, W]: all taps resized to the first one's grid, concatenated."""
        with torch.no_grad():
            taps = self.backbone(image)
            x = torch.cat(
                [taps[0]]
                + [
                    F.interpolate(tap, size=self.grid, mode="bilinear", align_corners=True)
                    for tap in taps[1:]
                ],
                dim=1,
            )
        return (x,)

    def adapt(self, features: Features) -> None:
        """Fix ``feature_scale="auto"`` from training features [B, C, H, W]."""
        if self.config.feature_scale == "auto":
            # In parts: a second copy in float64 of what just fits into memory would not.
            total = sum(
                part.double().square().sum().item() for part in torch.split(features[0], 16)
            )
            mean_square = total / features[0].numel()
            scale = (AUTO_MEAN_SQUARE / max(mean_square, 1e-12)) ** 0.5
            self.config = dataclasses.replace(self.config, feature_scale=scale)

    def _scaled(self, features: Features) -> Tensor:
        scale = self.config.feature_scale
        if scale == "auto":
            raise InputError("feature_scale: 'auto' is not fixed yet; call adapt() with features")
        x = widened(features[0])
        return x if scale == 1.0 else x * scale

    def reconstruct(self, x: Tensor) -> Tensor:
        """Normal features f [B, C, H, W] for scaled features x [B, C, H, W]."""
        H, W = self.grid
        v_global = self.global_coord(x.mean((2, 3)))  # [B, D]
        v_local = self.local_coord(x.permute(0, 2, 3, 1))  # [B, H, W, D]
        if self.training and torch.rand(()) < self.config.jitter_probability:
            v_local = v_local + self.config.jitter_sigma * torch.randn_like(v_local)
        f_global = grid_interpolate(self.global_table, v_global).reshape(-1, self.C, H, W)
        f_local = grid_interpolate(self.local_table, v_local).permute(0, 3, 1, 2)
        h = torch.cat([f_global, f_local], dim=1)
        return widened(self.recover(self.fusion(h)))

    def similarity(self, f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity S and the summed squared difference, both [B, H, W].

        S lies in [-cosine_weight, mse_weight + cosine_weight].
        """
        e2 = (f - x).square().sum(1)
        passes = (e2 / self.C <= self.config.mse_threshold).to(x.dtype)
        cosine = F.cosine_similarity(f, x, dim=1, eps=1e-8)
        return self.config.mse_weight * passes + self.config.cosine_weight * cosine, e2

    def loss(self, features: Features) -> Tensor:
        """Mean squared error between refined reconstruction and features, a scalar."""
        x = self._scaled(features)
        S, e2 = self.similarity(self.reconstruct(x), x)
        return ((1.0 - S).square() * e2).mean() / self.C

    def distance(self, features: Features) -> Tensor:
        """Refined L2 distance [B, H, W] on the feature grid, float32."""
        x = self._scaled(features)
        S, e2 = self.similarity(self.reconstruct(x), x)
        return (1.0 - S).abs() * e2.sqrt()

    def score(self, features: Features) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, H, W] at image size and raw score [B], float32."""
        d = self.distance(features)
        anomaly_map = self.map_h @ d @ self.map_w.T
        pooled = self.pooled_h @ d @ self.pooled_w.T
        return anomaly_map, pooled.amax((1, 2))

    def parameter_groups(
        self, lr: float, grid_lr: float = 0.1, **unknown: float
    ) -> list[dict[str, Any]]:
        """Two groups: the network at ``lr``, both grids at ``grid_lr``."""
        if unknown:
            raise InputError(f"grad: unknown optimiser settings {sorted(unknown)}, known: grid_lr")
        grids = [self.local_table, self.global_table]
        rest = [
            p for p in self.parameters() if p.requires_grad and not any(p is grid for grid in grids)
        ]
        return [{"params": rest, "lr": lr}, {"params": grids, "lr": grid_lr}]


def _check(config: GradConfig) -> None:
    for name in ("local_dims", "global_dims", "local_nodes", "global_nodes"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: expected at least 1, got {getattr(config, name)}")
    if config.blocks is not None and config.blocks < 1:
        raise InputError(f"blocks: expected at least 1, got {config.blocks}")
    local_count = config.local_nodes**config.local_dims
    global_count = config.global_nodes**config.global_dims
    if local_count > 4096 or global_count > 256:
        raise InputError(
            f"grids: expected at most 4096 local and 256 global nodes, got {local_count} and "
            f"{global_count}; use fewer nodes per dimension"
        )
    if min(config.size) < POOL_PX:
        raise InputError(
            f"size: expected at least {POOL_PX} x {POOL_PX} pixels for the image score's mean, "
            f"got {config.size}"
        )


def _map_head(n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Matrices [n_out, n_in] for the map and [n_out - 31, n_in] for the pooled map."""
    to_map = mean_pool_matrix(n_out, SMOOTH_PX, SMOOTH_PX // 2) @ bilinear_matrix(
        n_out, n_in, align_corners=True
    )
    to_pooled = mean_pool_matrix(n_out, POOL_PX) @ to_map
    return (
        torch.from_numpy(to_map.astype(np.float32)),
        torch.from_numpy(to_pooled.astype(np.float32)),
    )
