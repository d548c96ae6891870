"""Images and labels on disk: which layout a folder has, and what each file in it means.

Needs no torch. Pixels come through `fastad.images` and `fastad.preprocess`, as in the predictor.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastad.errors import InputError
from fastad.images import (
    IMAGE_SUFFIXES,
    image_size,
    list_images,
    natural_key,
    read_image,
    read_levels,
)
from fastad.levels import ValueRange, check_value_range
from fastad.preprocess import Frame, to_batch

Layout = Literal["mvtec", "category", "plain", "visa"]

_MVTEC = """
  <category>/
    train/good/              normal images, required
    test/good/               normal images
    test/<defect>/           anomalous images
    ground_truth/<defect>/   masks, <image>_mask.png or <image>.png
with ok/ for good/ as well, as in BTAD"""
_LAYOUTS = f"""expected one of
  <root>/<category>/...      one or more categories, each as below
  <root>/                    itself one category, as below
  <root>/*.png               normal images only
  <root>/good/*.png          normal images, with bad/ and masks/ if there are any
  <root>/split_csv/1cls.csv  VisA as published
where a category is{_MVTEC}"""


@dataclass(frozen=True)
class Sample:
    """One image file and what is known about it."""

    path: Path
    category: str
    is_anomalous: bool
    defect: str = ""  # name of the defect's folder, "" for normal images
    mask_path: Path | None = None  # None: normal, or only image-level metrics are possible


@dataclass(frozen=True)
class ImageFolder:
    """What `scan` found. ``train`` holds normal images only."""

    root: Path
    layout: Layout  # many categories, one category, or normal images without a split
    categories: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def scan(
    root: str | os.PathLike[str],
    categories: Sequence[str] | None = None,
    mask_folder: str = "ground_truth",
) -> ImageFolder:
    """Recognise the layout of an image folder and label every image in it.

    Recognised are the MVTec AD layout (a folder of categories or one category) and plain folders of
    normal images, in ``root`` or ``root/good``, with optional anomalous images in ``root/bad`` and
    their masks in ``root/masks``, and VisA with its table of splits. Suffixes count in any case,
    hidden entries are left out, files are in natural order, links are followed. Other entries of
    ``root`` are ignored as soon as it has category folders. Files are listed and not opened.

    Args:
        root: The folder.
        categories: Categories to use, in this order; all of them, in natural order, when None.
            Folders that are not used are not checked.
        mask_folder: Folder of the masks inside a category, for sets that offer a second one.

    Raises:
        InputError: a folder is missing, empty or a file; a category is unknown or has no normal
            training images; ``train`` holds anything but ``good``; images have no label; masks
            match no image. The message names the path and shows the expected layout.
    """
    root = Path(root)
    _check_folder(root)
    if (root / "split_csv/1cls.csv").is_file():
        # Imported here: that module builds on this one.
        from fastad.training.visa import scan_visa

        if mask_folder != "ground_truth":
            raise InputError(f"mask_folder: {root} is VisA, its table names the masks")
        return scan_visa(root, categories)
    # Path.resolve would name the target of a link, not what the user called it.
    name = Path(os.path.abspath(root)).name  # noqa: PTH100
    layout: Layout
    if _has_split(root):
        layout, folders = "category", {name: root}
    elif (root / "good").is_dir():
        layout, folders = "plain", {name: root}
    elif folders := {folder.name: folder for folder in _subfolders(root) if _is_category(folder)}:
        layout = "mvtec"
    elif list_images(root):
        layout, folders = "plain", {name: root}
    else:
        raise InputError(f"{root}: no images found, there is {_content(root)}; {_LAYOUTS}")
    names = check_categories(root, tuple(folders), categories)
    if mask_folder != "ground_truth" and not any(
        (folders[category] / mask_folder).is_dir() for category in names
    ):
        raise InputError(f"mask_folder: no category of {root} has a folder {mask_folder!r}")
    train: list[Sample] = []
    test: list[Sample] = []
    for category in names:
        folder = folders[category]
        read = _mvtec_category if _has_split(folder) else _plain_category
        normal, labelled = read(folder, category, mask_folder)
        train += normal
        test += labelled
    return ImageFolder(root, layout, names, tuple(train), tuple(test))


def check_categories(
    root: Path, present: Sequence[str], categories: Sequence[str] | None
) -> tuple[str, ...]:
    """The chosen categories, each once; all that are present when None.

    Raises:
        InputError: none was chosen, or one that is not present.
    """
    if categories is None:
        return tuple(present)
    chosen = (categories,) if isinstance(categories, str) else tuple(dict.fromkeys(categories))
    if not chosen:
        raise InputError("categories: expected at least one name or None for all, got none")
    for category in chosen:
        if category not in present:
            near = difflib.get_close_matches(category, present, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InputError(
                f"categories: {root} has no category {category!r}{hint} It has {', '.join(present)}"
            )
    return chosen


def split_holdout(
    samples: Sequence[Sample],
    fraction: float,  # share to hold out, in [0, 1)
    seed: int,
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split samples into (fit, holdout), each category by itself, in the order they came.

    The choice depends on the seed and on the paths below the folder that a category's samples
    share, so that a copy of the data elsewhere, on any system, is split alike. Each category holds
    out ``fraction`` of its samples, rounded, at least one and never all; nothing at 0.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"fraction: expected a share in [0, 1), got {fraction}")
    held: set[int] = set()
    for category in dict.fromkeys(sample.category for sample in samples):
        members = [i for i, sample in enumerate(samples) if sample.category == category]
        base = os.path.commonpath([samples[i].path.parent for i in members])
        ranked = sorted(members, key=lambda i: _digest(samples[i].path, base, seed))
        count = max(1, math.floor(fraction * len(members) + 0.5)) if fraction else 0
        held.update(ranked[: min(count, len(members) - 1)])
    fit = tuple(sample for i, sample in enumerate(samples) if i not in held)
    return fit, tuple(samples[i] for i in sorted(held))


def read_mask(
    sample: Sample,
    size: tuple[int, int] | None = None,  # (H, W); that of the image when None
) -> NDArray[np.bool_]:
    """Ground truth of one sample: bool [H, W], True where the mask file is not black.

    A normal sample is False everywhere. Resized by Pillow's nearest rule: output pixel i takes
    input pixel ``floor((i + 0.5) * scale)``.

    Raises:
        InputError: an anomalous sample has no mask, the mask cannot be read, or its size is not
            that of the image.
    """
    image_hw = image_size(sample.path)
    if sample.mask_path is None:
        if sample.is_anomalous:
            raise InputError(
                f"{sample.path}: anomalous, without a mask; image-level metrics work without masks"
            )
        return np.zeros(size or image_hw, np.bool_)
    levels = read_levels(sample.mask_path)
    mask = np.atleast_3d(levels).any(axis=2)
    if mask.shape != image_hw:
        raise InputError(
            f"{sample.mask_path}: mask of {list(mask.shape)} (H, W) for an image of "
            f"{list(image_hw)}: {sample.path}; a mask has the size of its image"
        )
    if size is None or size == mask.shape:
        return mask
    resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.array(resized, np.bool_)


def load_images(
    samples: Sequence[Sample],
    size: tuple[int, int],
    value_range: ValueRange | None = None,
    *,
    batch_size: int = 32,
) -> Iterator[tuple[NDArray[np.uint8], list[Sample]]]:
    """Read samples in order, batch by batch, at model size; arguments are checked at once.

    Each batch is a new array; beside it, memory holds one image.

    Args:
        samples: What to read.
        size: (H, W) of the model.
        value_range: Grey levels (low, high) that become 0 and 255, for files of more than 8 bits.
        batch_size: Images in a batch; the last batch may hold fewer.

    Returns:
        Iterator over (uint8 RGB [B, H, W, 3], its B samples).

    Raises:
        InputError: an argument is out of range; later, a file is unreadable.
    """
    if batch_size < 1 or len(size) != 2 or min(size) < 1:
        raise InputError(
            f"expected batch_size and size (H, W) of at least 1, got {batch_size} and {size}"
        )
    check_value_range(value_range)
    return _batches(samples, size, value_range, batch_size)


def _batches(
    samples: Sequence[Sample],
    size: tuple[int, int],
    value_range: ValueRange | None,
    batch_size: int,
) -> Iterator[tuple[NDArray[np.uint8], list[Sample]]]:
    for start in range(0, len(samples), batch_size):
        chosen = list(samples[start : start + batch_size])
        batch = np.empty((len(chosen), *size, 3), np.uint8)
        for i, sample in enumerate(chosen):
            # One by one, because a batch of full-size photographs can exceed the memory.
            frame = Frame(read_image(sample.path, value_range), path=sample.path)
            to_batch([frame], size, batch[i : i + 1])
        yield batch, chosen


def _mvtec_category(
    folder: Path, category: str, mask_folder: str
) -> tuple[list[Sample], list[Sample]]:
    """Train and test samples of ``train/good``, ``test/*`` and the mask folder."""
    train, test = folder / "train", folder / "test"
    _check_folder(train)
    normal_name = "ok" if not (train / "good").is_dir() and (train / "ok").is_dir() else "good"
    others = [entry.name for entry in _subfolders(train) if entry.name != normal_name]
    stray = [image.name for image in list_images(train)]
    if others or stray:
        raise InputError(
            f"{train}: holds {_first(others + stray)} beside {normal_name}/, and training uses "
            f"normal images only; move defects to test/. Expected{_MVTEC}"
        )
    normal = _normal_images(train / normal_name, category)
    labelled: list[Sample] = []
    if test.exists():
        _check_folder(test)
        if stray := [image.name for image in list_images(test)]:
            raise InputError(f"{test}: {_first(stray)} have no label. Expected{_MVTEC}")
        for entry in _subfolders(test):
            # On some systems Good and good are one folder; a defect it is on none.
            if entry.name.casefold() in ("good", normal_name):
                labelled += [Sample(path, category, False) for path in list_images(entry)]
            else:
                labelled += _anomalous_images(entry, category, folder / mask_folder / entry.name)
    return normal, labelled


def _plain_category(
    folder: Path, category: str, mask_folder: str
) -> tuple[list[Sample], list[Sample]]:
    """Train and test samples of ``good`` or the folder itself, ``bad`` and ``masks``."""
    good, bad = folder / "good", folder / "bad"
    if good.is_dir() and (stray := [image.name for image in list_images(folder)]):
        raise InputError(f"{folder}: {_first(stray)} lie beside good/; move them in or away")
    normal = _normal_images(good if good.is_dir() else folder, category)
    if not bad.exists():
        return normal, []
    _check_folder(bad)
    masks = folder / ("masks" if mask_folder == "ground_truth" else mask_folder)
    labelled = _anomalous_images(bad, category, masks)
    if not labelled:
        raise InputError(f"{bad}: no images here, there is {_content(bad)}; {_LAYOUTS}")
    return normal, labelled


def _normal_images(folder: Path, category: str) -> list[Sample]:
    _check_folder(folder)
    images = list_images(folder)
    if not images:
        raise InputError(
            f"{folder}: category {category!r} has no normal images to train on, there is "
            f"{_content(folder)}; accepted are {', '.join(IMAGE_SUFFIXES)}. Expected{_MVTEC}"
        )
    return [Sample(path, category, False) for path in images]


def _anomalous_images(folder: Path, category: str, masks: Path) -> list[Sample]:
    images = list_images(folder)
    by_stem = {path.stem: path for path in list_images(masks)} if masks.is_dir() else {}
    samples = []
    for path in images:
        mask = by_stem.get(f"{path.stem}_mask", by_stem.get(path.stem))
        samples.append(Sample(path, category, True, folder.name, mask))
    if images and by_stem and not any(sample.mask_path for sample in samples):
        raise InputError(
            f"{masks}: none of its {len(by_stem)} masks is named after an image of {folder}; "
            f"expected {images[0].stem}_mask.png or {images[0].stem}.png"
        )
    return samples


def _has_split(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _is_category(folder: Path) -> bool:
    return _has_split(folder) or (folder / "good").is_dir()


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        got = "a file" if path.exists() else "missing"
        raise InputError(f"{path}: expected a folder, it is {got}; {_LAYOUTS}")


def _subfolders(folder: Path) -> list[Path]:
    found = (e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    return sorted(found, key=natural_key)


def _content(folder: Path) -> str:
    names = [entry.name + "/" * entry.is_dir() for entry in folder.iterdir()]
    return _first(sorted(name for name in names if not name.startswith(".")))


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown or "nothing"


def _digest(path: Path, base: str, seed: int) -> bytes:
    # Unicode form and separator differ between file systems, the file does not.
    relative = unicodedata.normalize("NFC", path.relative_to(base).as_posix())
    return hashlib.sha256(f"{seed}:{relative}".encode(errors="surrogateescape")).digest()
