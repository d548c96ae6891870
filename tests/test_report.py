"""The HTML report: one safe, small file that shows what was measured."""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from textures import CATEGORIES, Textures

from fastad.errors import EngineError
from fastad.evaluation import Evaluation, evaluate, read_manifest
from fastad.prediction import Prediction
from fastad.predictor import Predictor
from fastad.report import Example, example_of, write_report
from fastad.spec import Manifest
from fastad.training.folder import Sample, scan


@pytest.fixture(scope="module")
def manifest(texture_engine: Path) -> Manifest:
    return read_manifest(texture_engine)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Filled by ``evaluation``."""
    return []


@pytest.fixture(scope="module")
def evaluation(texture_engine: Path, textures: Textures, examples: list[Example]) -> Evaluation:
    def keep(sample: Sample, prediction: Prediction) -> None:
        examples.append(example_of(sample, prediction))

    return evaluate(texture_engine, textures.root, on_prediction=keep)


@pytest.fixture(scope="module")
def text(
    evaluation: Evaluation,
    examples: list[Example],
    manifest: Manifest,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_report(path, evaluation, manifest, examples, ["Painted <defects>."]) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("category", [*CATEGORIES, "mean"])
def test_table_holds_the_evaluations_figures(
    text: str, evaluation: Evaluation, category: str
) -> None:
    rows = {row.category: row for row in (*evaluation.categories, evaluation.mean)}
    (row,) = re.findall(rf"<tr[^>]*><td>{category}</td>(.*?)</tr>", text)
    cells = re.findall(r"<td>(.*?)</td>", row)
    scores = rows[category]
    assert cells[0] == str(scores.images)
    assert cells[1] == f"{scores.image_auroc:.3f}"
    assert f"{scores.aupro:.3f}" in cells
    assert cells[-1] == f"{scores.detection_rate:.3f}"


def test_every_example_is_shown_with_its_panels(text: str, examples: list[Example]) -> None:
    assert text.count("<figure>") == len(examples)
    assert text.count("data:image/jpeg;base64,") == sum(len(e.panels) for e in examples)
    assert {len(e.panels) for e in examples} == {3}


def test_wrong_verdicts_stand_out(text: str, examples: list[Example]) -> None:
    wrong = [e for e in examples if e.pred_label != e.is_anomalous]
    assert text.count("class=wrong") == len(wrong)


def test_is_one_file_without_scripts_and_links(text: str) -> None:
    assert "<script" not in text
    assert "http" not in re.sub(r"base64,[^']*", "", text)
    assert "src='data:" in text


def test_names_are_escaped(
    evaluation: Evaluation, manifest: Manifest, examples: list[Example], tmp_path: Path, text: str
) -> None:
    assert "Painted &lt;defects&gt;." in text
    rows = (replace(evaluation.categories[0], category="<b>grain"),)
    odd = replace(evaluation, data="<i>data", categories=rows)
    example = replace(examples[0], name="<u>hole")
    written = write_report(tmp_path / "r.html", odd, manifest, [example]).read_text()
    assert not re.search(r"<b>grain|<i>data|<u>hole", written)


def test_says_what_could_not_be_read(
    evaluation: Evaluation, manifest: Manifest, tmp_path: Path
) -> None:
    damaged = replace(evaluation, unreadable=("a.png: is damaged", "b.png: is damaged"))
    written = write_report(tmp_path / "r.html", damaged, manifest, []).read_text()
    assert "2 images could not be read" in written


def test_parity_and_threshold_are_stated(text: str, manifest: Manifest) -> None:
    for report in manifest.variants[0].parity:
        assert f"on {report.runtime} fp32, {report.images} real images" in text
    assert manifest.calibration is not None
    assert f"{manifest.calibration.pooled.value:.4g} pooled" in text


def test_undefined_figures_and_verdicts_have_a_sign(
    evaluation: Evaluation, manifest: Manifest, examples: list[Example], tmp_path: Path
) -> None:
    rows = (replace(evaluation.categories[0], pixel_auroc=None),)
    silent = replace(examples[0], pred_label=None, pred_score=None)
    bare = replace(manifest, calibration=None, variants=())
    written = write_report(
        tmp_path / "r.html", replace(evaluation, categories=rows), bare, [silent]
    ).read_text()
    assert "<td>-</td>" in written
    assert "no threshold" in written


def test_an_example_of_a_large_image_is_small(predictor: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "large" / "train" / "good"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (1200, 900), np.uint8)
    Image.fromarray(noise).save(folder / "0.png")
    (sample,) = scan(tmp_path / "large").train
    found = predictor.predict(sample.path)
    assert isinstance(found, Prediction)
    example = example_of(sample, found)
    assert sum(len(panel) for panel in example.panels) < 200_000
    sizes = [Image.open(BytesIO(panel)).size for panel in example.panels]
    assert sizes == [(225, 300)] * 3


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    evaluation: Evaluation, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(EngineError, match=r"file/report\.html: cannot be written"):
        write_report(tmp_path / "file" / "report.html", evaluation, manifest, [])
    with pytest.raises(EngineError, match="expected the name of a file, it is a folder"):
        write_report(tmp_path, evaluation, manifest, [])
    assert (tmp_path / "file").read_text() == "old"
