"""Reverse Distillation (RD4AD): a student rebuilds the teacher's maps from one small code.

Paper: Deng and Li, Anomaly Detection via Reverse Distillation from One-Class Embedding, CVPR 2022,
arXiv 2201.10703. Authors' code: repository hq-deng/RD4AD (MIT). Teacher weights: torchvision's
first ImageNet weights (BSD-3-Clause), which timm names tv_in1k.

Differences from the authors' code:
1. The teacher ends behind its last tap, and the two layers of the bottleneck that are never called
   are not built: 52.4 M parameters less, same numbers.
2. Up-sampling, the sum over levels and the Gaussian are one product of matrices per axis and level,
   in float32 instead of float64 on the host (golden map agrees to 3e-7).
3. The teacher gives no gradients: the authors compute them and never use them.
4. ``loss_form="position"`` trains the paper's formula; published numbers come from the default.
5. Any timm network with three maps that halve in size teaches. Where its maps have negative
   values, the student's stages end without ReLU, or it could not reproduce them.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastad.errors import InputError
from fastad.models.backbone import RGB, Backbone, BackboneConfig
from fastad.models.registry import Features, Method, register, widened
from fastad.ops.anomaly_map import bilinear_matrix, gaussian_matrix
from fastad.spec import InputSpec

EPS = 1e-8  # smallest norm in a cosine; needs float32, it is 0 in float16
PUBLISHED_TEACHER = BackboneConfig("wide_resnet50_2.tv_in1k", (1, 2, 3))
Step = Literal["down", "same", "up"]


@dataclass(frozen=True)
class ReverseDistillationConfig:
    """Settings of RD4AD; the defaults are the published ones for MVTec-AD.

    ``size`` is (H, W) in pixels. The following default to what suits the teacher: ``mean``,
    ``std``; ``block``; blocks in the bottleneck and in the decoder's three stages, deepest first;
    channels per 64 in the inner convolutions of bottleneck and decoder (128 is WideResNet's;
    other projects train a bottleneck of 64 with it); whether teacher maps are ``signed``.
    ``loss_form`` is one cosine per image and level (``"flattened"``) or per ``"position"``.
    """

    backbone: BackboneConfig = PUBLISHED_TEACHER
    size: tuple[int, int] = (256, 256)
    mean: RGB | None = None
    std: RGB | None = None
    block: Literal["basic", "bottleneck"] | None = None
    bottleneck_depth: int | None = None
    decoder_depths: tuple[int, int, int] | None = None
    bottleneck_width: int | None = None
    decoder_width: int | None = None
    signed: bool | None = None
    loss_form: Literal["flattened", "position"] = "flattened"
    sigma_px: float = 4.0


def _conv(C_in: int, C_out: int, kernel: int, step: Step) -> nn.Module:
    """A convolution that halves, keeps or doubles the size; doubling has no overlap."""
    if step == "up":
        return nn.ConvTranspose2d(C_in, C_out, 2, stride=2, bias=False)
    stride = 2 if step == "down" else 1
    return nn.Conv2d(C_in, C_out, kernel, stride, padding=kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Convolutions around a shortcut: 3 x 3 twice, or 1 x 1, 3 x 3, 1 x 1 with ``inner`` channels.

    ``step`` resizes in the first 3 x 3, which is 2 x 2 where it doubles, and in the shortcut.
    ``relu`` says whether the sum is rectified.
    """

    def __init__(self, C_in: int, C: int, inner: int | None, step: Step, relu: bool = True) -> None:
        super().__init__()
        if inner is None:
            convs = [_conv(C_in, C, 3, step), _conv(C, C, 3, "same")]
            widths = [C, C]
        else:
            convs = [
                _conv(C_in, inner, 1, "same"),
                _conv(inner, inner, 3, step),
                _conv(inner, C, 1, "same"),
            ]
            widths = [inner, inner, C]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.shortcut = (
            nn.Identity()
            if step == "same"
            else nn.Sequential(_conv(C_in, C, 1, step), nn.BatchNorm2d(C))
        )
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C, H', W']."""
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(F.relu(h) if i else h))
        h = h + self.shortcut(x)
        return F.relu(h) if self.relu else h


def _stage(
    C_in: int, C: int, inner: int | None, step: Step, depth: int, signed: bool = False
) -> nn.Sequential:
    """Blocks of one size; only the first resizes, only the last may leave its sum signed."""
    return nn.Sequential(
        *(
            ResidualBlock(
                C if i else C_in,
                C,
                inner,
                "same" if i else step,
                relu=not signed or i + 1 < depth,
            )
            for i in range(depth)
        )
    )


class Bottleneck(nn.Module):
    """Three levels fused at the smallest one's size, then squeezed to half of it (MFF and OCE)."""

    def __init__(self, channels: tuple[int, ...], inner: int | None, depth: int) -> None:
        super().__init__()
        C1, C2, C3 = channels
        self.conv1, self.norm1 = _conv(C1, C2, 3, "down"), nn.BatchNorm2d(C2)
        self.conv2, self.norm2 = _conv(C2, C3, 3, "down"), nn.BatchNorm2d(C3)
        self.conv3, self.norm3 = _conv(C2, C3, 3, "down"), nn.BatchNorm2d(C3)
        self.blocks = _stage(3 * C3, 2 * C3, inner, "down", depth)

    def forward(self, features: Features) -> Tensor:
        """The code [B, 2 * C3, H3 / 2, W3 / 2] of three levels."""
        f1, f2, f3 = features
        a = F.relu(self.norm1(self.conv1(f1)))
        a = F.relu(self.norm2(self.conv2(a)))
        b = F.relu(self.norm3(self.conv3(f2)))
        code: Tensor = self.blocks(torch.cat([a, b, f3], dim=1))
        return code


@register
class ReverseDistillation(Method):
    """RD4AD: one model per category in the paper; frozen teacher, trained bottleneck and decoder.

    Args:
        config: Settings; unset ones are filled in from the teacher.
        weights: Of the teacher: ``"imagenet"``, a path, ``"random"`` or ``"none"``.

    Raises:
        InputError: settings that contradict each other, or weights that do not fit.
    """

    name = "rd4ad"
    Config = ReverseDistillationConfig
    map_rule = (
        "sum over three levels of 1 - cosine between teacher and student, bilinear to image size, "
        "Gaussian blur"
    )
    score_rule = "maximum of the anomaly map"

    def __init__(self, config: ReverseDistillationConfig, weights: str = "imagenet") -> None:
        super().__init__()
        _check(config)
        self.backbone = Backbone(config.backbone, config.size, weights)
        maps = self._probe(config.size)
        self.config: ReverseDistillationConfig = _resolve(config, self.backbone, maps)
        c = self.config
        assert c.mean and c.std and c.bottleneck_depth and c.decoder_depths
        assert c.bottleneck_width and c.decoder_width and c.signed is not None
        self.input = InputSpec(c.size, c.mean, c.std)

        channels = self.backbone.channels
        code = 2 * channels[-1]
        self.bottleneck = Bottleneck(
            channels, _inner(c, code, c.bottleneck_width), c.bottleneck_depth
        )
        widths = (code, *reversed(channels))
        self.decoder = nn.ModuleList(
            _stage(C_in, C, _inner(c, C, c.decoder_width), "up", depth, c.signed)
            for C_in, C, depth in zip(widths[:-1], widths[1:], c.decoder_depths, strict=True)
        )
        for level, f in enumerate(maps):
            for axis, n_out, n_in in zip("hw", c.size, f.shape[2:], strict=True):
                to_map = gaussian_matrix(n_out, c.sigma_px) @ bilinear_matrix(
                    n_out, n_in, align_corners=True
                )
                buffer = torch.from_numpy(to_map.astype(np.float32))
                self.register_buffer(f"map_{axis}{level}", buffer, persistent=False)
        self._initialise()

    def _probe(self, size: tuple[int, int]) -> Features:
        """Teacher maps of a noise image, for their sizes and signs."""
        noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        return self.features(noise)

    def _initialise(self) -> None:
        """Published start: Kaiming normal by fan-out; transposed convolutions keep torch's own."""
        for part in (self.bottleneck, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, image: Tensor) -> Features:
        """Three levels [B, C, H, W] of the teacher, largest first."""
        with torch.no_grad():
            levels: Features = self.backbone(image)
        return levels

    def reconstruct(self, features: Features) -> Features:
        """The student's levels, like ``features``."""
        h = self.bottleneck(features)
        levels: list[Tensor] = []
        for stage in self.decoder:
            h = stage(h)
            levels.append(h)
        return tuple(reversed(levels))

    def loss(self, features: Features) -> Tensor:
        """Sum over levels of the mean of 1 - cosine, a scalar."""
        pairs = list(zip(features, self.reconstruct(features), strict=True))
        if self.config.loss_form == "flattened":
            pairs = [(f.flatten(1), g.flatten(1)) for f, g in pairs]
        return torch.stack([_cosine_distance(f, g).mean() for f, g in pairs]).sum()

    def distances(self, features: Features) -> Features:
        """1 - cosine at every position of every level, float32 [B, H, W]."""
        pairs = zip(features, self.reconstruct(features), strict=True)
        return tuple(_cosine_distance(f, g) for f, g in pairs)

    def score(self, features: Features) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, H, W] at image size and raw score [B], float32."""
        levels = [
            self.get_buffer(f"map_h{level}") @ d @ self.get_buffer(f"map_w{level}").T
            for level, d in enumerate(self.distances(features))
        ]
        anomaly_map = levels[0] + levels[1] + levels[2]
        return anomaly_map, anomaly_map.amax((1, 2))

    def parameter_groups(self, lr: float, **unknown: float) -> list[dict[str, Any]]:
        """One group: decoder, then bottleneck."""
        if unknown:
            raise InputError(f"rd4ad: unknown optimiser settings {sorted(unknown)}, known: none")
        params = [*self.decoder.parameters(), *self.bottleneck.parameters()]
        return [{"params": params, "lr": lr}]


def _cosine_distance(f: Tensor, g: Tensor) -> Tensor:
    """1 - cosine along the second axis, in float32: near 1 a cosine has few digits left."""
    f, g = widened(f), widened(g)
    # Clamped before the root, whose gradient at 0 would be NaN: rectified vectors can be all 0.
    norm_f = f.square().sum(1).clamp_min(EPS**2).sqrt()
    norm_g = g.square().sum(1).clamp_min(EPS**2).sqrt()
    return 1.0 - (f * g).sum(1) / (norm_f * norm_g)


def _inner(config: ReverseDistillationConfig, C: int, width: int) -> int | None:
    """Channels inside a block with C outputs; None for blocks without a reduction."""
    return None if config.block == "basic" else C // 4 * width // 64


def _resolve(
    config: ReverseDistillationConfig, teacher: Backbone, maps: Features
) -> ReverseDistillationConfig:
    """Fill what is unset with what suits the teacher."""
    sizes = [tuple(f.shape[2:]) for f in maps]
    halves = all(n == (2 * m[0], 2 * m[1]) for n, m in itertools.pairwise(sizes))
    if not halves or any(n % 2 for n in sizes[-1]):
        raise InputError(
            f"size: expected three teacher maps that halve in size, the last one even, which the "
            f"published teacher gives at multiples of 32; {config.backbone.name} with taps "
            f"{config.backbone.taps} gives {sizes} for {config.size}"
        )
    name = config.backbone.name
    width = 128 if name.startswith("wide_resnet") else 64
    shallow = name.split(".")[0] == "resnet18"
    signed = any(bool((f < 0).any()) for f in maps)
    return dataclasses.replace(
        config,
        mean=config.mean or teacher.mean,
        std=config.std or teacher.std,
        block=config.block or ("bottleneck" if teacher.channels[0] >= 256 else "basic"),
        bottleneck_depth=config.bottleneck_depth or (2 if shallow else 3),
        decoder_depths=config.decoder_depths or ((2, 2, 2) if shallow else (3, 4, 6)),
        bottleneck_width=config.bottleneck_width or width,
        decoder_width=config.decoder_width or width,
        signed=signed if config.signed is None else config.signed,
    )


def _check(config: ReverseDistillationConfig) -> None:
    if len(config.backbone.taps) != 3:
        raise InputError(f"backbone.taps: expected three, got {config.backbone.taps}")
    if config.sigma_px <= 0:
        raise InputError(f"sigma_px: expected more than 0, got {config.sigma_px}")
    if min(config.size) < 32:
        raise InputError(f"size: expected at least 32 x 32 pixels, got {config.size}")
    for name in ("bottleneck_depth", "bottleneck_width", "decoder_width"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if config.decoder_depths is not None and min(config.decoder_depths) < 1:
        raise InputError(f"decoder_depths: expected at least 1 each, got {config.decoder_depths}")
