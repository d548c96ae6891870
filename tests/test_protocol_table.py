from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fastad.errors import InputError
from fastad.evaluation import Evaluation, Scores
from fastad.protocol_table import protocol_results, protocol_table, read_evaluation


def evaluation(**image_auroc: float) -> Evaluation:
    """An evaluation whose pixel AUROC is 0.01 below the image AUROC, without AUPRO."""
    none = dict.fromkeys(
        (
            *("image_ap", "image_f1max", "pixel_ap", "pixel_f1max", "aupro"),
            *("false_alarm_rate", "detection_rate", "false_alarm_interval"),
        )
    )
    rows = tuple(
        Scores(name, 9, 4, image_auroc=v, pixel_auroc=v - 0.01, **none)
        for name, v in image_auroc.items()
    )
    return Evaluation("a.engine", "data", "model", rows, rows[0], (), 1.5)


def text_of(name: str, **evaluations: Evaluation | list[Evaluation]) -> list[list[str]]:
    """Cells of the printed rows."""
    console = Console(file=StringIO(), width=200)
    console.print(protocol_table(name, evaluations))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    return [[c.strip() for c in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_mvtec_rows_are_textures_then_objects() -> None:
    rows = [row[0] for row in text_of("mvtec", uniad=evaluation(bottle=0.9))]
    assert rows[:7] == ["carpet", "grid", "leather", "tile", "wood", "mean of textures", "bottle"]
    assert rows[-3:] == ["zipper", "mean of objects", "mean"]


def test_missing_categories_and_metrics_are_dashes() -> None:
    cells = {row[0]: row[1:] for row in text_of("mvtec", uniad=evaluation(bottle=0.9876))}
    assert cells["bottle"] == ["98.8", "97.8", "-"]
    assert cells["carpet"] == ["-", "-", "-"]
    assert cells["mean of textures"] == ["-", "-", "-"]


def test_mean_of_some_rows_says_of_how_many() -> None:
    cells = {row[0]: row[1:] for row in text_of("mvtec", uniad=evaluation(bottle=0.9, wood=0.8))}
    assert cells["mean"] == ["85.0 (2/15)", "84.0 (2/15)", "-"]


def test_mean_of_all_rows_is_plain() -> None:
    found = evaluation(**{"01": 0.9, "02": 0.8, "03": 1.0})
    assert text_of("btad", grad=found)[-1] == ["mean", "90.0", "89.0", "-"]


def test_one_model_per_split_makes_one_table() -> None:
    runs = [evaluation(**{split: v}) for split, v in [("01234", 0.844), ("56789", 0.796)]]
    rows = text_of("cifar10-unified", uniad=runs)
    assert rows == [
        ["01234", "84.4"],
        ["56789", "79.6"],
        ["02468", "-"],
        ["13579", "-"],
        ["mean", "82.0 (2/4)"],
    ]


def test_methods_stand_side_by_side() -> None:
    rows = text_of("btad", uniad=evaluation(**{"01": 0.9}), rd4ad=evaluation(**{"02": 0.8}))
    assert rows[0] == ["01", "90.0", "89.0", "-", "-", "-", "-"]
    assert rows[1] == ["02", "-", "-", "-", "80.0", "79.0", "-"]


def test_own_data_have_the_rows_that_were_evaluated() -> None:
    rows = text_of("folder", grad=evaluation(nuts=0.9, bolts=0.7))
    assert [row[0] for row in rows] == ["nuts", "bolts", "mean"]


def test_results_are_plain_json() -> None:
    results = protocol_results("visa", {"uniad": evaluation(pcb1=0.9)})
    assert json.loads(json.dumps(results)) == results
    assert results["rows"]["pcb1"]["uniad"]["image_auroc"] == 0.9
    assert results["rows"]["candle"]["uniad"]["image_auroc"] is None
    assert results["means"]["mean"]["uniad"]["image_auroc"] == {"value": 0.9, "count": 1}


def test_category_of_another_data_set_is_refused() -> None:
    with pytest.raises(InputError, match="uniad: bottle is no category of VisA"):
        protocol_table("visa", {"uniad": evaluation(bottle=0.9)})


def test_category_evaluated_twice_is_refused() -> None:
    twice = [evaluation(bottle=0.9), evaluation(bottle=0.8)]
    with pytest.raises(InputError, match="uniad: bottle was evaluated more than once"):
        protocol_table("mvtec", {"uniad": twice})


def test_evaluations_come_back_from_their_json(tmp_path: Path) -> None:
    before = evaluation(bottle=0.9)
    (tmp_path / "a.json").write_text(json.dumps(before.to_dict()))
    assert read_evaluation(tmp_path / "a.json") == before


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "a"}'])
def test_other_json_is_no_evaluation(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="expected the output of `fastad evaluate --json`"):
        read_evaluation(tmp_path / "a.json")
