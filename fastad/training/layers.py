"""How layers compute in training: their precision, memory layout and batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fastad.errors import UnsupportedError
from fastad.models.registry import Features, Method

LAYERS = frozenset({F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention})


class LayersInBfloat16(TorchFunctionMode):
    """Context in which layers with weights, and attention, run under autocast in bfloat16.

    They hand float32 on. Autocast around a whole loss would also round what compares: SSIM
    subtracts a squared mean from a mean of squares, GRAD reads its grids at coordinates.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in LAYERS:
            return func(*args, **(kwargs or {}))
        with torch.autocast(self.device.type, torch.bfloat16):
            return func(*args, **(kwargs or {})).float()


def weights_channels_last(method: Method) -> None:
    """Store the weights of all 2-D convolutions with channels innermost; values stay the same."""
    for module in method.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)


def channels_last(features: Features) -> Features:
    """Images or features [B, C, H, W] with channels innermost; others as they are."""
    layout = torch.channels_last
    return tuple(f.contiguous(memory_format=layout) if f.dim() == 4 else f for f in features)


class _Sum(torch.autograd.Function):
    """Sum over processes; each one's loss counts, so gradients are summed on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes, on the CPU.

    torch has `SyncBatchNorm` for this, with CUDA kernels only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; parts of the batch may have any size."""
        if not self.training:
            evaluated: Tensor = super().forward(x)
            return evaluated
        C, own = x.shape[1], x.numel() // x.shape[1]
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), x.new_tensor([own])]))
        count = sums[C].detach()
        centred = x - (sums[:C] / count).view(1, C, 1, 1)
        # Of centred values, like torch's own: mean square less squared mean would cancel.
        var = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(sums[:C] / count, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        normalised: Tensor = centred * scale.view(1, C, 1, 1) + self.bias.view(1, C, 1, 1)
        return normalised


def share_statistics(method: Method, device: torch.device) -> None:
    """Let batch normalisation that trains see the batch of all processes.

    A last batch with fewer images than processes counts the image that it repeats.

    Args:
        method: In train mode; its frozen layers, which are not, stay as they are.
        device: Where it will train.

    Raises:
        UnsupportedError: a kind of batch normalisation that neither form here computes.
    """
    for module in list(method.modules()):
        for name, child in module.named_children():
            if not child.training or not isinstance(child, _BatchNorm):
                continue
            if type(child) is not nn.BatchNorm2d:
                raise UnsupportedError(
                    f"{name}: {type(child).__name__} in several processes would see one part of "
                    "the batch; use torch.nn.BatchNorm2d, or train in one process"
                )
            if device.type == "cuda":
                convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
                setattr(module, name, convert(child))
            else:
                child.__class__ = SharedBatchNorm2d
