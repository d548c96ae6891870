"""The VisA data set as it is published: photographs, and a table that splits and labels them."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fastad.errors import InputError
from fastad.training.folder import ImageFolder, Sample, check_categories

SPLIT_CSV = "split_csv/1cls.csv"  # the one-class split, which the published figures use
_COLUMNS = ("object", "split", "label", "image", "mask")


def scan_visa(root: Path, categories: Sequence[str] | None = None) -> ImageFolder:
    """Label the images that ``root/split_csv/1cls.csv`` lists, in its order.

    A mask's value is the number of the defect's kind; all but 0 count as anomalous. Files are
    listed and not opened.

    Args:
        root: Folder with ``split_csv`` and one folder per object.
        categories: Objects to use, in this order; all, in the table's order, when None.

    Raises:
        InputError: the table is not VisA's, trains on anomalous images, or names a file that does
            not exist or lies outside its object's folder.
    """
    table = root / SPLIT_CSV
    train: dict[str, list[Sample]] = {}
    test: dict[str, list[Sample]] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != _COLUMNS:
                raise InputError(
                    f"{table}: expected the columns {','.join(_COLUMNS)}, got "
                    f"{','.join(rows.fieldnames or ()) or 'nothing'}"
                )
            for row in rows:
                sample = _sample(root, row, f"{table}, line {rows.line_num}")
                train.setdefault(sample.category, [])
                test.setdefault(sample.category, [])
                (train if row["split"] == "train" else test)[sample.category].append(sample)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not readable as a table ({error})") from error
    names = check_categories(root, tuple(train), categories)
    for name in names:
        if not train[name]:
            raise InputError(f"{table}: lists no training images of {name}")
    chosen_train = tuple(sample for name in names for sample in train[name])
    chosen_test = tuple(sample for name in names for sample in test[name])
    _check_files(table, (*chosen_train, *chosen_test))
    return ImageFolder(root, "visa", names, chosen_train, chosen_test)


def _sample(root: Path, row: dict[str, str | None], where: str) -> Sample:
    category, split, label = (row[name] or "" for name in ("object", "split", "label"))
    if split not in ("train", "test") or label not in ("normal", "anomaly"):
        raise InputError(
            f"{where}: expected split train or test and label normal or anomaly, got {split!r} "
            f"and {label!r}"
        )
    if (split, label) == ("train", "anomaly"):
        raise InputError(f"{where}: an anomalous image in the training split")
    anomalous = label == "anomaly"
    image = _inside(root, category, row["image"] or "", where)
    mask = _inside(root, category, row["mask"], where) if anomalous and row["mask"] else None
    return Sample(image, category, anomalous, "anomaly" if anomalous else "", mask)


def _inside(root: Path, category: str, name: str, where: str) -> Path:
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or parts[0] != category or ".." in parts or "\\" in name:
        raise InputError(f"{where}: expected a path below {category}/, got {name!r}")
    return root.joinpath(*parts)


def _check_files(table: Path, samples: Sequence[Sample]) -> None:
    paths = [p for s in samples for p in (s.path, s.mask_path) if p is not None]
    if absent := [path for path in paths if not os.path.lexists(path)]:
        raise InputError(
            f"{table}: {len(absent)} of the {len(paths)} files it lists do not exist, the first is "
            f"{absent[0]}"
        )
