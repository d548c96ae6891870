"""Training data on its way into a method: images from disk, or frozen features computed once.

Published recipes do not augment, so a frozen backbone sees the same pixels in every epoch. The
cache holds its output in memory, or in a memory-mapped file where memory is short.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastad.atomic import unwritable
from fastad.models.registry import Features, Method
from fastad.training.folder import Sample, load_images

CACHE_BATCH = 16  # images per backbone call while filling the cache
MEMORY_SHARE = 0.4  # of the memory that is free; beyond it the cache goes to a file

Progress = Callable[[int, int], None]  # done, total


def normalised(images: np.ndarray, method: Method) -> Tensor:
    """uint8 RGB [B, H, W, 3] to float32 [B, 3, H, W] with the method's mean and std."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255.0)
    mean = torch.tensor(method.input.mean).view(3, 1, 1)
    std = torch.tensor(method.input.std).view(3, 1, 1)
    return (x - mean) / std


class ImageData(Dataset[Tensor]):
    """Images read from disk whenever they are asked for; batches are float32 [B, 3, H, W]."""

    def __init__(self, samples: Sequence[Sample], method: Method) -> None:
        self.samples = list(samples)
        self.method = method

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """One batch."""
        chosen = [self.samples[i] for i in indices]
        spec = self.method.input
        images = np.concatenate(
            [batch for batch, _ in load_images(chosen, spec.size, spec.value_range)]
        )
        return normalised(images, self.method)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.__getitems__(list(range(start, min(start + size, len(self)))))


class FeatureData(Dataset[Features]):
    """Frozen features of all images, computed once; owns the memory-mapped file if there is one."""

    def __init__(self, levels: Features, file: Path | None) -> None:
        self.levels = levels
        self.file = file

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitems__(self, indices: list[int]) -> Features:
        """One batch, a tensor per level."""
        return tuple(level[indices] for level in self.levels)

    def close(self) -> None:
        """Drop the features and delete the file behind them."""
        self.levels = ()
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, as far as this system tells."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30  # a system that tells nothing: assume a small one


@torch.no_grad()
def cache_features(
    samples: Sequence[Sample],
    method: Method,
    where: Literal["auto", "memory", "file"],
    folder: Path,
    progress: Progress | None = None,
) -> FeatureData:
    """Run the frozen part of ``method`` over all samples once.

    Args:
        samples: Normal training images.
        method: Its ``features`` must be frozen and free of randomness.
        where: ``auto`` keeps features in memory while they fit `MEMORY_SHARE` of what is free.
        folder: Gets the memory-mapped file, which `FeatureData.close` deletes.
        progress: Called with (images done, images in all).

    Raises:
        InputError: an image cannot be read.
        EngineError: the disk has no room for the file.
    """
    method.eval()
    data = ImageData(samples, method)
    N = len(samples)
    levels: list[Tensor] = []
    file: Path | None = None
    try:
        for start in range(0, N, CACHE_BATCH):
            indices = list(range(start, min(start + CACHE_BATCH, N)))
            features = method.features(data.__getitems__(indices))
            if not levels:
                levels, file = _allocate(N, features, where, folder)
            for level, feature in zip(levels, features, strict=True):
                level[start : start + len(indices)] = feature
            if progress:
                progress(indices[-1] + 1, N)
    except BaseException:
        if file is not None:
            file.unlink(missing_ok=True)
        raise
    return FeatureData(tuple(levels), file)


def _allocate(N: int, like: Features, where: str, folder: Path) -> tuple[list[Tensor], Path | None]:
    shapes = [(N, *feature.shape[1:]) for feature in like]
    values = sum(int(np.prod(shape)) for shape in shapes)
    if where == "memory" or (where == "auto" and values * 4 < MEMORY_SHARE * free_memory_bytes()):
        return [torch.empty(shape) for shape in shapes], None
    file = _reserve(folder, values * 4)
    flat = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(values,)))
    levels, at = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        levels.append(flat[at : at + count].view(shape))
        at += count
    return levels, file


def _reserve(folder: Path, size_bytes: int) -> Path:
    """A file with all its blocks: writing into a hole of a mapped file kills on a full disk."""
    name: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="features.", suffix=".bin")
        try:
            os.posix_fallocate(handle, 0, size_bytes)
        finally:
            os.close(handle)
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise unwritable(f"{folder}: feature cache of {size_bytes / 1e9:.1f} GB", error) from error
    return Path(name)


class EpochSampler(Sampler[int]):
    """Permutations that depend on seed and epoch alone, so a resumed run repeats them.

    An epoch is ``visits`` permutations of the ``n`` images.
    """

    def __init__(self, n: int, seed: int, first_epoch: int = 0, visits: int = 1) -> None:
        self.n, self.seed, self.visits = n, seed, visits
        self.epoch = self.first_epoch = first_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this before each epoch, counting from 0."""
        self.epoch = self.first_epoch + epoch

    def __len__(self) -> int:
        return self.n * self.visits

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        for _ in range(self.visits):
            yield from torch.randperm(self.n, generator=generator).tolist()


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch: the same whether the run came here at once or was resumed."""
    return (seed * 1_000_003 + epoch) % (1 << 31)
