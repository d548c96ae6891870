"""Frozen feature extractors: any timm network with intermediate taps, weights from file or hub.

Two rules go beyond timm. `same_padding_size` freezes TensorFlow-style SAME padding at the
constants of one image size, as the EfficientNet-PyTorch code does for 380 px whatever it is fed:
features of imported checkpoints are wrong without it. And the ResNet-50 v2 of the ONNX model zoo
carries one more normalisation and ReLU behind its stem than timm's `resnetv2_50`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from fastad.errors import InputError, UnsupportedError

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class BackboneConfig:
    """Which network, and where it is tapped.

    ``taps`` are timm's ``out_indices`` (0 is the stem or stride 2). ``same_padding_size`` is the
    image size in pixels whose SAME padding is kept for all sizes; None pads for the actual size.
    """

    name: str
    taps: tuple[int, ...]
    same_padding_size: int | None = None


@dataclass(frozen=True)
class _Variant:
    timm_name: str
    patch: Callable[[nn.Module], None]
    mean: RGB
    std: RGB


def _add_stem_norm(net: nn.Module) -> None:
    stem: Any = net.stem
    stem.conv = nn.Sequential(stem.conv, nn.BatchNorm2d(64), nn.ReLU(inplace=True))


# Names that timm does not know; mean and std include the input normalisation the file left out.
_VARIANTS = {
    "resnetv2_50.onnx_zoo": _Variant(
        "resnetv2_50",
        _add_stem_norm,
        (0.4522231519, 0.4257050157, 0.3775683939),
        (0.2855135500, 0.2788846791, 0.2823102772),
    )
}


class PaddedConv2d(nn.Conv2d):
    """A convolution behind constant asymmetric zero padding (left, right, top, bottom)."""

    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Pad, then convolve without padding; ``x`` is float [B, C, H, W]."""
        return F.conv2d(
            F.pad(x, self.pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Backbone(nn.Module):
    """A frozen extractor: always in eval mode, no gradients, cut behind its last tap.

    Args:
        config: Network and taps.
        size: (H, W) of the images in pixels.
        weights: ``"imagenet"`` downloads through timm, a path reads a ``.safetensors`` or ``.pth``
            file (timm or EfficientNet-PyTorch key names), ``"random"`` asks for an untrained
            network, ``"none"`` leaves the values to a later ``load_state_dict``.

    Raises:
        InputError: unknown network, taps out of range, weights missing or of another shape.
        UnsupportedError: the network offers no intermediate features.
    """

    def __init__(self, config: BackboneConfig, size: tuple[int, int], weights: str) -> None:
        super().__init__()
        self.config = config
        variant = _VARIANTS.get(config.name)
        self.net = _create(config, variant, pretrained=weights == "imagenet")
        if weights not in ("imagenet", "random", "none"):
            _load_weights(self.net, Path(weights), config.name)
        info = self.net.feature_info
        rows = info.info if hasattr(info, "info") else info
        self.channels: tuple[int, ...] = tuple(rows[i]["num_chs"] for i in config.taps)
        self.strides: tuple[int, ...] = tuple(rows[i]["reduction"] for i in config.taps)
        cfg = self.net.pretrained_cfg
        self.mean: RGB = variant.mean if variant else tuple(cfg["mean"])
        self.std: RGB = variant.std if variant else tuple(cfg["std"])
        _freeze_same_padding(self.net, config.same_padding_size or size)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: running statistics of a frozen network never move."""
        return super().train(False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Feature maps, one [B, C, H, W] per tap, in the order of the taps."""
        taps = self.net.forward_intermediates(
            image, indices=list(self.config.taps), intermediates_only=True
        )
        return tuple(taps)


def _create(config: BackboneConfig, variant: _Variant | None, pretrained: bool) -> Any:
    timm_name = variant.timm_name if variant else config.name
    if not timm.is_model(timm_name.split(".")[0]):
        near = timm.list_models(f"*{timm_name.split('_')[0]}*")[:5]
        raise InputError(
            f"backbone.name: expected a timm network or {', '.join(_VARIANTS)}, got "
            f"{config.name!r}; similar names: {', '.join(near) or 'none'}"
        )
    if pretrained and variant:
        raise InputError(f"{config.name}: has no download, give its file with --weights PATH")
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    try:
        hub_log.setLevel(logging.ERROR)  # it would report each of its retries
        net: Any = timm.create_model(timm_name, pretrained=pretrained)
    except Exception as error:  # hub, http and socket libraries share no base class
        if not pretrained:
            raise
        raise InputError(
            f"{config.name}: the ImageNet weights could not be downloaded "
            f"({type(error).__name__}); fetch the file on a machine with internet and pass "
            "--weights PATH, or ask for an untrained network with --weights random"
        ) from error
    finally:
        hub_log.setLevel(level)
    if variant:
        variant.patch(net)
    if not hasattr(net, "forward_intermediates"):
        raise UnsupportedError(f"{config.name}: offers no intermediate features in timm")
    levels = len(net.feature_info)
    if not config.taps or not all(0 <= tap < levels for tap in config.taps):
        raise InputError(f"backbone.taps: expected indices in 0..{levels - 1}, got {config.taps}")
    if list(config.taps) != sorted(set(config.taps)):
        raise InputError(f"backbone.taps: expected rising indices, got {config.taps}")
    net.prune_intermediate_layers(list(config.taps), prune_norm=True, prune_head=True)
    return net


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"weights: expected a .safetensors or .pth file, {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle errors share no base class
        raise InputError(f"{path}: not a readable weight file ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    return state


def _load_weights(net: nn.Module, path: Path, name: str) -> None:
    state = _read_state(path)
    if "_conv_stem.weight" in state:
        state = efficientnet_to_timm(state, net)
    own = net.state_dict()
    missing = [
        k for k in own if k not in state and not k.endswith("num_batches_tracked")
    ]  # counters do nothing in eval mode and many files drop them
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or wrong:
        raise InputError(
            f"{path}: does not fit {name}: {len(missing)} of {len(own)} tensors missing "
            f"{missing[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    net.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def efficientnet_to_timm(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Rename EfficientNet-PyTorch keys (``_blocks.7._bn1.weight``) to timm's.

    Args:
        state: Tensors of the original layout, without any prefix.
        net: The timm network, whose stage lengths place the flat block numbers; keys of blocks
            beyond its last one, and of the classifier, are left out. A key of unexpected form
            stays, and is reported as unknown.
    """
    places = [(stage, i) for stage, blocks in enumerate(_blocks(net)) for i in range(len(blocks))]
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanded = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    gates = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    stems = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    classifier = ("_conv_head.", "_bn1.", "_fc.")
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        stem = re.fullmatch(r"(_conv_stem|_bn0)\.(\w+)", key)
        block = re.fullmatch(r"_blocks\.(\d{1,4})\.(\w+)\.(\w+)", key)
        if stem:
            renamed[f"{stems[stem[1]]}.{stem[2]}"] = value
        elif block is None:
            if not key.startswith(classifier):
                renamed[key] = value
        elif (number := int(block[1])) < len(places):
            stage, i = places[number]
            has_expansion = f"_blocks.{number}._expand_conv.weight" in state
            names = gates | (expanded if has_expansion else plain)
            renamed[f"blocks.{stage}.{i}.{names.get(block[2], block[2])}.{block[3]}"] = value
    return renamed


def _blocks(net: Any) -> list[nn.Sequential]:
    if not hasattr(net, "blocks"):
        raise InputError("weights: EfficientNet-PyTorch keys do not fit a network without blocks")
    return list(net.blocks)


def _freeze_same_padding(net: nn.Module, size: int | tuple[int, int]) -> None:
    """Replace size-dependent SAME padding by the constants that ``size`` gives."""
    convs = {name: m for name, m in net.named_modules() if isinstance(m, Conv2dSame)}
    if not convs:
        return
    seen: dict[str, torch.Size] = {}
    hooks = [
        conv.register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0].shape)
        )
        for name, conv in convs.items()
    ]
    H, W = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, H, W))
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, _with_constant_padding(conv, seen[name]))


def _with_constant_padding(conv: nn.Conv2d, shape: torch.Size) -> nn.Conv2d:
    top, bottom = _same_pads(shape[2], conv.kernel_size[0], conv.stride[0], conv.dilation[0])
    left, right = _same_pads(shape[3], conv.kernel_size[1], conv.stride[1], conv.dilation[1])
    symmetric = top == bottom and left == right
    padded: nn.Conv2d = (nn.Conv2d if symmetric else PaddedConv2d)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # torch types it as an open tuple
        conv.stride,  # type: ignore[arg-type]
        (top, left) if symmetric else 0,
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
    )
    padded.weight, padded.bias = conv.weight, conv.bias
    if isinstance(padded, PaddedConv2d):
        padded.pads = (left, right, top, bottom)
    return padded


def _same_pads(n: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    total = max((-(-n // stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0)
    return total // 2, total - total // 2
