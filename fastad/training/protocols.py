"""Published protocols: which data, which split, which order of rows; and the tables of the papers.

`load_protocol` checks a data set and labels it, `materialise` turns CIFAR-10, MNIST and
Fashion-MNIST into folders of images, `protocol_table` prints results as the papers do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastad.atomic import unwritable
from fastad.errors import FastadWarning, InputError
from fastad.training.cifar import (
    CLASSES,
    COUNTS,
    SOURCES,
    ClassSet,
    ClassSetName,
    read_class_set,
)
from fastad.training.folder import ImageFolder, scan

if TYPE_CHECKING:
    from rich.table import Table

    from fastad.evaluation import Evaluation

RECORD = "protocol.json"
HEADS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class ClassProtocol:
    """How ten classes become normal and anomalous: split by split, each with its own model."""

    data: ClassSetName
    normal: dict[str, tuple[int, ...]]  # labels of the normal classes of each split
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
_UNIFIED = {"01234": (0, 1, 2, 3, 4), "56789": (5, 6, 7, 8, 9)} | {
    "02468": (0, 2, 4, 6, 8),
    "13579": (1, 3, 5, 7, 9),
}


def _one_class(name: str, data: ClassSetName, title: str) -> Protocol:
    labels = {row: (label,) for label, row in enumerate(CLASSES[data])}
    return Protocol(
        name,
        f"{title}, one class normal, nine anomalous",
        SOURCES[data],
        f"a folder made by `fastad prepare {name}`",
        {"mean": CLASSES[data]},
        ("image_auroc",),
        # 32 x 32 and torchvision's default resize, as in Reverse Distillation's one-class loader.
        classes=ClassProtocol(data, labels, 32, Image.Resampling.BILINEAR),
        note="one model per class",
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
        _one_class("mnist-oneclass", "mnist", "MNIST"),
        _one_class("fashion-oneclass", "fashion-mnist", "Fashion-MNIST"),
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


def _load_split(
    protocol: Protocol, root: Path, split: str | Sequence[str] | None
) -> ImageFolder:
    # A split lies at OUT/<split>/<split>, and each of the three may be what the user names.
    above = (root, *root.absolute().parents[:2])
    out = next((folder for folder in above if (folder / RECORD).is_file()), None)
    if out is None:
        raise InputError(f"{root}: no {RECORD} here; expected {_expected(protocol)}")
    record = _read_record(out)
    if record.get("protocol") != protocol.name:
        raise InputError(
            f"{out}: made for protocol {record.get('protocol')}, not for {protocol.name}"
        )
    chosen = (split,) if isinstance(split, str) else tuple(split or ())
    if not chosen and out is not root:
        chosen = (root.absolute().name,)
    if len(chosen) != 1 or chosen[0] not in record["splits"]:
        raise InputError(
            f"{out}: expected one split, for each has its own model, of "
            f"{', '.join(record['splits'])}, got {', '.join(chosen) or 'none'}"
        )
    found = scan(out / chosen[0])
    if list(_count(found, chosen[0])) != record["splits"][chosen[0]]:
        raise InputError(
            f"{found.root}: expected {record['splits'][chosen[0]]} training, normal and anomalous "
            f"test images, found {list(_count(found, chosen[0]))}; remove {out} and run `fastad "
            f"prepare {protocol.name}` again"
        )
    return found


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
    classes = protocol.classes
    if classes is None:
        raise InputError(f"{name}: needs no preparation, pass {root} itself to train and evaluate")
    chosen = protocol.rows if splits is None else tuple(dict.fromkeys(splits))
    if not chosen or any(split not in protocol.rows for split in chosen):
        raise InputError(
            f"splits: expected some of {', '.join(protocol.rows)}, got {', '.join(chosen) or 'none'}"
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
        _check_same(out, _read_record(out), record)
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


def _read_record(out: Path) -> dict[str, Any]:
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out / RECORD}: not readable ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("splits"), dict):
        raise InputError(f"{out / RECORD}: not a record of `fastad prepare`")
    return record


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
) -> Iterator[tuple[Any, list[Path]]]:
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


def _resized(image: Any, size_px: int, classes: ClassProtocol) -> Image.Image:
    picture = Image.fromarray(image)
    if picture.size == (size_px, size_px):
        return picture
    return picture.resize((size_px, size_px), classes.resampling)


def _link(first: Path, place: Path) -> None:
    try:
        os.link(first, place)
    except OSError:  # a file system without links, or the limit of links to one file
        shutil.copyfile(first, place)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """An `Evaluation` from the JSON that ``fastad evaluate --json`` printed.

    Raises:
        InputError: no such file, or not such JSON.
    """
    from pydantic import TypeAdapter, ValidationError

    from fastad.evaluation import Evaluation

    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        return TypeAdapter(Evaluation).validate_python(tree)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: expected the output of `fastad evaluate --json` ({reason})"
        ) from error


def protocol_results(
    name: str, evaluations: Mapping[str, Evaluation | Sequence[Evaluation]]
) -> dict[str, Any]:
    """The figures of `protocol_table` as plain JSON values, AUROC and AUPRO in 0..1.

    Args:
        name: One of `PROTOCOLS`.
        evaluations: By label, such as a method's name: one evaluation for a unified model, or
            several where each category or split has a model of its own.

    Returns:
        ``rows`` in the papers' order and ``means`` of groups and of all, each by label and metric;
        None where nothing was measured. A mean is over the ``count`` rows that were measured.

    Raises:
        InputError: a category that the protocol does not have, or that one label has twice.
    """
    protocol = find_protocol(name)
    scores = {label: _by_category(protocol, label, given) for label, given in evaluations.items()}
    groups = protocol.groups or {
        "mean": tuple(dict.fromkeys(category for found in scores.values() for category in found))
    }
    everything = tuple(row for group in groups.values() for row in group)
    rows = {
        row: {
            label: {metric: getattr(found.get(row), metric, None) for metric in protocol.metrics}
            for label, found in scores.items()
        }
        for row in everything
    }
    means = {**groups, "mean": everything}
    return {
        "protocol": name,
        "title": protocol.title,
        "source": protocol.source,
        "note": protocol.note,
        "labels": list(scores),
        "metrics": list(protocol.metrics),
        "rows": rows,
        "groups": {group: list(members) for group, members in means.items()},
        "means": {
            group: {
                label: {m: _mean([rows[r][label][m] for r in members]) for m in protocol.metrics}
                for label in scores
            }
            for group, members in means.items()
        },
    }


def _by_category(
    protocol: Protocol, label: str, given: Evaluation | Sequence[Evaluation]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for evaluation in given if isinstance(given, Sequence) else (given,):
        for scores in evaluation.categories:
            if protocol.groups and scores.category not in protocol.rows:
                raise InputError(
                    f"{label}: {scores.category} is no category of {protocol.title}; expected "
                    f"{', '.join(protocol.rows)}"
                )
            if scores.category in found:
                raise InputError(f"{label}: {scores.category} was evaluated more than once")
            found[scores.category] = scores
    return found


def _mean(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {"value": sum(known) / len(known) if known else None, "count": len(known)}


def protocol_table(
    name: str, evaluations: Mapping[str, Evaluation | Sequence[Evaluation]]
) -> Table:
    """Results as the papers print them: percent, rows in their order, means below, '-' for none.

    A mean over fewer rows than the protocol has is followed by how many of them it covers, such as
    ``96.5 (13/15)``: it compares with no published mean. Arguments and errors are those of
    `protocol_results`.
    """
    from rich.table import Table

    results = protocol_results(name, evaluations)
    labels, metrics, groups = results["labels"], results["metrics"], results["groups"]
    table = Table(title=f"{results['title']}, in %", caption=results["note"] or None)
    table.add_column("category")
    for label in labels:
        for metric in metrics:
            head = HEADS[metric] if len(labels) == 1 else f"{label}\n{HEADS[metric]}"
            table.add_column(head, justify="right")

    def mean_row(group: str) -> list[str]:
        total = len(groups[group])
        means = results["means"][group]
        return [_mean_cell(means[label][m], total) for label in labels for m in metrics]

    printed = [group for group in groups if group != "mean"] or ["mean"]
    for group in printed:
        for row in groups[group]:
            cells = results["rows"][row]
            table.add_row(row, *(_percent(cells[label][m]) for label in labels for m in metrics))
        table.add_section()
        if group != "mean":
            table.add_row(f"mean of {group}", *mean_row(group))
            table.add_section()
    table.add_row("mean", *mean_row("mean"))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _mean_cell(mean: dict[str, Any], total: int) -> str:
    covers = f" ({mean['count']}/{total})" if 0 < mean["count"] < total else ""
    return _percent(mean["value"]) + covers
