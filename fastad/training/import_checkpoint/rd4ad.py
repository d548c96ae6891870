"""RD4AD checkpoints of the authors: two state dictionaries, settings from shapes, keys to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastad.errors import InputError
from fastad.models.backbone import BackboneConfig
from fastad.models.registry import load_exactly
from fastad.models.reverse_distillation import ReverseDistillation, ReverseDistillationConfig
from fastad.training.import_checkpoint.reader import read_pickled, shape_of

_PARTS = ("bn", "decoder")  # the authors' bottleneck is called bn and is no batch norm
_UNUSED = re.compile(r"bn\.(conv4|bn4)\.|bn\..*memory")  # never called; of older versions
_FUSION = re.compile(r"bn\.(conv|bn)([123])\.(.+)")
_BLOCK = re.compile(
    r"(?:bn\.bn_layer|decoder\.layer([123]))\.(\d+)\.(conv[123]|bn[123]|downsample|upsample)\.(.+)"
)
_CLASSIFIER = ("fc.", "layer4.")  # of the teacher, behind its last tap


def read_rd4ad_state(path: Path) -> dict[str, Tensor]:
    """Tensors of an authors' file by their key, prefixed ``bn.`` or ``decoder.``.

    Args:
        path: A file written by ``torch.save({"bn": ..., "decoder": ...})``.

    Raises:
        InputError: no such file, not a checkpoint, or of another layout; nothing is executed.
    """
    loaded = read_pickled(path)
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(p), dict) for p in _PARTS):
        found = sorted(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise InputError(f"{path}: expected the keys bn and decoder, got {found}")
    state = {f"{part}.{k}": v for part in _PARTS for k, v in loaded[part].items()}
    foreign = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if foreign:
        raise InputError(f"{path}: expected only tensors, {foreign[:3]} are not")
    return state


def rd4ad_from_authors(
    state: Mapping[str, Tensor],
    teacher_state: Mapping[str, Tensor] | None = None,
    weights: str = "imagenet",
) -> ReverseDistillation:
    """Build RD4AD from the authors' tensors, in eval mode.

    The teacher, widths and depths follow from shapes, so half-width bottlenecks of other projects
    fit too. Bottleneck and decoder are worth nothing with a teacher of other weights than
    torchvision's first ones. Images are 256 px as published, since no file stores their size.

    Args:
        state: Keys prefixed ``bn.`` and ``decoder.``; ``encoder.`` may be the teacher.
        teacher_state: The teacher's tensors under torchvision's or timm's keys.
        weights: Where the teacher comes from when neither holds it: ``"imagenet"`` or a path.

    Raises:
        InputError: keys are missing, left over or of another shape; the message names them.
    """
    own_teacher = {k[len("encoder.") :]: v for k, v in state.items() if k.startswith("encoder.")}
    teacher = dict(teacher_state) if teacher_state is not None else own_teacher
    config = _config(state)
    model = ReverseDistillation(config, weights="none" if teacher else weights)
    renamed = {
        _rename(k): v
        for k, v in state.items()
        if not k.startswith("encoder.") and not _UNUSED.match(k)
    }
    prefix = "backbone.net."
    if teacher:
        renamed |= {f"{prefix}{k}": v for k, v in teacher.items() if not k.startswith(_CLASSIFIER)}
    else:
        renamed |= {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    renamed = {k: v if v.dtype == torch.int64 else v.float() for k, v in renamed.items()}
    own = model.state_dict()
    for key in own.keys() - renamed.keys():
        if key.startswith(prefix) and key.endswith("num_batches_tracked"):
            renamed[key] = own[key]  # torchvision's first files have no counters
    load_exactly(model, renamed, f"RD4AD checkpoint for {config.backbone.name}")
    return model.eval()


def _config(state: Mapping[str, Tensor]) -> ReverseDistillationConfig:
    def shape(key: str, letters: str = "C_out C_in kH kW") -> torch.Size:
        return shape_of(state, key, letters, "RD4AD checkpoint")

    def depth(stack: str) -> int:
        return len({k[len(stack) :].split(".")[0] for k in state if k.startswith(stack)})

    C1 = shape("bn.conv1.weight")[1]
    code = shape("decoder.layer1.0.upsample.0.weight")[0]
    squeezed = shape("bn.bn_layer.0.conv1.weight")[0]
    rebuilt = shape("decoder.layer1.0.bn1.weight", "C")[0]
    depths = (depth("decoder.layer1."), depth("decoder.layer2."), depth("decoder.layer3."))
    basic = "bn.bn_layer.0.conv3.weight" not in state
    # Inner channels are a quarter of the output's, times width / 64.
    bottleneck_width = 64 if basic else squeezed * 256 // code
    decoder_width = 64 if basic else rebuilt * 512 // code
    if C1 == 64 and basic:
        name = "resnet18" if depths == (2, 2, 2) else "resnet34"
    elif C1 == 256 and not basic:
        name = "wide_resnet50_2" if decoder_width == 128 else "resnet50"
    else:
        raise InputError(
            f"RD4AD checkpoint: expected 64 teacher channels with basic or 256 with bottleneck "
            f"blocks, got {C1} with {'basic' if basic else 'bottleneck'} blocks"
        )
    return ReverseDistillationConfig(
        backbone=BackboneConfig(f"{name}.tv_in1k", (1, 2, 3)),
        block="basic" if basic else "bottleneck",
        bottleneck_depth=depth("bn.bn_layer."),
        decoder_depths=depths,
        bottleneck_width=bottleneck_width,
        decoder_width=decoder_width,
    )


def _rename(key: str) -> str:
    """Our key for the authors' ``key``; an unknown one stays and is reported as left over."""
    if fusion := _FUSION.fullmatch(key):
        kind, number, field = fusion.groups()
        return f"bottleneck.{'norm' if kind == 'bn' else kind}{number}.{field}"
    block = _BLOCK.fullmatch(key)
    if block is None:
        return key
    stage, index, layer, field = block.groups()
    prefix = f"decoder.{int(stage) - 1}" if stage else "bottleneck.blocks"
    if layer in ("downsample", "upsample"):
        return f"{prefix}.{index}.shortcut.{field}"
    kind = "norms" if layer[:-1] == "bn" else "convs"
    return f"{prefix}.{index}.{kind}.{int(layer[-1]) - 1}.{field}"
