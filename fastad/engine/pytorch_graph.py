"""From a trained method to the module that a GPU runs: normalisation folded, half precision.

Products (convolutions and linear layers) run in the precision asked for. Everything between them
stays in float32 or meets it by type promotion: normalisation, softmax, distances, the map head,
and the parts that a method names in ``float32_parts``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastad.models.backbone import PaddedConv2d
from fastad.models.deployed import DeployedGraph
from fastad.models.registry import Method

# Exact types: subclasses may compute their weight anew in every call.
FOLDABLE = (nn.Conv2d, PaddedConv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)
PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear)
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
CONVS_2D = (nn.Conv2d, nn.ConvTranspose2d)

Conv = nn.Conv2d | nn.ConvTranspose2d


def deploy(method: Method, dtype: torch.dtype) -> DeployedGraph:
    """The graph of a method, rewritten in place, on the CPU, in eval mode.

    Args:
        method: Is used up: its BatchNorm is folded and its products are cast.
        dtype: Of the products: float32, bfloat16, float16, or float64 for exact comparisons.
    """
    method.eval().requires_grad_(False)
    graph = DeployedGraph(method).eval()
    if dtype == torch.float64:
        graph.double()
    fold_batchnorm(graph, torch.zeros(1, *method.input.size, 3, dtype=torch.uint8))
    if dtype.itemsize < 4:
        narrow(method, dtype)
    use_channels_last(graph)
    return graph


def fold_batchnorm(graph: nn.Module, example: Tensor) -> int:
    """Move every BatchNorm that directly follows a convolution into its weights, in float64.

    One forward pass shows what follows what. A pair is folded when each call of the convolution is
    read by that BatchNorm alone, and each call of the BatchNorm reads that convolution alone.

    Args:
        graph: In eval mode; changed in place.
        example: An input of ``graph``; its values do not matter.

    Returns:
        How many were folded; the others stay as they are.
    """
    norms = [m for m in graph.modules() if type(m) in NORMS and _has_constants(m)]
    if not norms:
        return 0
    with _Calls(graph) as calls, torch.no_grad():
        calls.count(graph(example))
    pairs = list(calls.pairs())
    for conv, norm in pairs:
        _fold(conv, norm)
        # timm's combined module keeps its activation; the folded part becomes the identity.
        rest = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        _replace(graph, norm, rest)
    return len(pairs)


class _Calls(TorchFunctionMode):
    """Records which tensor each convolution wrote, which each BatchNorm read, and all uses."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.written: dict[int, tuple[Conv, Tensor]] = {}  # by id; the tensor is kept alive
        self.uses: dict[int, int] = {}
        self.reads: list[tuple[nn.BatchNorm2d, int]] = []
        self.hooks = []
        for module in graph.modules():
            if type(module) in FOLDABLE:
                self.hooks.append(module.register_forward_hook(self._after_conv))
            elif type(module) in NORMS:
                self.hooks.append(module.register_forward_pre_hook(self._before_norm))

    def _after_conv(self, conv: Any, _inputs: tuple[Any, ...], out: Tensor) -> None:
        self.written[id(out)] = (conv, out)

    def _before_norm(self, norm: Any, inputs: tuple[Any, ...]) -> None:
        self.reads.append((norm, id(inputs[0])))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors(out)):  # sizes and dtypes are no use of the values
            self.count((args, kwargs))
        return out

    def count(self, used: object) -> None:
        """Add one use of every tensor inside."""
        for tensor in _tensors(used):
            if id(tensor) in self.written:
                self.uses[id(tensor)] = self.uses.get(id(tensor), 0) + 1

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def pairs(self) -> Iterator[tuple[Conv, nn.BatchNorm2d]]:
        """Convolutions and the BatchNorm that is all that each of them feeds."""
        followers: dict[Conv, set[nn.BatchNorm2d | None]] = {}
        sources: dict[nn.BatchNorm2d, set[Conv | None]] = {}
        readers = {at: norm for norm, at in self.reads}
        for norm, at in self.reads:
            sources.setdefault(norm, set()).add(self.written[at][0] if at in self.written else None)
        for at, (conv, _) in self.written.items():
            alone = self.uses.get(at, 0) == 1
            followers.setdefault(conv, set()).add(readers.get(at) if alone else None)
        for conv, norms in followers.items():
            follower = next(iter(norms))
            if len(norms) == 1 and follower is not None and sources[follower] == {conv}:
                grouped = isinstance(conv, nn.ConvTranspose2d) and conv.groups > 1
                if _has_constants(follower) and not grouped:
                    yield conv, follower


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _has_constants(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _fold(conv: Conv, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * gain
    # Output channels: axis 1 of a transposed convolution.
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    dtype = conv.weight.dtype
    weight = (conv.weight.double() * gain.view(shape)).to(dtype)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def _replace(graph: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(graph.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def narrow(method: Method, dtype: torch.dtype) -> None:
    """Cast the weights of all products but those in ``float32_parts``, in place.

    These, normalisation and every other module without children then cast what they read to the
    dtype of their own parameters: products get ``dtype``, the rest float32. Buffers, such as the
    matrices of the map head, are left alone.
    """
    kept = {m for part in method.float32_parts for m in method.get_submodule(part).modules()}
    for module in method.modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if isinstance(module, PRODUCTS) and module not in kept:
            module.to(dtype)
        # Modules with children may combine several layers, each of which casts for itself.
        is_leaf = next(module.children(), None) is None
        if is_leaf or isinstance(module, PRODUCTS + NORMALISATIONS):
            module.register_forward_pre_hook(_match)


def _match(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a module reads, in the dtype of its first parameter."""
    dtype = next(module.parameters()).dtype
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


def use_channels_last(graph: nn.Module) -> None:
    """Store the weights of 2-D convolutions channels-last; the image arrives in that order.

    Only those: tables that happen to have four axes must stay contiguous.
    """
    for module in graph.modules():
        if isinstance(module, CONVS_2D):
            module.to(memory_format=torch.channels_last)
