"""GRAD, CRAD and CRAD-S checkpoints of the authors: settings from shapes, keys to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.models.backbone import efficientnet_to_timm
from fastad.models.grad import Grad, GradConfig
from fastad.models.registry import load_exactly
from fastad.training.import_checkpoint.reader import shape_of

_LABEL = "GRAD checkpoint"
_KERNEL = "C_out C_in kH kW"
_HEAD, _BODY = "reconstruction.", "backbone."
_TABLES = {"query.0": "local_table", "query.1": "global_table"}
_COORD = re.compile(r"coord(_?)\.(\d+\.\w+)")
_BASIC = re.compile(r"layer\.0\.(\d+)\.(.+)")
_CONV = re.compile(r"layer\.(\d+)\.conv\.(.+)\.(\w+)")
_BOTTLENECK = {
    "0": "expand",
    "1": "bn1",
    "3": "depthwise",
    "4": "bn2",
    "5.fc.0": "gate.reduce",
    "5.fc.2": "gate.expand",
    "7": "project",
    "8": "bn3",
}


def grad_from_authors(state: Mapping[str, Tensor]) -> Grad:
    """Build GRAD from the authors' tensors (keys without ``module.``), in eval mode.

    The fusion network, its depth and the image size follow from keys and shapes; the backbone is
    the EfficientNet-B4 inside the file.

    Raises:
        InputError: keys are missing, left over or of another shape; the message names them.
    """
    config = _config(state)
    model = Grad(config, weights="none")
    renamed = _rename_head(state)
    backbone = {k.removeprefix(_BODY): v for k, v in state.items() if k.startswith(_BODY)}
    for key, value in efficientnet_to_timm(backbone, model.backbone.net).items():
        renamed[f"backbone.net.{key}"] = value
    renamed |= {k: v for k, v in state.items() if not k.startswith((_HEAD, _BODY))}
    load_exactly(model, renamed, _LABEL)
    return model.eval()


def _config(state: Mapping[str, Tensor]) -> GradConfig:
    basic, bottleneck = f"{_HEAD}layer.0.0.conv1.weight", f"{_HEAD}layer.0.conv.0.weight"
    local, whole = (
        shape_of(state, f"{_HEAD}query.{i}", "1 channels rows columns", _LABEL) for i in (0, 1)
    )
    shape_of(state, f"{_HEAD}recover.weight", _KERNEL, _LABEL)
    C = local[1]
    cells = whole[1] // C
    side = round(cells**0.5)
    if not cells or side * side != cells:
        raise InputError(f"{_LABEL}: {cells} cells per map are not a square grid")
    if basic in state:
        fusion, layer = "grad", _BASIC
    elif bottleneck in state:
        width = shape_of(state, bottleneck, _KERNEL, _LABEL)[0]
        fusion, layer = ("crad" if width == 4 * C else "crad-s"), _CONV
    else:
        raise InputError(f"{_LABEL}: neither {basic} nor {bottleneck} is there")
    found = (layer.fullmatch(k.removeprefix(_HEAD)) for k in state)
    return GradConfig(
        size=(side * 8, side * 8),
        fusion=fusion,  # type: ignore[arg-type]  # one of the three by construction
        blocks=len({match[1] for match in found if match}),
        local_nodes=local[-1],
        global_nodes=whole[-1],
    )


def _rename_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith(_HEAD):
            continue
        name = key.removeprefix(_HEAD)
        if name in _TABLES:  # [1, channels, y, x] -> [y, x, channels]
            renamed[_TABLES[name]] = value[0].permute(1, 2, 0).contiguous()
        elif coord := _COORD.fullmatch(name):  # the underscore means global
            flat = value.flatten(1) if value.dim() == 4 else value  # 1 x 1 convolution = linear
            renamed[f"{'global' if coord[1] else 'local'}_coord.{coord[2]}"] = flat
        elif conv := _CONV.fullmatch(name):
            renamed[f"fusion.{conv[1]}.{_BOTTLENECK.get(conv[2], conv[2])}.{conv[3]}"] = value
        elif basic := _BASIC.fullmatch(name):
            renamed[f"fusion.{basic[1]}.{basic[2]}"] = value  # inner names agree with ours
        else:
            renamed[name] = value  # its name is ours, or nobody's and reported
    return {k: v if v.dtype == torch.int64 else v.float() for k, v in renamed.items()}
