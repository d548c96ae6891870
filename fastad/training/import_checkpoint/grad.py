"""GRAD, CRAD and CRAD-S checkpoints of the authors: settings from shapes, keys to ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.models.backbone import efficientnet_to_timm
from fastad.models.grad import Grad, GradConfig

_HEAD, _BODY = "reconstruction.", "backbone."
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
    own = model.state_dict()
    missing = sorted(own.keys() - renamed.keys())
    strangers = {k for k in state if not k.startswith((_HEAD, _BODY))}
    unknown = sorted(renamed.keys() - own.keys() | strangers)
    wrong = sorted(k for k in own.keys() & renamed.keys() if own[k].shape != renamed[k].shape)
    if missing or unknown or wrong:
        raise InputError(
            f"GRAD checkpoint: {len(missing)} keys missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    model.load_state_dict(renamed)
    return model.eval()


def _config(state: Mapping[str, Tensor]) -> GradConfig:
    basic, bottleneck = f"{_HEAD}layer.0.0.conv1.weight", f"{_HEAD}layer.0.conv.0.weight"
    for key in (f"{_HEAD}query.0", f"{_HEAD}query.1", f"{_HEAD}recover.weight"):
        if key not in state:
            raise InputError(f"GRAD checkpoint: key {key} is missing; is this another method?")
    C = state[f"{_HEAD}query.0"].shape[1]
    cells = state[f"{_HEAD}query.1"].shape[1] // C
    side = round(cells**0.5)
    if side * side != cells:
        raise InputError(f"GRAD checkpoint: {cells} cells per map are not a square grid")
    if basic in state:
        fusion, depth_at = "grad", 3
    elif bottleneck in state:
        fusion, depth_at = ("crad" if state[bottleneck].shape[0] == 4 * C else "crad-s"), 2
    else:
        raise InputError(f"GRAD checkpoint: neither {basic} nor {bottleneck} is there")
    layers = {k.split(".")[depth_at] for k in state if k.startswith(f"{_HEAD}layer.")}
    return GradConfig(
        size=(side * 8, side * 8),
        fusion=fusion,  # type: ignore[arg-type]  # one of the three by construction
        blocks=len(layers),
        local_nodes=state[f"{_HEAD}query.0"].shape[-1],
        global_nodes=state[f"{_HEAD}query.1"].shape[-1],
    )


def _rename_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith(_HEAD):
            continue
        name = key.removeprefix(_HEAD)
        parts = name.split(".")
        if parts[0] == "query":  # [1, channels, y, x] -> [y, x, channels]
            table = "local_table" if parts[1] == "0" else "global_table"
            renamed[table] = value[0].permute(1, 2, 0).contiguous()
        elif parts[0] in ("coord", "coord_"):  # the underscore means global
            coord = "local_coord" if parts[0] == "coord" else "global_coord"
            flat = value.flatten(1) if value.dim() == 4 else value  # 1 x 1 convolution = linear
            renamed[f"{coord}.{parts[1]}.{parts[2]}"] = flat
        elif parts[0] == "layer" and parts[2] != "conv":
            renamed[".".join(("fusion", *parts[2:]))] = value  # inner names agree with ours
        elif parts[0] == "layer":
            layer, field = ".".join(parts[3:-1]), parts[-1]
            renamed[f"fusion.{parts[1]}.{_BOTTLENECK.get(layer, layer)}.{field}"] = value
        else:
            renamed[name] = value
    return {k: v if v.dtype == torch.int64 else v.float() for k, v in renamed.items()}
