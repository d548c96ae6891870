"""Tiny data sets in the formats and trees of their publishers."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RNG = np.random.default_rng(0)
CIFAR_IMAGES = RNG.integers(0, 256, (60, 32, 32, 3), np.uint8)  # six batches of ten
CIFAR_LABELS = np.stack([RNG.permutation(10) for _ in range(6)]).astype(np.uint8)
IDX_IMAGES = RNG.integers(0, 256, (30, 28, 28), np.uint8)  # 20 to train, 10 to test
IDX_LABELS = np.tile(np.arange(10, dtype=np.uint8), 3)
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def old_string(text: bytes) -> bytes:
    """A Python 2 string, as cPickle wrote it."""
    if len(text) < 256:
        return b"U" + bytes([len(text)]) + text
    return b"T" + struct.pack("<i", len(text)) + text


def old_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def pickled_batch(pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> bytes:
    """What Python 2's cPickle, protocol 2, made of {batch_label, labels, data, filenames}."""
    n = len(labels)
    # The type's state: version, byte order, five empty fields, flags.
    dtype = b"cnumpy\ndtype\n(" + old_string(b"u1") + old_int(0) + old_int(1) + b"tR"
    dtype += b"(" + old_int(3) + old_string(b"|") + b"NNN" + old_int(-1) * 2 + old_int(0) + b"tb"
    empty = b"cnumpy\nndarray\n(" + old_int(0) + b"t" + old_string(b"b")
    array = b"cnumpy.core.multiarray\n_reconstruct\n(" + empty + b"tR"
    array += b"(" + old_int(1) + b"(" + old_int(n) + old_int(3072) + b"t" + dtype + b"\x89"
    array += old_string(pixels.tobytes()) + b"tb"
    label_list = b"](" + b"".join(old_int(int(label)) for label in labels) + b"e"
    names = b"](" + b"".join(old_string(b"leptodactylus_%d.png" % i) for i in range(n)) + b"e"
    items = {
        b"batch_label": old_string(b"training batch 1 of 5"),
        b"labels": label_list,
        b"data": array,
        b"filenames": names,
    }
    body = b"".join(old_string(key) + value for key, value in items.items())
    return b"\x80\x02}(" + body + b"u."


def binary_batch(pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> bytes:
    return np.hstack([labels[:, None], pixels]).tobytes()


def batch_contents(write: Callable[..., bytes], suffix: str) -> dict[str, bytes]:
    planes = CIFAR_IMAGES.transpose(0, 3, 1, 2).reshape(6, 10, 3072)
    return {f"{name}{suffix}": write(planes[i], CIFAR_LABELS[i]) for i, name in enumerate(BATCHES)}


def save_cifar(root: Path, form: str) -> Path:
    is_python = form.startswith("python")
    write, suffix = (pickled_batch, "") if is_python else (binary_batch, ".bin")
    folder = f"cifar-10-batches-{'py' if is_python else 'bin'}"
    contents = batch_contents(write, suffix)
    root.mkdir(parents=True, exist_ok=True)
    if form.endswith("archive"):
        name = f"cifar-10-{'python' if is_python else 'binary'}.tar.gz"
        with tarfile.open(root / name, "w:gz") as archive:
            # The published archive is not in the order of the batches either.
            for file, content in sorted({**contents, "readme.html": b"-"}.items(), reverse=True):
                info = tarfile.TarInfo(f"{folder}/{file}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return root
    (root / folder).mkdir()
    for file, content in contents.items():
        (root / folder / file).write_bytes(content)
    return root


def idx(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + (
        values.tobytes()
    )


def save_idx(root: Path, is_gz: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    contents = {
        "train-images-idx3-ubyte": idx(IDX_IMAGES[:20]),
        "train-labels-idx1-ubyte": idx(IDX_LABELS[:20]),
        "t10k-images-idx3-ubyte": idx(IDX_IMAGES[20:]),
        "t10k-labels-idx1-ubyte": idx(IDX_LABELS[20:]),
    }
    for name, content in contents.items():
        if is_gz:
            (root / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (root / name).write_bytes(content)
    return root


def save(path: Path, mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((6, 8), np.uint8)
    if mask:
        pixels[1:3, 2:5] = 2  # VisA numbers the kinds of defects
    Image.fromarray(pixels).save(path)


def save_visa(root: Path) -> Path:
    lines = ["object,split,label,image,mask"]
    for name in ("pcb1", "candle"):
        for i in range(3):
            image = f"{name}/Data/Images/Normal/{i:04d}.JPG"
            lines.append(f"{name},{'test' if i == 2 else 'train'},normal,{image},")
            save(root / image)
        image, mask = (
            f"{name}/Data/{kind}" for kind in ("Images/Anomaly/000.JPG", "Masks/Anomaly/000.png")
        )
        lines.append(f"{name},test,anomaly,{image},{mask}")
        save(root / image)
        save(root / mask, mask=True)
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


def save_btad(root: Path) -> Path:
    for name, suffix in (("01", "bmp"), ("02", "png"), ("03", "bmp")):
        for i in range(3):
            save(root / name / f"train/ok/{i:04d}.{suffix}")
        save(root / name / f"test/ok/0000.{suffix}")
        for i in range(2):
            save(root / name / f"test/ko/{i:04d}.{suffix}")
            save(root / name / f"ground_truth/ko/{i:04d}.png", mask=True)
    return root


def save_mvtec(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name / "train/good/000.png")
        save(root / name / "test/good/000.png")
        save(root / name / "test/broken/000.png")
        save(root / name / "ground_truth/broken/000_mask.png", mask=True)
    return root
