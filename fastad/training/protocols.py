"""Published protocols: which data, which split, which rows in which order.

`load_protocol` checks a data set and labels it. CIFAR-10, MNIST and Fashion-MNIST become folders of
images first (`fastad.training.materialise`); `fastad.protocol_table` prints results.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fastad.errors import FastadWarning, InputError
from fastad.training.cifar import CLASSES, SOURCES, ClassSetName
from fastad.training.folder import ImageFolder, scan

RECORD = "protocol.json"  # in the folder that `materialise` makes


@dataclass(frozen=True)
class ClassProtocol:
    """How ten classes become normal and anomalous: split by split, each with its own model."""

    data: ClassSetName
    normal: Mapping[str, tuple[int, ...]]  # labels of the normal classes of each split
    size_px: int  # side of the images that the method reads
    resampling: Image.Resampling


@dataclass(frozen=True)
class Protocol:
    """A published way to test; ``groups`` are the table's rows, with a mean below each group."""

    name: str
    title: str
    source: str  # who publishes the data
    expected: str  # what the root holds
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # empty: rows as evaluated
    metrics: tuple[str, ...] = ("image_auroc", "pixel_auroc", "aupro")
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    classes: ClassProtocol | None = None  # None: the data are folders already
    note: str = ""

    @property
    def rows(self) -> tuple[str, ...]:
        """All categories or splits, in the papers' order."""
        return tuple(row for group in self.groups.values() for row in group)


# Training, test normal, test anomalous images as published.
_MVTEC_COUNTS = {
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "leather": (245, 32, 92),
    "tile": (230, 33, 84),
    "wood": (247, 19, 60),
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "hazelnut": (391, 40, 70),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "zipper": (240, 32, 119),
}
_AUPRO = (
    "AUPRO over all test images of a category up to 30 % false positives; the figures of Reverse "
    "Distillation's authors average per image and do not compare"
)
_RAW_GREY = "; Reverse Distillation's authors do not normalise these images, fastad does"
_UNIFIED = {"01234": (0, 1, 2, 3, 4), "56789": (5, 6, 7, 8, 9)} | {
    "02468": (0, 2, 4, 6, 8),
    "13579": (1, 3, 5, 7, 9),
}


def _one_class(name: str, data: ClassSetName, title: str, note: str = "") -> Protocol:
    labels = {row: (label,) for label, row in enumerate(CLASSES[data])}
    return Protocol(
        name,
        f"{title}, one class normal, nine anomalous",
        SOURCES[data],
        f"a folder made by `fastad prepare {name}`",
        {"mean": CLASSES[data]},
        ("image_auroc",),
        # 32 x 32 as in Reverse Distillation's loader, which does not say how it resizes: bilinear
        # is the default of the library it uses.
        classes=ClassProtocol(data, labels, 32, Image.Resampling.BILINEAR),
        note=f"one model per class{note}",
    )


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "mvtec",
            "MVTec AD",
            "https://www.mvtec.com/company/research/datasets/mvtec-ad",
            "the folders bottle/, cable/, ... as unpacked",
            {"textures": tuple(_MVTEC_COUNTS)[:5], "objects": tuple(_MVTEC_COUNTS)[5:]},
            counts=_MVTEC_COUNTS,
            note=_AUPRO,
        ),
        Protocol(
            "visa",
            "VisA, one-class split",
            "https://github.com/amazon-science/spot-diff",
            "split_csv/1cls.csv and the folders candle/, capsules/, ... as unpacked",
            # The groups of the data set's own description.
            {
                "complex structure": ("pcb1", "pcb2", "pcb3", "pcb4"),
                "multiple instances": ("capsules", "candle", "macaroni1", "macaroni2"),
                "single instance": ("cashew", "chewinggum", "fryum", "pipe_fryum"),
            },
            note=_AUPRO,
        ),
        Protocol(
            "btad",
            "BTAD",
            "https://avires.dimi.uniud.it/papers/btad/btad.zip",
            "the folders 01/, 02/, 03/ as unpacked, each with train/ok, test/ok and test/ko",
            {"mean": ("01", "02", "03")},
            note=_AUPRO,
        ),
        Protocol(
            "folder",
            "own data",
            "your own images",
            "categories in MVTec AD's layout, or a plain folder",
        ),
        Protocol(
            "cifar10-unified",
            "CIFAR-10, five classes normal, five anomalous",
            SOURCES["cifar10"],
            "a folder made by `fastad prepare cifar10-unified`",
            {"mean": tuple(_UNIFIED)},
            ("image_auroc",),
            # UniAD enlarges to 224 x 224 with Lanczos.
            classes=ClassProtocol("cifar10", _UNIFIED, 224, Image.Resampling.LANCZOS),
            note="rows are the labels of the normal classes, one model per row",
        ),
        _one_class("cifar10-oneclass", "cifar10", "CIFAR-10"),
        _one_class("mnist-oneclass", "mnist", "MNIST", _RAW_GREY),
        _one_class("fashion-oneclass", "fashion-mnist", "Fashion-MNIST", _RAW_GREY),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}{hint}")
    return PROTOCOLS[name]


def load_protocol(
    name: str,
    root: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
) -> ImageFolder:
    """Training and test images of a protocol; its ``root`` is what `train` and `evaluate` take.

    Args:
        name: One of `PROTOCOLS`.
        root: The data set as unpacked, or the folder that `materialise` made (or one split of it).
        split: Categories to use; None takes all. Of a materialised folder exactly one split, since
            each has its own model: None where ``root`` is that split.

    Warns:
        FastadWarning: a category has other counts than the published data set.

    Raises:
        InputError: the data are missing (the message says what is expected where, and who
            publishes it), incomplete, or hold categories that the protocol does not know.
    """
    protocol, root = find_protocol(name), Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected {_expected(protocol)}")
    if protocol.classes:
        return _load_split(protocol, root, split)
    try:
        found = scan(root, split)
    except InputError as error:
        raise InputError(f"{error}\n{protocol.title}: expected {_expected(protocol)}") from error
    if unknown := [c for c in found.categories if protocol.groups and c not in protocol.rows]:
        raise InputError(
            f"{root}: {', '.join(unknown)} are no categories of {protocol.title}, expected "
            f"{_expected(protocol)}; protocol `folder` takes any categories"
        )
    for category in found.categories:
        _check_counts(protocol, found, category)
    return found


def _expected(protocol: Protocol) -> str:
    return (
        f"{protocol.expected} there; fastad downloads nothing, the data come from {protocol.source}"
    )


def _count(found: ImageFolder, category: str) -> tuple[int, int, int]:
    test = [s.is_anomalous for s in found.test if s.category == category]
    train = sum(s.category == category for s in found.train)
    return train, test.count(False), test.count(True)


def _check_counts(protocol: Protocol, found: ImageFolder, category: str) -> None:
    published = protocol.counts.get(category)
    if published is not None and (counts := _count(found, category)) != published:
        warnings.warn(
            f"{found.root}: {category} has {counts} training, normal and anomalous test images, "
            f"{protocol.title} as published has {published}; figures do not compare",
            FastadWarning,
            stacklevel=3,
        )


def _load_split(protocol: Protocol, root: Path, split: str | Sequence[str] | None) -> ImageFolder:
    # A split lies at OUT/<split>/<split>, and the user may name any of the three folders.
    above = (root, *root.absolute().parents[:2])
    out = next((folder for folder in above if (folder / RECORD).is_file()), None)
    if out is None:
        raise InputError(f"{root}: no {RECORD} here; expected {_expected(protocol)}")
    record = read_record(out)
    if record.get("protocol") != protocol.name:
        raise InputError(
            f"{out}: made for protocol {record.get('protocol')}, not for {protocol.name}"
        )
    names = [split] if isinstance(split, str) else list(split or ())
    if out is not root:
        names.append(root.absolute().name)
    chosen = tuple(dict.fromkeys(names))
    if len(chosen) != 1 or chosen[0] not in record["splits"]:
        raise InputError(
            f"{out}: expected one split, for each has its own model, of "
            f"{', '.join(record['splits'])}; got {', '.join(chosen) or 'none'}"
        )
    found = scan(out / chosen[0])
    if list(_count(found, chosen[0])) != record["splits"][chosen[0]]:
        raise InputError(
            f"{found.root}: expected {record['splits'][chosen[0]]} training, normal and anomalous "
            f"test images, found {list(_count(found, chosen[0]))}; remove {out} and run `fastad "
            f"prepare {protocol.name}` again"
        )
    return found


def read_record(out: Path) -> dict[str, Any]:
    """What `materialise` wrote about a folder that it made."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out / RECORD}: not readable ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("splits"), dict):
        raise InputError(f"{out / RECORD}: not a record of `fastad prepare`")
    return record
