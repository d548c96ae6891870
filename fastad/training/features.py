"""Training data on its way into a method: images from disk, or frozen features computed once.

Published recipes do not augment, so a frozen backbone sees the same pixels in every epoch. The
cache holds its output in memory, or in a memory-mapped file where memory is short.
"""

from __future__ import annotations

import itertools
import json
import math
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
from fastad.training.processes import Processes

CACHE_BATCH = 16  # images per backbone call while filling the cache
_ZEROS = bytes(1 << 20)
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


CGROUP = Path("/sys/fs/cgroup")  # where a container finds the limits that it runs under


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, as far as this system and its container tell."""
    free = _system_free_bytes()
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # not version 2, or "max": no limit
        return free
    return min(free, max(limit - used + _cached_files_bytes(), 0))


def _cached_files_bytes() -> int:
    """What of a container's used memory holds files that nobody reads: it is given back on need."""
    try:
        rows = (CGROUP / "memory.stat").read_text().splitlines()
        return int(dict(row.split() for row in rows)["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def _system_free_bytes() -> int:
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
    group: Processes | None = None,
) -> FeatureData:
    """Run the frozen part of ``method`` over all samples once, on the GPU if there is one.

    Several processes share one memory-mapped file, wherever one would keep the features: each
    computes its part of the images, and the system's page cache holds them once for all.

    Args:
        samples: Normal training images.
        method: Its ``features`` must be frozen and free of randomness; it ends on the CPU.
        where: ``auto`` keeps features in memory while they fit `MEMORY_SHARE` of what is free.
        folder: Gets the memory-mapped file, which `FeatureData.close` deletes.
        progress: Called with (images done, images in all).
        group: The processes that call this together; this one alone if not given.

    Raises:
        InputError: an image cannot be read.
        EngineError: the disk has no room for the file.
    """
    group = group or Processes()
    method.eval().to(group.device)
    data = ImageData(samples, method)
    N = len(samples)

    def block(start: int) -> Features:
        images = data.__getitems__(list(range(start, min(start + CACHE_BATCH, N))))
        return method.features(images.to(group.device))

    file: Path | None = None
    try:
        plan = json.loads(group.first(lambda: _plan(N, block(0), where, folder, group.size)))
        if group.rank == 0 and plan["file"]:  # whoever made it deletes it
            file = Path(plan["file"])
        levels = _mapped(plan["shapes"], plan["file"])
        # The same blocks whoever computes them: their size decides how a backbone rounds.
        for start in range(group.rank * CACHE_BATCH, N, CACHE_BATCH * group.size):
            for level, feature in zip(levels, block(start), strict=True):
                level[start : start + len(feature)] = feature.cpu()
            if progress:
                progress(min(start + CACHE_BATCH * group.size, N), N)
        group.sum(torch.zeros(1))  # all parts are there
    except BaseException:
        if file is not None:
            file.unlink(missing_ok=True)
        raise
    finally:
        method.cpu()
    return FeatureData(levels, file)


def _plan(N: int, like: Features, where: str, folder: Path, processes: int) -> str:
    """Shapes of all levels and the file reserved for them, "" for memory; JSON."""
    shapes = [(N, *feature.shape[1:]) for feature in like]
    size_bytes = 4 * sum(math.prod(shape) for shape in shapes)
    fits = where == "memory" or (
        where == "auto" and size_bytes < MEMORY_SHARE * free_memory_bytes()
    )
    file = "" if fits and processes == 1 else str(_reserve(folder, size_bytes).resolve())
    return json.dumps({"shapes": shapes, "file": file})


def _mapped(shapes: list[list[int]], file: str) -> Features:
    """Tensors of these shapes one behind the other in ``file``, or in memory without one."""
    counts = [math.prod(shape) for shape in shapes]
    if not file:
        return tuple(torch.empty(shape) for shape in shapes)
    flat = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(sum(counts),)))
    parts = torch.split(flat, counts)
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _reserve(folder: Path, size_bytes: int) -> Path:
    """A file with all its blocks: writing into a hole of a mapped file kills on a full disk."""
    name: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="features.", suffix=".bin")
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size_bytes)
            else:  # Windows, macOS
                for start in range(0, size_bytes, len(_ZEROS)):
                    os.write(handle, _ZEROS[: size_bytes - start])
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


class BatchParts(Sampler[list[int]]):
    """This process's part of each batch, where ``batch`` counts the images of all processes.

    The batches are the same for every number of processes. A last batch that is not divisible
    leaves parts of different size, and one smaller than ``size`` leaves some without an image:
    they repeat one, with weight 0.

    Args:
        sampler: The order of the images; each process iterates over all of it.
        batch: Images per optimiser step, a multiple of ``size``.
        rank: Which part.
        size: How many parts.
    """

    def __init__(self, sampler: EpochSampler, batch: int, rank: int = 0, size: int = 1) -> None:
        self.sampler = sampler  # Lightning looks for `set_epoch` here
        self.batch, self.rank, self.size = batch, rank, size

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        while whole := list(itertools.islice(order, self.batch)):
            yield whole[self.rank :: self.size] or whole[:1]

    def weight(self, step: int) -> float:
        """What this part's mean loss counts, so that the mean over processes is the batch's."""
        images = min(self.batch, len(self.sampler) - step * self.batch)
        return len(range(self.rank, images, self.size)) * self.size / images


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch: the same whether the run came here at once or was resumed."""
    return (seed * 1_000_003 + epoch) % (1 << 31)
