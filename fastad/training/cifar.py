"""CIFAR-10, MNIST and Fashion-MNIST from the files their authors publish, read and never executed.

CIFAR-10 comes as the python version (pickled batches), as the binary version, or as either's
.tar.gz; MNIST and Fashion-MNIST as idx files, plain or .gz. Archives are read in place. Needs no
torch.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastad.errors import InputError

ClassSetName = Literal["cifar10", "mnist", "fashion-mnist"]

CLASSES: dict[ClassSetName, tuple[str, ...]] = {  # in the order of the labels 0..9
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "mnist": tuple(str(digit) for digit in range(10)),
    "fashion-mnist": (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle_boot",
    ),
}
SOURCES: dict[ClassSetName, str] = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "mnist": "http://yann.lecun.com/exdb/mnist/",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist",
}
COUNTS: dict[ClassSetName, tuple[int, int]] = {  # training and test images as published
    "cifar10": (50_000, 10_000),
    "mnist": (60_000, 10_000),
    "fashion-mnist": (60_000, 10_000),
}
_SIDE = 32  # of a CIFAR image
_PIXELS = 3 * _SIDE * _SIDE
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
# The largest published file holds 47 MB; more can only be something else.
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size with the index of their class, in the order of the files."""

    images: NDArray[np.uint8]  # [N, H, W] grey or [N, H, W, 3] RGB
    labels: NDArray[np.uint8]  # [N], 0..9


@dataclass(frozen=True)
class ClassSet:
    """Training and test images of ten classes, and the files they were read from."""

    train: LabelledImages
    test: LabelledImages
    files: tuple[Path, ...]


def read_class_set(name: ClassSetName, root: Path) -> ClassSet:
    """Read a data set from its original files in ``root``.

    Args:
        name: Which data set; MNIST and Fashion-MNIST have the same file names, so the folder
            decides between them.
        root: Folder of the files or of what they unpack to; for CIFAR-10 also an archive itself.

    Raises:
        InputError: files are missing (the message says what is expected where, and who publishes
            it), truncated, of another format, or would need foreign code to be read.
    """
    return _read_cifar10(root) if name == "cifar10" else _read_idx_set(name, root)


def _read_cifar10(root: Path) -> ClassSet:
    for path in (root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            files = [path / f"{batch}{suffix}" for batch in _BATCHES]
            if any(file.is_file() for file in files):
                _require("cifar10", files)
                parts = [_parse_batch(_content(file), str(file)) for file in files]
                return _cifar10(parts, tuple(files))
    archives = [root, root / "cifar-10-python.tar.gz", root / "cifar-10-binary.tar.gz"]
    for archive in archives:
        if archive.is_file():
            return _cifar10(_read_archive(archive), (archive,))
    raise _missing(
        "cifar10",
        f"{root}: expected cifar-10-batches-py/ (python version), cifar-10-batches-bin/ (binary "
        "version), or cifar-10-python.tar.gz or cifar-10-binary.tar.gz as they come",
    )


def _cifar10(parts: list[LabelledImages], files: tuple[Path, ...]) -> ClassSet:
    *train, test = parts
    images = np.concatenate([part.images for part in train])
    return ClassSet(
        LabelledImages(images, np.concatenate([part.labels for part in train])), test, files
    )


def _read_archive(path: Path) -> list[LabelledImages]:
    """The six batches inside a .tar.gz, in order; nothing is unpacked to disk."""
    found: dict[str, LabelledImages] = {}
    try:
        # Front to back: jumping in a compressed archive means unpacking it again.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                batch = Path(member.name).name.removesuffix(".bin")
                file = archive.extractfile(member) if batch in _BATCHES else None
                if file is not None:
                    name = f"{path}: {member.name}"
                    found[batch] = _parse_batch(_bounded(file, name), name)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: not readable as a .tar.gz archive ({error})") from error
    if absent := [batch for batch in _BATCHES if batch not in found]:
        raise _missing("cifar10", f"{path}: expected {', '.join(absent)} in the archive")
    return [found[batch] for batch in _BATCHES]


def _parse_batch(content: bytes, name: str) -> LabelledImages:
    # A binary batch opens with a label 0..9, a pickle of the published protocol with 0x80.
    if content[:1] == b"\x80":
        pixels, labels = _unpickle_batch(content, name)
    else:
        records, rest = divmod(len(content), 1 + _PIXELS)
        if rest or not records:
            raise InputError(
                f"{name}: expected records of {1 + _PIXELS} bytes, got {len(content)} bytes; the "
                "file is truncated or not a CIFAR-10 batch"
            )
        rows = np.frombuffer(content, np.uint8).reshape(records, 1 + _PIXELS)
        pixels, labels = rows[:, 1:], rows[:, 0]
    if labels.max() > 9:
        raise InputError(f"{name}: expected labels 0..9, got {labels.max()}; not CIFAR-10")
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)  # planes to pixels
    return LabelledImages(np.ascontiguousarray(images), labels.copy())


class _Array:
    """Stands in for numpy.ndarray while unpickling: keeps its state and calls nothing."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _DType:
    """Stands in for numpy.dtype: keeps the name of the type."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment mean nothing for single bytes."""


class _Unpickler(pickle.Unpickler):
    """Knows the three names that a CIFAR-10 batch needs, each as a stand-in."""

    _ADMITTED: dict[tuple[str, str], Callable[..., object]] = {  # noqa: RUF012 - never written to
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., object]:
        admitted = self._ADMITTED.get((module_name, global_name))
        if admitted is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return admitted


def _unpickle_batch(content: bytes, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(pixels [N, 3072], labels [N]) of a python-version batch."""

    def refuse(reason: str, error: Exception | None = None) -> NoReturn:
        raise InputError(
            f"{name}: not a batch of CIFAR-10's python version ({reason}); nothing in it was "
            f"executed. The published files are at {SOURCES['cifar10']}"
        ) from error

    try:
        for opcode, argument, _ in pickletools.genops(content):
            # Python's unpickler allocates up to the highest number that a value is stored under.
            if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                refuse(f"it stores a value under number {argument}")
        batch: Any = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except InputError:
        raise
    except Exception as error:  # broken pickles raise errors of any class
        refuse(str(error) or type(error).__name__, error)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        refuse("expected a dictionary with data and labels")
    labels, data = batch[b"labels"], batch[b"data"]
    if not isinstance(labels, list) or not all(type(v) is int and 0 <= v <= 255 for v in labels):
        refuse("expected labels as a list of class numbers")
    state = data.state if isinstance(data, _Array) else None
    if not isinstance(state, tuple) or len(state) != 5:
        refuse("expected data as an array")
    _, shape, dtype, is_fortran, pixels = state
    if not isinstance(dtype, _DType) or dtype.name != b"u1":
        refuse("expected pixels of uint8")
    if shape != (len(labels), _PIXELS) or not labels:
        refuse(f"expected {_PIXELS} values for each of {len(labels)} labels, got shape {shape}")
    if not isinstance(pixels, bytes) or len(pixels) != math.prod(shape):
        refuse(f"expected {math.prod(shape)} bytes of pixels; the file is truncated")
    order: Literal["C", "F"] = "F" if is_fortran else "C"
    return np.frombuffer(pixels, np.uint8).reshape(shape, order=order), np.array(labels, np.uint8)


def _read_idx_set(name: ClassSetName, root: Path) -> ClassSet:
    # A .gz is preferred: it is what is published, and its checksum finds damage.
    suffixes = ("-ubyte.gz", "-ubyte")
    files = [
        next((f for f in (root / f"{stem}{s}" for s in suffixes) if f.is_file()), root / stem)
        for stem in _IDX
    ]
    published = [root / f"{stem}{suffixes[0]}" for stem in _IDX]
    _require(name, [f if f.is_file() else p for f, p in zip(files, published, strict=True)])
    parts = [
        _labelled(_read_idx(images, 3), _read_idx(labels, 1), labels)
        for images, labels in (files[:2], files[2:])
    ]
    return ClassSet(parts[0], parts[1], tuple(files))


def _labelled(images: NDArray[np.uint8], labels: NDArray[np.uint8], path: Path) -> LabelledImages:
    if len(images) != len(labels):
        raise InputError(f"{path}: expected {len(images)} labels, one per image, got {len(labels)}")
    if labels.max() > 9:
        raise InputError(f"{path}: expected labels 0..9, got {labels.max()}")
    return LabelledImages(images, labels)


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: a magic number, ``rank`` sizes, then the values."""
    content = _content(path)
    magic = bytes((0, 0, 0x08, rank))  # 0x08: unsigned bytes
    start = len(magic) + 4 * rank
    if content[:4] != magic:
        raise InputError(
            f"{path}: expected an idx file of {rank}-D unsigned bytes ({magic.hex()}), it opens "
            f"with {content[:4].hex() or 'nothing'}"
        )
    if len(content) < start:
        raise InputError(f"{path}: truncated within the {start} bytes of its header")
    shape: tuple[int, ...] = struct.unpack(f">{rank}I", content[4:start])
    if not math.prod(shape):
        raise InputError(f"{path}: expected at least one value, its header promises {shape}")
    if len(content) - start != math.prod(shape):
        kind = "truncated" if len(content) - start < math.prod(shape) else "too long"
        raise InputError(
            f"{path}: {kind}, its header promises {shape}, that is {math.prod(shape)} bytes, and "
            f"{len(content) - start} follow"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _bounded(file, str(path))
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: truncated or not readable ({error})") from error


def _bounded(file: Any, name: str) -> bytes:
    content: bytes = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise InputError(f"{name}: more than {_MAX_BYTES} bytes; no published file is that large")
    return content


def _require(name: ClassSetName, files: list[Path]) -> None:
    if absent := [file for file in files if not file.is_file()]:
        names = ", ".join(file.name for file in absent)
        raise _missing(name, f"{absent[0].parent}: expected {names} here")


def _missing(name: ClassSetName, expected: str) -> InputError:
    return InputError(f"{expected}; fastad downloads nothing, the files come from {SOURCES[name]}")
