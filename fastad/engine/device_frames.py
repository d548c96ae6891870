"""Frames that are on the device already: torch tensors, DLPack, the CUDA array interface.

Nothing is copied to the host, ever: frames on another device are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastad.engine.cuda import DLPACK_CPU, DLPACK_CUDA
from fastad.errors import InputError

_KINDS = {DLPACK_CPU: "the CPU", DLPACK_CUDA: "CUDA", 3: "pinned CPU memory", 13: "managed memory"}


def as_frames(
    frames: object,
    device: torch.device,
) -> Tensor:  # [B, H, W, 3] uint8 on ``device``
    """A tensor over the caller's memory; contiguous, which may take one copy on the device.

    In this order: torch tensors, ``__dlpack__``, ``__cuda_array_interface__``. The work of the
    producer is ordered before what torch's current stream does next. Not yet run on hardware.

    Args:
        frames: uint8 RGB or BGR [B, H, W, 3], 0..255.
        device: Where they have to be; the index counts.

    Raises:
        InputError: another kind of object, another device, dtype or shape.
    """
    if isinstance(frames, Tensor):
        tensor = frames
    elif hasattr(frames, "__dlpack__"):
        tensor = _from_dlpack(frames, device)
    elif hasattr(frames, "__cuda_array_interface__"):
        tensor = _from_interface(frames, device)
    else:
        raise InputError(
            "frames: expected a torch tensor or an object with __dlpack__ or "
            f"__cuda_array_interface__, got {type(frames).__name__}; use run() for host arrays"
        )
    if tensor.device != device:
        raise InputError(
            f"frames: expected them on {device}, got {tensor.device}; move them there, or use "
            "run() for host arrays"
        )
    if tensor.dtype != torch.uint8 or tensor.dim() != 4 or tensor.shape[3] != 3:
        raise InputError(
            f"frames: expected uint8 [B, H, W, 3], got {tensor.dtype} {list(tensor.shape)}; pass "
            "raw camera frames, channels last"
        )
    if 0 in tensor.shape:
        raise InputError(f"frames: expected at least one image, got {list(tensor.shape)}")
    return tensor.contiguous()


def _from_dlpack(frames: Any, device: torch.device) -> Tensor:
    kind, index = (int(number) for number in frames.__dlpack_device__())
    wanted = (DLPACK_CUDA, device.index) if device.type == "cuda" else (DLPACK_CPU, index)
    if (kind, index) != wanted:
        raise InputError(
            f"frames: expected them on {device}, got {_KINDS.get(kind, f'DLPack device {kind}')} "
            f"{index}; move them there, or use run() for host arrays"
        )
    try:
        return from_dlpack(frames)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InputError(f"frames: their DLPack export failed: {error}; copy them first") from error


def _from_interface(frames: Any, device: torch.device) -> Tensor:
    interface: dict[str, Any] = frames.__cuda_array_interface__
    if device.type != "cuda":
        raise InputError(
            f"frames: expected them on {device}, got a CUDA array; open the engine with "
            "device='cuda'"
        )
    if interface["typestr"] != "|u1":
        raise InputError(f"frames: expected uint8 (|u1), got {interface['typestr']}")
    stream = interface.get("stream")
    if stream == 0:
        raise InputError(
            "frames: __cuda_array_interface__ names stream 0, which its standard forbids; give 1 "
            "for the default stream"
        )
    if stream is not None:
        producer = torch.cuda.default_stream(device)
        if stream != 1:
            producer = torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(device).wait_stream(producer)
    return torch.as_tensor(frames)  # where they are: a device given here would get a copy
