"""CIFAR-10, MNIST and Fashion-MNIST as folders of images, split by a protocol."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastad.atomic import unwritable
from fastad.errors import FastadWarning, InputError
from fastad.training.cifar import CLASSES, COUNTS, ClassSet, read_class_set
from fastad.training.protocols import RECORD, ClassProtocol, find_protocol, read_record

Progress = Callable[[str, int, int], None]  # stage, done, total


def materialise(
    name: str,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    size_px: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the images of a class protocol as folders that train, calibrate and evaluate read.

    Each split becomes ``out/<split>/<split>`` in MVTec AD's layout: train and evaluate on
    ``out/<split>``, one model each (``out`` itself is no data set, so that the splits are never
    mixed). An image is stored once, lossless; other splits link to it. All of
    `cifar10-unified` takes 60,000 files of together about 2 GB. The folder appears when it is
    complete; one that was made before from the same files is left as it is.

    Args:
        name: A protocol of classes, such as ``cifar10-unified``.
        root: Folder of the original files, or CIFAR-10's archive.
        out: Folder to make.
        splits: Which; None takes all.
        size_px: Side of the square images; that of the protocol when None.
        progress: Called with stage, images done and images in all.

    Returns:
        ``out``.

    Warns:
        FastadWarning: the files hold another number of images than published.

    Raises:
        InputError: original files are missing or damaged, the protocol needs no preparation, or
            ``out`` holds something else.
        EngineError: ``out`` cannot be written.
    """
    protocol, root, out = find_protocol(name), Path(root), Path(out)
    if out.name in ("", ".."):  # it is renamed into place, which such a name cannot be
        raise InputError(f"out: expected the name of a folder to make, got {out}; pass {out}/NAME")
    classes = protocol.classes
    if classes is None:
        raise InputError(f"{name}: needs no preparation, pass {root} itself to train and evaluate")
    chosen = protocol.rows if splits is None else tuple(dict.fromkeys(splits))
    if not chosen or any(split not in protocol.rows for split in chosen):
        raise InputError(
            f"splits: expected some of {', '.join(protocol.rows)}, got "
            f"{', '.join(chosen) or 'none'}"
        )
    size_px = classes.size_px if size_px is None else size_px
    if not 1 <= size_px <= 4096:
        raise InputError(f"size_px: expected 1 to 4096, got {size_px}")
    if out.exists() and not (out / RECORD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder")
    found = read_class_set(classes.data, root)
    counts = (len(found.train.labels), len(found.test.labels))
    if counts != COUNTS[classes.data]:
        warnings.warn(
            f"{root}: holds {counts} training and test images, {classes.data} as published "
            f"{COUNTS[classes.data]}; figures do not compare",
            FastadWarning,
            stacklevel=2,
        )
    record: dict[str, Any] = {
        "protocol": name,
        "size_px": size_px,
        "splits": {split: _counts(found, classes.normal[split]) for split in chosen},
        "sources": {file.name: _sha256(file) for file in found.files},
    }
    if (out / RECORD).is_file():
        _check_same(out, read_record(out), record)
        return out
    try:
        _write(out, found, classes, record, progress)
    except OSError as error:
        raise unwritable(out, error) from error
    return out


def _counts(found: ClassSet, normal: tuple[int, ...]) -> list[int]:
    train = sum(int(label) in normal for label in found.train.labels)
    test = sum(int(label) in normal for label in found.test.labels)
    return [train, test, len(found.test.labels) - test]


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_same(out: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Splits may be there that were not asked for; all else has to agree."""
    for key, value in record.items():
        have = before.get(key)
        if key == "splits" and isinstance(have, dict):
            have = {split: have[split] for split in value if split in have}
        if have != value:
            raise InputError(
                f"{out}: was prepared before with another {key}; choose another --out, or remove it"
            )


def _write(
    out: Path,
    found: ClassSet,
    classes: ClassProtocol,
    record: dict[str, Any],
    progress: Progress | None,
) -> None:
    """All splits and the record, beside ``out`` first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    total = len(found.train.labels) + len(found.test.labels)
    try:
        for split in record["splits"]:
            (beside / split / split / "train" / "good").mkdir(parents=True)
            (beside / split / split / "test" / "good").mkdir(parents=True)
            for label, name in enumerate(CLASSES[classes.data]):
                if label not in classes.normal[split]:
                    (beside / split / split / "test" / name).mkdir()
        for done, (image, places) in enumerate(_images(found, classes, tuple(record["splits"])), 1):
            if places:
                first = beside / places[0]
                # Level 1: a third of the time of the default for a quarter more bytes.
                _resized(image, record["size_px"], classes).save(first, compress_level=1)
                for place in places[1:]:
                    _link(first, beside / place)
            if progress and (done % 100 == 0 or done == total):
                progress("prepare", done, total)
        (beside / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _images(
    found: ClassSet, classes: ClassProtocol, splits: tuple[str, ...]
) -> Iterator[tuple[NDArray[np.uint8], list[Path]]]:
    """Each image and where it goes; the number in its name is its place in the original files."""
    for part, data in (("train", found.train), ("test", found.test)):
        for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            name = CLASSES[classes.data][label]
            places = []
            for split in splits:
                is_normal = int(label) in classes.normal[split]
                if is_normal or part == "test":
                    folder = Path(split, split, part, "good" if is_normal else name)
                    places.append(folder / f"{name}_{index:05d}.png")
            yield image, places


def _resized(image: NDArray[np.uint8], size_px: int, classes: ClassProtocol) -> Image.Image:
    picture = Image.fromarray(image)
    if picture.size == (size_px, size_px):
        return picture
    return picture.resize((size_px, size_px), classes.resampling)


def _link(first: Path, place: Path) -> None:
    try:
        os.link(first, place)
    except OSError:  # a file system without links, or the limit of links to one file
        shutil.copyfile(first, place)
