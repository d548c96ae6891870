from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from originals import CIFAR_IMAGES, CIFAR_LABELS, IDX_IMAGES, idx, save, save_cifar, save_idx
from PIL import Image

from fastad.errors import FastadWarning, InputError
from fastad.images import read_image
from fastad.training.cifar import CLASSES
from fastad.training.folder import load_images, scan
from fastad.training.materialise import materialise
from fastad.training.protocols import PROTOCOLS, load_protocol

# Ten images a set are not what was published; one test below asks for the warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*figures do not compare")


def test_four_unified_splits_are_those_of_the_paper() -> None:
    classes = PROTOCOLS["cifar10-unified"].classes
    assert classes is not None
    assert list(classes.normal.values()) == [
        (0, 1, 2, 3, 4),
        (5, 6, 7, 8, 9),
        (0, 2, 4, 6, 8),
        (1, 3, 5, 7, 9),
    ]


@pytest.mark.parametrize(
    ("split", "normal"), [("01234", {0, 1, 2, 3, 4}), ("13579", {1, 3, 5, 7, 9})]
)
def test_unified_split_trains_on_five_classes_and_tests_on_all(
    tmp_path: Path, split: str, normal: set[int]
) -> None:
    out = materialise(
        "cifar10-unified", save_cifar(tmp_path / "in", "python"), tmp_path / "out", size_px=32
    )
    found = load_protocol("cifar10-unified", out, split)
    names = {CLASSES["cifar10"][label] for label in normal}
    assert found.categories == (split,)
    assert len(found.train) == 25
    assert {s.path.name.partition("_")[0] for s in found.train} == names
    assert sum(not s.is_anomalous for s in found.test) == 5
    assert {s.defect for s in found.test if s.is_anomalous} == set(CLASSES["cifar10"]) - names


def test_enlarging_is_pillows_lanczos(tmp_path: Path) -> None:
    source = save_cifar(tmp_path / "in", "binary")
    out = materialise("cifar10-unified", source, tmp_path / "out", splits=["56789"])
    sample = load_protocol("cifar10-unified", out / "56789").train[0]
    name, _, index = sample.path.stem.partition("_")
    label = CIFAR_LABELS[:5].ravel()[int(index)]
    expected = Image.fromarray(CIFAR_IMAGES[int(index)]).resize(
        (224, 224), Image.Resampling.LANCZOS
    )
    assert name == CLASSES["cifar10"][label]
    assert np.array_equal(read_image(sample.path), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "row"),
    [("cifar10-oneclass", "frog"), ("mnist-oneclass", "7"), ("fashion-oneclass", "ankle_boot")],
)
def test_one_class_is_normal_and_nine_are_not(tmp_path: Path, name: str, row: str) -> None:
    if name.startswith("cifar10"):
        source = save_cifar(tmp_path / "in", "python-archive")
    else:
        source = save_idx(tmp_path / "in")
    found = load_protocol(name, materialise(name, source, tmp_path / "out"), row)
    assert {s.path.name[: len(row)] for s in found.train} == {row}
    assert len(found.train) == (5 if name.startswith("cifar10") else 2)
    assert [s.is_anomalous for s in found.test].count(False) == 1
    assert len(found.test) == 10
    ((images, _),) = load_images(found.train, (32, 32))
    assert images.shape == (len(found.train), 32, 32, 3)


def test_an_image_of_several_splits_is_stored_once(tmp_path: Path) -> None:
    source = save_cifar(tmp_path / "in", "binary")
    out = materialise("cifar10-unified", source, tmp_path / "out", size_px=32)
    index = int(np.flatnonzero(CIFAR_LABELS[5] == 0)[0])
    paths = list(out.rglob(f"test/*/airplane_{index:05d}.png"))
    assert len(paths) == 4
    assert len({path.stat().st_ino for path in paths}) == 1


def test_the_folder_of_all_splits_is_no_data_set(tmp_path: Path) -> None:
    out = materialise("mnist-oneclass", save_idx(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(InputError, match="no images found"):
        scan(out)
    with pytest.raises(InputError, match="expected one split, for each has its own model"):
        load_protocol("mnist-oneclass", out)


def test_split_and_folder_have_to_agree(tmp_path: Path) -> None:
    out = materialise("mnist-oneclass", save_idx(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(InputError, match="got 3, 4"):
        load_protocol("mnist-oneclass", out / "4", "3")


def test_complete_folder_is_reused(tmp_path: Path) -> None:
    source = save_idx(tmp_path / "in")
    out = materialise("mnist-oneclass", source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    materialise("mnist-oneclass", source, out, splits=["3"])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before


def test_folder_made_otherwise_is_not_reused(tmp_path: Path) -> None:
    source = save_idx(tmp_path / "in")
    out = materialise("mnist-oneclass", source, tmp_path / "out")
    with pytest.raises(InputError, match="with another size_px; choose another --out"):
        materialise("mnist-oneclass", source, out, size_px=64)


def test_folder_made_from_other_files_is_not_reused(tmp_path: Path) -> None:
    source = save_idx(tmp_path / "in")
    out = materialise("mnist-oneclass", source, tmp_path / "out")
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(255 - IDX_IMAGES[:20])))
    with pytest.raises(InputError, match="with another sources"):
        materialise("mnist-oneclass", source, out)


def test_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "out/photo.png")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        materialise("mnist-oneclass", save_idx(tmp_path / "in"), tmp_path / "out")


def test_nothing_is_left_when_preparing_is_stopped(tmp_path: Path) -> None:
    source = save_idx(tmp_path / "in")

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise("mnist-oneclass", source, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_images_lost_after_preparing_are_noticed(tmp_path: Path) -> None:
    out = materialise("mnist-oneclass", save_idx(tmp_path / "in"), tmp_path / "out")
    next((out / "3/3/train/good").iterdir()).unlink()
    with pytest.raises(InputError, match=r"expected \[2, 1, 9\].*found \[1, 1, 9\]"):
        load_protocol("mnist-oneclass", out / "3")


def test_another_protocols_folder_is_refused(tmp_path: Path) -> None:
    out = materialise("mnist-oneclass", save_idx(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(InputError, match="made for protocol mnist-oneclass, not for fashion"):
        load_protocol("fashion-oneclass", out / "3")


def test_folders_need_no_preparation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs no preparation"):
        materialise("visa", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_folders_that_cannot_be_replaced_are_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(InputError, match="out: expected the name of a folder to make"):
        materialise("mnist-oneclass", save_idx(tmp_path / "in"), out)


def test_unknown_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"splits: expected some of 01234.*got 0-4"):
        materialise("cifar10-unified", tmp_path, tmp_path / "out", splits=["0-4"])


def test_fewer_originals_than_published_are_reported(tmp_path: Path) -> None:
    with pytest.warns(FastadWarning, match=r"\(20, 10\).*as published \(60000, 10000\)"):
        materialise("mnist-oneclass", save_idx(tmp_path / "in"), tmp_path / "out", splits=["0"])
