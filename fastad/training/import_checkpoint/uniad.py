"""UniAD checkpoints of the authors: settings from shapes, keys to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.models.backbone import BackboneConfig, efficientnet_to_timm
from fastad.models.registry import load_exactly
from fastad.models.uniad import Uniad, UniadConfig
from fastad.training.import_checkpoint.reader import shape_of

_HEAD = "reconstruction."
_STRIDE = 16  # of the authors' neck, not stored
_TAPS = {272: (0, 1, 2, 3), 720: (0, 1, 2, 3, 4)}  # feature channels: MVTec-AD, CIFAR-10
_TABLES = {
    "pos_embed.row_embed.weight": "row_table",
    "pos_embed.col_embed.weight": "column_table",
}
_MODULES = {
    "input_proj": "project_in",
    "output_proj": "project_out",
    "transformer.decoder.norm": "norm",
}
_LAYER = {
    "linear1": "ffn.0",
    "linear2": "ffn.3",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
}
# What the authors call the decoder's self_attn reads the encoder's output.
_ATTENTION = {
    "encoder": {"self_attn": "attention"},
    "decoder": {"self_attn": "attention_memory", "multihead_attn": "attention_previous"},
}
_PACKED = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj.weight": "out.weight",
    "out_proj.bias": "out.bias",
}


def uniad_from_authors(state: Mapping[str, Tensor]) -> Uniad:
    """Build UniAD from the authors' tensors (keys without ``module.``), in eval mode.

    Image size, widths and depths follow from shapes; the backbone is the EfficientNet-B4 inside
    the file. What no file stores is taken as published: 8 heads, a 7 x 7 window, a stride of 16
    pixels; 720 feature channels mean the CIFAR-10 form, whose image score is the map's mean.

    Raises:
        InputError: keys are missing, left over or of another shape; the message names them.
    """
    model = Uniad(_config(state), weights="none")
    renamed = {
        _rename(key.removeprefix(_HEAD)): value.float()
        for key, value in state.items()
        if key.startswith(_HEAD)
    }
    backbone = {
        k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
    }
    for key, value in efficientnet_to_timm(backbone, model.backbone.net).items():
        renamed[f"backbone.net.{key}"] = value if value.dtype == torch.int64 else value.float()
    renamed |= {k: v for k, v in state.items() if not k.startswith((_HEAD, "backbone."))}
    load_exactly(model, renamed, "UniAD checkpoint")
    return model.eval()


def _config(state: Mapping[str, Tensor]) -> UniadConfig:
    def shape(key: str) -> torch.Size:
        return shape_of(state, _HEAD + key, "N D", "UniAD checkpoint")

    width, C = shape("input_proj.weight")
    if C not in _TAPS:
        raise InputError(
            f"UniAD checkpoint: expected {' or '.join(map(str, _TAPS))} feature channels of "
            f"EfficientNet-B4, got {C}; other backbones cannot be told from the file"
        )
    rows, columns = (shape(f"pos_embed.{axis}_embed.weight")[0] for axis in ("row", "col"))
    layer = re.escape(f"{_HEAD}transformer.") + r"{}\.layers\.(\d+)\."
    depth = {
        part: len({found[1] for k in state if (found := re.match(layer.format(part), k))})
        for part in _ATTENTION
    }
    return UniadConfig(
        backbone=BackboneConfig("tf_efficientnet_b4", _TAPS[C], same_padding_size=380),
        size=(rows * _STRIDE, columns * _STRIDE),
        stride=_STRIDE,
        width=width,
        ffn_width=shape("transformer.encoder.layers.0.linear1.weight")[0],
        encoder_layers=depth["encoder"],
        decoder_layers=depth["decoder"],
        image_score="max" if C == 272 else "mean",
    )


def _rename(name: str) -> str:
    """Our key for the authors' ``name``; an unknown name stays and is reported as left over."""
    if name in _TABLES:
        return _TABLES[name]
    module, _, field = name.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{field}"
    parts = name.split(".")
    if len(parts) < 6 or parts[0] != "transformer" or parts[1] not in _ATTENTION:
        return name
    prefix, rest = f"{parts[1]}.{parts[3]}", ".".join(parts[5:])
    if parts[4] == "learned_embed":
        return f"{prefix}.queries"
    if parts[4] in _LAYER:
        return f"{prefix}.{_LAYER[parts[4]]}.{rest}"
    attention = _ATTENTION[parts[1]]
    if parts[4] in attention and rest in _PACKED:
        return f"{prefix}.{attention[parts[4]]}.{_PACKED[rest]}"
    return name
