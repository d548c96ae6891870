"""UniAD: frozen features rebuilt by a transformer whose attention cannot see its own place.

Paper: You et al., A Unified Model for Multi-class Anomaly Detection, NeurIPS 2022, arXiv
2206.03687. Authors' code: repository zhiyuanyou/UniAD (Apache-2.0). Backbone weights:
EfficientNet-B4 ImageNet weights (Apache-2.0) through timm.

Differences from the authors' code:
1. The backbone ends behind its last tap: 39 % fewer of its multiply-adds, same features.
2. Positions meet queries and keys after the projection, inside the attention, as they do not
   depend on the image: the same number up to rounding (golden map agrees to 5e-7).
3. Up-sampling and the 16 x 16 mean of the evaluation are folded into two matrices per axis.
4. Height and width may differ, in the image as in the window; an even window, which the authors
   silently treat as the next odd one, is refused, and so is one that blinds a token.
5. Training keeps the last epoch; the authors also keep the best one on the test set.
6. ``start="local"``, an option: on 96 DeepPCB tiles a layer each with it reaches 0.79 / 0.96 after
   900 steps, where the published start stays below 0.69 / 0.92 (image / pixel AUROC).
"""

from __future__ import annotations

import dataclasses
import math
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
from fastad.ops.neighbor_attention import neighbor_attention, neighbor_mask
from fastad.spec import InputSpec

# Of the local start: among 14 x 14 tokens a fifth of the weight on the own, 4 % next to it.
WAVE_HEIGHT = 2.0
POOL_PX = 16  # mean whose maximum is the image score
PUBLISHED_BACKBONE = BackboneConfig(
    "tf_efficientnet_b4.aa_in1k", (0, 1, 2, 3), same_padding_size=380
)


@dataclass(frozen=True)
class UniadConfig:
    """Settings of UniAD; the defaults are the published ones for MVTec-AD.

    ``size`` is (H, W) in pixels, ``stride`` the pixels per token and axis, ``window`` the (H, W)
    of the hidden neighbourhood in tokens, odd, or 0 for none. ``mean`` and ``std`` default to the
    backbone's own. ``masked`` switches the window on for the encoder, the decoder's attention to
    the encoder, and its attention to the layer before. ``image_score`` is ``"max"`` (of the
    16 x 16 mean of the map, MVTec-AD) or ``"mean"`` (of the whole map, CIFAR-10). ``start`` is
    where training begins: ``"published"``, or ``"local"``, ours, which needs a hundredth of the
    steps (`Uniad.adapt`); the network itself is the same.
    """

    backbone: BackboneConfig = PUBLISHED_BACKBONE
    size: tuple[int, int] = (224, 224)
    mean: RGB | None = None
    std: RGB | None = None
    stride: int = 16
    width: int = 256
    heads: int = 8
    ffn_width: int = 1024
    encoder_layers: int = 4
    decoder_layers: int = 4
    window: tuple[int, int] = (7, 7)
    masked: tuple[bool, bool, bool] = (True, True, True)
    dropout: float = 0.1
    jitter_scale: float = 20.0
    jitter_probability: float = 1.0
    image_score: Literal["max", "mean"] = "max"
    start: Literal["published", "local"] = "published"

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the tokens."""
        return self.size[0] // self.stride, self.size[1] // self.stride


class Attention(nn.Module):
    """Multi-head attention with positions on queries and keys, blind to the neighbourhood."""

    def __init__(self, config: UniadConfig, masked: bool) -> None:
        super().__init__()
        self.heads, self.grid = config.heads, config.grid
        self.window = config.window if masked else (0, 0)
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)  # rows: queries, keys, values
        self.out = nn.Linear(config.width, config.width)

    def forward(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """What ``query`` [N, C] or [B, N, C] reads from ``memory`` [B, N, C], [B, N, C].

        ``position`` [N, C] is added to queries and keys, never to values.
        """
        W, bias, C = self.qkv.weight, self.qkv.bias, memory.shape[-1]
        # Weights may be in half precision where the tokens between them are in float32.
        query, memory, position = (t.to(W.dtype) for t in (query, memory, position))
        # (h + P) W + b = h W + (P W + b), and the bracket does not depend on the image.
        q, q_position = F.linear(query, W[:C]), F.linear(position, W[:C], bias[:C])
        k = F.linear(memory, W[C : 2 * C])
        k_position = F.linear(position, W[C : 2 * C], bias[C : 2 * C])
        v = self._split(F.linear(memory, W[2 * C :], bias[2 * C :]))
        if self.training:  # the operator has no dropout on its weights
            q, k = self._split(q + q_position).expand_as(v), self._split(k + k_position)
            seen = ~neighbor_mask(self.grid, self.window, q.device)
            read = F.scaled_dot_product_attention(q, k, v, seen, self.dropout)
        else:
            # Learned queries do not depend on the image either: all of q is a constant.
            constant = query.dim() == 2
            read = neighbor_attention(
                self._split(q + q_position if constant else q).expand_as(v),
                self._split(k),
                v,
                grid=self.grid,
                window=self.window,
                q_position=None if constant else self._split(q_position),
                k_position=self._split(k_position),
            )
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out

    def _split(self, t: Tensor) -> Tensor:
        """[..., N, C] to [..., heads, N, C / heads]."""
        return t.reshape(*t.shape[:-1], self.heads, -1).transpose(-3, -2)


def _feed_forward(config: UniadConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.width, config.ffn_width),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.ffn_width, config.width),
    )


class EncoderLayer(nn.Module):
    """Attention among the tokens and a feed-forward step, each normalised behind its sum."""

    def __init__(self, config: UniadConfig) -> None:
        super().__init__()
        self.attention = Attention(config, config.masked[0])
        self.ffn = _feed_forward(config)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, position: Tensor) -> Tensor:
        """One layer, [B, N, C] in and out."""
        h = self.norm1(h + self.drop(self.attention(h, h, position)))
        out: Tensor = self.norm2(h + self.drop(self.ffn(h)))
        return out


class DecoderLayer(nn.Module):
    """A learned query table reads first the encoder's output, then the layer before."""

    def __init__(self, config: UniadConfig) -> None:
        super().__init__()
        H, W = config.grid
        self.queries = nn.Parameter(torch.empty(H * W, config.width))
        self.attention_memory = Attention(config, config.masked[1])
        self.attention_previous = Attention(config, config.masked[2])
        self.ffn = _feed_forward(config)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.norm3 = nn.LayerNorm(config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, previous: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """One layer; ``previous``, ``memory`` and the result are [B, N, C]."""
        t = self.attention_memory(self.queries, memory, position)
        t = self.norm1(self.queries + self.drop(t))
        t = self.norm2(t + self.drop(self.attention_previous(t, previous, position)))
        out: Tensor = self.norm3(t + self.drop(self.ffn(t)))
        return out


@register
class Uniad(Method):
    """UniAD: one model for many categories, trained on their normal images together.

    Args:
        config: Settings; unset ones are filled in from the backbone.
        weights: Of the backbone: ``"imagenet"``, a path, ``"random"`` or ``"none"``.

    Raises:
        InputError: settings that contradict each other, or weights that do not fit.
    """

    name = "uniad"
    Config = UniadConfig
    map_h: Tensor
    map_w: Tensor
    pooled_h: Tensor
    pooled_w: Tensor
    map_rule = "L2 distance between features and their reconstruction, bilinear to image size"
    score_rule = (
        "maximum of the 16 x 16 mean of the anomaly map; with image_score mean, the mean of the map"
    )

    def __init__(self, config: UniadConfig, weights: str = "imagenet") -> None:
        super().__init__()
        _check(config)
        self.backbone = Backbone(config.backbone, config.size, weights)
        self.config: UniadConfig = dataclasses.replace(
            config, mean=config.mean or self.backbone.mean, std=config.std or self.backbone.std
        )
        assert self.config.mean and self.config.std
        self.input = InputSpec(config.size, self.config.mean, self.config.std)
        self.C = sum(self.backbone.channels)
        self.grid = H, W = config.grid
        self.score_window = (POOL_PX, POOL_PX) if config.image_score == "max" else config.size

        self.project_in = nn.Linear(self.C, config.width)
        self.column_table = nn.Parameter(torch.empty(W, config.width // 2))
        self.row_table = nn.Parameter(torch.empty(H, config.width // 2))
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, self.C)
        for axis, n_out, n_in, window in zip(
            "hw", config.size, self.grid, self.score_window, strict=True
        ):
            to_map = bilinear_matrix(n_out, n_in, align_corners=True)
            to_pooled = mean_pool_matrix(n_out, window) @ to_map
            for name, matrix in ((f"map_{axis}", to_map), (f"pooled_{axis}", to_pooled)):
                buffer = torch.from_numpy(matrix.astype(np.float32))
                self.register_buffer(name, buffer, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Published start: Xavier uniform, zero biases; layers differ in most matrices only."""
        trained = (self.project_in, self.encoder, self.decoder, self.project_out)
        for module in (m for part in trained for m in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, DecoderLayer):
                nn.init.normal_(module.queries)
        nn.init.uniform_(self.column_table)
        nn.init.uniform_(self.row_table)
        # The authors copy one prototype layer and redraw all but these.
        for layers in (self.encoder, self.decoder):
            first = dict(layers[0].named_parameters())
            for layer in layers[1:]:
                for name, value in layer.named_parameters():
                    if name == "queries" or "qkv" in name:
                        value.data.copy_(first[name])

        if self.config.start == "local":
            self._start_local()

    def _start_local(self) -> None:
        """Positions as waves, queries as keys: attention begins at a token's surroundings.

        With the published start it begins almost uniform, and most of a short training goes into
        finding out where things are. A product of two wave vectors falls with their distance.
        """
        for table in (self.column_table, self.row_table):
            n, C = table.shape
            at = torch.arange(n, dtype=torch.float32)[:, None]
            longest = math.log(math.pi / (1.5 * n))
            rate = torch.linspace(math.log(math.pi), longest, C // 2).exp()
            wave = torch.cat([(at * rate).sin(), (at * rate).cos()], dim=1)
            table.data.zero_()[:, : wave.shape[1]] = WAVE_HEIGHT * wave
        C = self.project_in.out_features
        for module in self.modules():
            if isinstance(module, Attention):
                module.qkv.weight.data[C : 2 * C] = module.qkv.weight.data[:C]

    def adapt(self, features: Features) -> None:
        """With ``start="local"``: begin at the mean and spread of training features [B, C, H, W].

        Both projections absorb them, so that the network starts with standardised channels, and
        its output with their mean. Nothing for the published start.
        """
        if self.config.start != "local":
            return
        mean = features[0].mean((0, 2, 3))
        std = features[0].std((0, 2, 3)).clamp_min(1e-4)  # a channel may be dead
        into, out = self.project_in, self.project_out
        into.weight.data /= std
        into.bias.data = -(into.weight.data @ mean)
        out.weight.data *= std[:, None]
        out.bias.data = mean

    def features(self, image: Tensor) -> Features:
        """One level [B, C, H, W]: all taps resized to the token grid, concatenated."""
        with torch.no_grad():
            taps = [
                tap
                if tuple(tap.shape[2:]) == self.grid
                else F.interpolate(tap, size=self.grid, mode="bilinear", align_corners=True)
                for tap in self.backbone(image)
            ]
            return (torch.cat(taps, dim=1),)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Normal features [B, N, C] for features x [B, N, C]."""
        h: Tensor = self.project_in(x)
        position = self._position()
        for layer in self.encoder:
            h = layer(h, position)
        memory = h
        for layer in self.decoder:
            h = layer(h, memory, position)
        x_hat: Tensor = self.project_out(self.norm(h))
        return x_hat

    def _position(self) -> Tensor:
        """[N, C], row-major: columns in the first half of the channels, rows in the second."""
        H, W = self.grid
        columns = self.column_table[None, :, :].expand(H, -1, -1)
        rows = self.row_table[:, None, :].expand(-1, W, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)

    def _jitter(self, x: Tensor) -> Tensor:
        """Noise in proportion to each token's norm, for the whole batch or not at all."""
        if torch.rand(()) >= self.config.jitter_probability:
            return x
        sigma = self.config.jitter_scale / self.C * x.norm(dim=-1, keepdim=True)
        noisy: Tensor = x + sigma * torch.randn_like(x)
        return noisy

    def loss(self, features: Features) -> Tensor:
        """Mean squared error between reconstruction and undisturbed features, a scalar."""
        x = _tokens(features)
        x_hat = self.reconstruct(self._jitter(x) if self.training else x)
        return F.mse_loss(x_hat, x)

    def distance(self, features: Features) -> Tensor:
        """L2 distance between reconstruction and features on the token grid, float32 [B, H, W]."""
        x = _tokens(features)
        difference = widened(self.reconstruct(x)) - widened(x)
        return difference.square().sum(-1).sqrt().reshape(-1, *self.grid)

    def score(self, features: Features) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, H, W] at image size and raw score [B], float32."""
        d = self.distance(features)
        anomaly_map = self.map_h @ d @ self.map_w.T
        pooled = self.pooled_h @ d @ self.pooled_w.T
        return anomaly_map, pooled.amax((1, 2))

    def parameter_groups(self, lr: float, **unknown: float) -> list[dict[str, Any]]:
        """One group: everything but the backbone."""
        if unknown:
            raise InputError(f"uniad: unknown optimiser settings {sorted(unknown)}, known: none")
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]


def _tokens(features: Features) -> Tensor:
    """[B, C, H, W] to [B, N, C]."""
    return features[0].flatten(2).transpose(1, 2)


def _check(config: UniadConfig) -> None:
    for name in ("stride", "width", "heads", "ffn_width", "encoder_layers", "decoder_layers"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: expected at least 1, got {getattr(config, name)}")
    if config.width % 2 or config.width % config.heads:
        raise InputError(
            f"width: expected an even multiple of {config.heads} heads, got {config.width}"
        )
    for name in ("dropout", "jitter_probability"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise InputError(f"{name}: expected 0..1, got {getattr(config, name)}")
    if min(config.size) < POOL_PX or any(n % config.stride for n in config.size):
        raise InputError(
            f"size: expected multiples of the stride {config.stride}, at least {POOL_PX} pixels, "
            f"got {config.size}"
        )
    if any(w < 0 or (w > 0 and w % 2 == 0) for w in config.window):
        raise InputError(
            f"window: expected odd sizes, or 0 for no mask, got {config.window}; the authors' "
            "code treats an even size n as n + 1"
        )
    if any(config.masked) and neighbor_mask(config.grid, config.window).all(1).any():
        smallest = tuple((w // 2 * 2 + 2) * config.stride for w in config.window)
        raise InputError(
            f"window: {config.window} tokens blind the middle of a grid of {config.grid} tokens; "
            f"use a smaller window, or a size of at least {smallest[0]} rows or {smallest[1]} "
            f"columns of pixels (got {config.size})"
        )
