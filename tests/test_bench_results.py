"""Committed results keep one form, and the tables people read are made from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import readme, timing

RESULTS = sorted(timing.RESULTS.glob("*/*.json"))
PAGES = {page.name: page.read_text(encoding="utf-8") for page in readme.PAGES}


def document(**fields: Any) -> dict[str, Any]:
    return {
        "suite": "cold",
        "device": "cpu",
        "machine": timing.machine(),
        "rows": [{"package": "fastad", "MB": 304.25, "first s": None}],
        **fields,
    }


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_result_has_the_common_form(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    timing.check_document(found)
    assert path.name == timing.file_name(found)


def test_there_are_committed_results() -> None:
    assert len(RESULTS) >= 10


@pytest.mark.parametrize("field", ["suite", "device", "machine", "rows"])
def test_result_without_a_field_is_refused(field: str) -> None:
    lacking = {name: value for name, value in document().items() if name != field}
    with pytest.raises(ValueError, match=field):
        timing.check_document(lacking)


@pytest.mark.parametrize("field", timing.MACHINE)
def test_machine_without_a_field_is_refused(field: str) -> None:
    lacking = copy.deepcopy(document())
    del lacking["machine"][field]
    with pytest.raises(ValueError, match=rf"machine\.{field}"):
        timing.check_document(lacking)


@pytest.mark.parametrize("rows", [[], [{}], ["text"]])
def test_result_without_filled_rows_is_refused(rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="rows: expected"):
        timing.check_document(document(rows=rows))


def test_nothing_is_written_for_a_refused_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows: expected"):
        timing.write_result("cold", {"rows": []}, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_written_result_is_found_by_its_name(tmp_path: Path) -> None:
    path = timing.write_result("cold", {"rows": [{"a": 1}]}, results=tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path == timing.version_folder(tmp_path) / timing.file_name(found)
    assert found["rows"] == [{"a": 1}]


@pytest.mark.parametrize("page", PAGES)
def test_page_is_in_step_with_the_results(page: str) -> None:
    assert readme.rendered(PAGES[page]) == PAGES[page], "run python -m bench.readme"


@pytest.mark.parametrize("suite", readme.REQUIRED)
def test_a_page_shows_each_committed_suite(suite: str) -> None:
    names = {path.name.partition("--")[0] for path in timing.version_folder().glob("*.json")}
    committed = {name for name in names if name.partition("-")[0] == suite}
    shown = {name for text in PAGES.values() for name in readme.suites(text)}
    assert committed <= shown


def test_table_replaces_what_stood_between_the_markers(tmp_path: Path) -> None:
    timing.write_result("cold", document(), about=timing.machine(), results=tmp_path)
    text = "before\n<!-- bench:cold -->\nstale row\n<!-- end -->\nafter\n"
    made = readme.rendered(text, tmp_path)
    assert "| fastad | 304 | - |" in made
    assert "stale row" not in made
    assert made.startswith("before\n<!-- bench:cold -->\n")
    assert made.endswith("<!-- end -->\nafter\n")
    assert readme.rendered(made, tmp_path) == made


def test_frame_table_stands_beside_what_is_allowed(tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "method": "grad",
        "size": [224, 192],
        "runtime": "openvino fp32",
        "over_graph_allowed_ms": 0.3,
        "rows": [
            {"input": "graph alone", "over graph": None},
            {"input": "frame in memory", "over graph": 0.6864},
        ],
        "streams": [{"sources": 1}],
    }
    timing.write_result("end_to_end", told, results=tmp_path)
    made = readme.section("end_to_end", tmp_path)
    assert "takes 0.69 ms over the graph, allowed are 0.30 ms" in made


def test_peers_are_compared_at_both_sizes(tmp_path: Path) -> None:
    times = {
        place: {"p50_ms": 10.0 * i, "ratio": 2.0 * i, "ours_ratio": 3.0 * i}
        for i, place in enumerate(("frame", "golden"), 1)
    }
    row = {"row": "plain", "network": "grad", "precision": "fp32", **times}
    timing.write_result("peers", {"rows": [row]}, results=tmp_path)
    *_, head, _, cells = readme.section("peers", tmp_path).splitlines()
    named = dict(zip(head.split(" | "), cells.split(" | "), strict=True))
    assert named["ms, 1920 x 1080"] == "10"
    assert named["fastad is x as fast, 1920 x 1080"] == "3"
    assert named["x eager, model size"] == "4"
    assert named["fastad is x as fast, model size |"] == "6 |"


def test_accuracy_is_rounded_once(tmp_path: Path) -> None:
    row = {
        "weights": "random",
        "image AUROC": 0.8785,
        "pixel AUROC": 0.6795,
        "categories": {"a": [0.878516, None], "b": [0.878516, 0.679546]},
    }
    timing.write_result("accuracy", {"data": "toy", "rows": [row]}, results=tmp_path)
    made = readme.section("accuracy", tmp_path)
    assert "| 0.879 |" in made and "| 0.68 |" in made


def test_changed_result_puts_the_readme_out_of_step(tmp_path: Path) -> None:
    text = "<!-- bench:cold -->\n<!-- end -->\n"
    timing.write_result("cold", document(), results=tmp_path)
    made = readme.rendered(text, tmp_path)
    timing.write_result("cold", document(rows=[{"package": "fastad", "MB": 9.0}]), results=tmp_path)
    assert readme.rendered(made, tmp_path) != made


@pytest.mark.parametrize(
    "text", ["<!-- bench:cold -->\n", "<!-- end -->\n", "<!-- bench: cold -->\n<!-- end -->\n"]
)
def test_marker_alone_is_refused(text: str, tmp_path: Path) -> None:
    timing.write_result("cold", document(), results=tmp_path)
    with pytest.raises(ValueError, match="followed by its"):
        readme.rendered(text, tmp_path)


def test_suite_without_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no soak--\*\.json"):
        readme.rendered("<!-- bench:soak -->\n<!-- end -->\n", tmp_path)


def test_cells_do_not_break_the_table() -> None:
    made = readme.table([{"a": "x|y\nz", "b": 0.000123456, "c": 12345.6}], dict.fromkeys("abc", ""))
    assert made.splitlines()[0] == "| a | b | c |"
    made = readme.table([{"a": "x|y\nz", "b": 0.000123456, "c": 12345.6}], {k: k for k in "abc"})
    assert made.splitlines()[2] == "| x\\|y z | 0.000123 | 12346 |"
