from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from originals import save, save_btad, save_mvtec, save_visa

from fastad.errors import FastadWarning, InputError
from fastad.training.folder import read_mask, scan
from fastad.training.protocols import PROTOCOLS, find_protocol, load_protocol

# Ten images a set are not what was published; one test below asks for the warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*figures do not compare")


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "folder"])
def test_missing_root_names_the_source(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such folder") as refusal:
        load_protocol(name, tmp_path / "nowhere")
    assert PROTOCOLS[name].source in str(refusal.value)


@pytest.mark.parametrize("name", ["mvtec", "visa", "btad"])
def test_empty_root_names_the_source(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no images found") as refusal:
        load_protocol(name, tmp_path)
    assert PROTOCOLS[name].source in str(refusal.value)


def test_visa_follows_its_table(tmp_path: Path) -> None:
    found = load_protocol("visa", save_visa(tmp_path))
    assert (found.layout, found.categories) == ("visa", ("pcb1", "candle"))
    assert [s.path.name for s in found.train] == ["0000.JPG", "0001.JPG"] * 2
    assert [s.is_anomalous for s in found.test] == [False, True] * 2
    assert found.test[1].mask_path == tmp_path / "pcb1/Data/Masks/Anomaly/000.png"


def test_visa_masks_count_every_kind_of_defect(tmp_path: Path) -> None:
    anomalous = load_protocol("visa", save_visa(tmp_path), "candle").test[1]
    assert read_mask(anomalous).sum() == 6


def test_visa_objects_can_be_chosen(tmp_path: Path) -> None:
    assert scan(save_visa(tmp_path), ["candle", "pcb1"]).categories == ("candle", "pcb1")


VISA_DAMAGE = {
    "columns": ("object,split", "objekt,split", "expected the columns"),
    "split": ("pcb1,train", "pcb1,val", r"line 2: expected split train or test.*'val'"),
    "label": ("train,normal", "train,broken", "'broken'"),
    "anomalous training": ("train,normal", "train,anomaly", "an anomalous image in the training"),
    "outside": ("pcb1/Data/Images/Normal/0000", "pcb1/../../0", "a path below pcb1/"),
    "another object": ("pcb1/Data/Images/Normal/0000", "candle/0", "a path below pcb1/"),
    "absolute": ("pcb1/Data/Images/Normal/0000", "/pcb1/0", "a path below pcb1/"),
    "absent": ("Normal/0000", "Normal/9999", r"1 of the 10 files.*9999\.JPG"),
}


@pytest.mark.parametrize("case", VISA_DAMAGE)
def test_damaged_visa_tables_are_refused(tmp_path: Path, case: str) -> None:
    old, new, message = VISA_DAMAGE[case]
    table = save_visa(tmp_path) / "split_csv/1cls.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        scan(tmp_path)


def test_visa_has_no_second_masks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mask_folder.*is VisA"):
        scan(save_visa(tmp_path), mask_folder="masks2")


def test_visa_refuses_unknown_objects(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no category 'pcb'; did you mean 'pcb1'"):
        scan(save_visa(tmp_path), ["pcb"])


def test_btad_reads_ok_as_normal_and_ko_as_anomalous(tmp_path: Path) -> None:
    found = load_protocol("btad", save_btad(tmp_path))
    assert found.categories == ("01", "02", "03")
    assert (len(found.train), len(found.test)) == (9, 9)
    assert [(s.defect, s.is_anomalous) for s in found.test[:3]] == [
        ("ko", True),
        ("ko", True),
        ("", False),
    ]
    assert all(s.mask_path for s in found.test if s.is_anomalous)


def test_btad_refuses_defects_in_training(tmp_path: Path) -> None:
    save(save_btad(tmp_path) / "01/train/ko/0.bmp")
    with pytest.raises(InputError, match="holds ko beside ok/"):
        scan(tmp_path)


def test_ok_is_a_defect_like_any_other_where_good_is_normal(tmp_path: Path) -> None:
    save(save_mvtec(tmp_path, "bottle") / "bottle/test/ok/000.png")
    assert [s.defect for s in scan(tmp_path).test if s.is_anomalous] == ["broken", "ok"]


def test_mvtec_refuses_other_categories(tmp_path: Path) -> None:
    save_mvtec(tmp_path, "bottle", "nuts")
    with pytest.raises(InputError, match=r"nuts are no categories of MVTec AD.*`folder`"):
        load_protocol("mvtec", tmp_path)


def test_other_counts_than_published_are_reported(tmp_path: Path) -> None:
    with pytest.warns(FastadWarning, match=r"bottle has \(1, 1, 1\).*\(209, 20, 63\)"):
        load_protocol("mvtec", save_mvtec(tmp_path, "bottle"))


def test_own_data_may_have_any_categories(tmp_path: Path) -> None:
    assert load_protocol("folder", save_mvtec(tmp_path, "nuts", "bolts")).categories == (
        "bolts",
        "nuts",
    )


def test_mvtec_counts_add_up_to_the_published_totals() -> None:
    counts = np.array(list(PROTOCOLS["mvtec"].counts.values()))
    assert counts.sum(0).tolist() == [3629, 467, 1258]
    assert tuple(PROTOCOLS["mvtec"].counts) == PROTOCOLS["mvtec"].rows


def test_unknown_protocols_are_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match=r"expected one of mvtec, .* did you mean cifar10-unified"):
        find_protocol("cifar10-unifid")
