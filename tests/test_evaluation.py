"""Evaluation and calibration: the same figures as an independent computation, on what ships."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from textures import CATEGORIES, COUNTS, FALSE_ALARM_RATE, MODEL_SIZE, H, Textures, W

from fastad import evaluation
from fastad.calibration import ROUNDING_ROOM, conformal_rank
from fastad.engine.container import MANIFEST, read_engine
from fastad.errors import EngineError, InputError
from fastad.evaluation import Evaluation, Scores, calibrate_model, evaluate, read_manifest
from fastad.predictor import Predictor
from fastad.training.checkpoint import load_checkpoint

# Pixel histograms bin float32 values to a relative width of 1.5e-5.
PIXEL_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def result(texture_engine: Path, textures: Textures) -> Evaluation:
    return evaluate(texture_engine, textures.root)


@pytest.fixture
def data(textures: Textures, tmp_path: Path) -> Path:
    """A copy of the set that a test may change."""
    shutil.copytree(textures.root, tmp_path / "data")
    return tmp_path / "data"


def row_of(result: Evaluation, category: str) -> Scores:
    (row,) = [row for row in result.categories if row.category == category]
    return row


def samples(root: Path, category: str) -> Iterator[tuple[Path, Path | None]]:
    """Test images with their masks, by the layout alone."""
    for path in sorted((root / category / "test").glob("*/*.png")):
        defect = path.parent.name
        masks = root / category / "ground_truth" / defect
        yield path, None if defect == "good" else masks / f"{path.stem}_mask.png"


def f1max(truth: NDArray[Any], scores: NDArray[Any]) -> float:
    precision, recall, _ = precision_recall_curve(truth, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


@pytest.mark.parametrize("resolution", ["model", "original"])
@pytest.mark.parametrize("category", CATEGORIES)
def test_figures_equal_those_of_scikit_learn(
    texture_engine: Path,
    textures: Textures,
    predictor: Predictor,
    category: str,
    resolution: Literal["model", "original"],
) -> None:
    found = evaluate(
        texture_engine,
        textures.root,
        resolution=resolution,
    )
    row = row_of(found, category)
    paths = list(samples(textures.root, category))
    labels = np.array([mask is not None for _, mask in paths])
    predictions = list(predictor.iterate([path for path, _ in paths], category=category))
    raw = np.array([p.raw_score for p in predictions])
    maps, masks = [], []
    for prediction, (_, mask) in zip(predictions, paths, strict=True):
        at_model = resolution == "model"
        maps.append(prediction.model_map if at_model else prediction.anomaly_map)
        truth = Image.open(mask) if mask else Image.new("L", (W, H))
        if at_model:
            truth = truth.resize(MODEL_SIZE[::-1], Image.Resampling.NEAREST)
        masks.append(np.asarray(truth) > 0)
    pixels, truth_pixels = np.concatenate(maps, None), np.concatenate(masks, None)
    assert (row.images, row.anomalous) == (len(paths), int(labels.sum()))
    assert row.image_auroc == pytest.approx(roc_auc_score(labels, raw))
    assert row.image_ap == pytest.approx(average_precision_score(labels, raw))
    assert row.image_f1max == pytest.approx(f1max(labels, raw))
    close = {"abs": PIXEL_TOLERANCE}
    assert row.pixel_auroc == pytest.approx(roc_auc_score(truth_pixels, pixels), **close)
    assert row.pixel_ap == pytest.approx(average_precision_score(truth_pixels, pixels), **close)
    assert row.pixel_f1max == pytest.approx(f1max(truth_pixels, pixels), **close)
    alarms = np.array([p.pred_label for p in predictions])
    assert row.false_alarm_rate == pytest.approx(alarms[~labels].mean())
    assert row.detection_rate == pytest.approx(alarms[labels].mean())
    assert found.resolution == resolution


def test_mean_is_over_categories(result: Evaluation) -> None:
    assert [row.category for row in result.categories] == list(CATEGORIES)
    assert result.mean.images == sum(row.images for row in result.categories)
    for field in fields(Scores)[3:-1]:  # all but the interval
        values = [getattr(row, field.name) for row in result.categories]
        assert getattr(result.mean, field.name) == pytest.approx(np.mean(values)), field.name


def test_painted_defects_are_found_in_their_place(result: Evaluation) -> None:
    """Not a score to publish: it fails where maps, masks or labels are mixed up."""
    assert result.mean.pixel_auroc is not None
    assert result.mean.pixel_auroc > 0.8
    assert result.mean.image_auroc is not None
    assert result.mean.image_auroc > 0.8


def test_engine_and_checkpoint_agree(
    result: Evaluation, texture_run: Path, textures: Textures
) -> None:
    trained = evaluate(texture_run, textures.root)
    for ours, theirs in zip(result.categories, trained.categories, strict=True):
        for name, value in asdict(ours).items():
            assert value == pytest.approx(getattr(theirs, name), abs=PIXEL_TOLERANCE), name


def test_one_category_is_found_inside_and_by_name(
    result: Evaluation, texture_engine: Path, textures: Textures
) -> None:
    inside = evaluate(texture_engine, textures.root / "grain")
    chosen = evaluate(texture_engine, textures.root, categories=["grain"])
    assert inside.categories == chosen.categories == (row_of(result, "grain"),)


def test_to_dict_is_plain(result: Evaluation) -> None:
    tree = result.to_dict()
    assert set(tree) == {f.name for f in fields(Evaluation)}
    assert tree["mean"]["image_auroc"] == result.mean.image_auroc
    assert result.ms_per_image > 0


def test_without_masks_there_are_image_figures_only(
    result: Evaluation, texture_engine: Path, data: Path
) -> None:
    shutil.rmtree(data / "grain" / "ground_truth")
    found = evaluate(texture_engine, data)
    grain, stripes = found.categories
    assert grain.image_auroc == row_of(result, "grain").image_auroc
    assert (grain.pixel_auroc, grain.pixel_ap, grain.pixel_f1max, grain.aupro) == (None,) * 4
    assert found.mean.pixel_auroc == stripes.pixel_auroc


def test_unreadable_images_are_named_counted_and_left_out(texture_engine: Path, data: Path) -> None:
    cut = data / "stripes" / "test" / "good" / "01.png"
    cut.write_bytes(cut.read_bytes()[:300])
    found = evaluate(texture_engine, data)
    (message,) = found.unreadable
    assert message.startswith(f"{cut}: is damaged")
    assert message.count(cut.name) == 1
    assert row_of(found, "stripes").images == COUNTS["test"] + 6 - 1


def test_a_category_without_one_readable_image_has_no_figures(
    texture_engine: Path, data: Path
) -> None:
    for path in (data / "grain" / "test").glob("*/*.png"):
        path.write_bytes(b"damaged")
    found = evaluate(texture_engine, data)
    assert len(found.unreadable) == COUNTS["test"] + 6
    grain = row_of(found, "grain")
    assert (grain.images, grain.image_auroc, grain.false_alarm_rate) == (0, None, None)
    assert found.mean.image_auroc == row_of(found, "stripes").image_auroc


def test_only_normal_test_images_leave_ranking_undefined(texture_engine: Path, data: Path) -> None:
    for category in CATEGORIES:
        for defect in ("hole", "chalk"):
            shutil.rmtree(data / category / "test" / defect)
    mean = evaluate(texture_engine, data).mean
    assert (mean.image_auroc, mean.pixel_auroc, mean.detection_rate) == (None, None, None)
    assert mean.false_alarm_rate is not None


def test_progress_counts_every_image(texture_engine: Path, textures: Textures) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(texture_engine, textures.root, progress=lambda *step: seen.append(step))
    total = len(textures.images())
    assert seen == [("evaluate", i, total) for i in range(1, total + 1)]


def test_refuses_data_without_test_images(texture_engine: Path, textures: Textures) -> None:
    with pytest.raises(InputError, match="expected test images in <category>/test/"):
        evaluate(texture_engine, textures.calibration)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": "full"}, "resolution: expected model or original, got 'full'"),
        ({"categories": ["grian"]}, "did you mean 'grain'"),
        ({"runtime": "openvinno"}, "runtime: expected auto, tensorrt, pytorch"),
    ],
)
def test_refuses_arguments(
    texture_engine: Path, textures: Textures, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(texture_engine, textures.root, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"runtime": "openvino"}, {"precision": "bf16"}, {"device": "cuda"}]
)
def test_a_checkpoint_runs_on_pytorch_only(
    texture_run: Path, textures: Textures, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="a checkpoint runs on pytorch in fp32 on the CPU only"):
        evaluate(texture_run, textures.root, **arguments)


def test_masks_of_another_size_are_named(texture_engine: Path, data: Path) -> None:
    Image.new("L", (5, 5)).save(data / "grain" / "ground_truth" / "hole" / "00_mask.png")
    with pytest.raises(InputError, match=r"00_mask\.png: mask of \[5, 5\]"):
        evaluate(texture_engine, data)


# Calibration


def test_thresholds_are_the_conformal_ranks_of_the_runs_own_scores(
    texture_run: Path, textures: Textures
) -> None:
    fitted = read_manifest(texture_run).calibration
    assert fitted is not None
    with evaluation.open_model(texture_run) as predictor:
        for category in CATEGORIES:
            paths = sorted((textures.calibration / category / "good").iterdir())
            scores = sorted(p.raw_score for p in predictor.iterate(paths))
            rank = conformal_rank(len(scores), FALSE_ALARM_RATE)
            room = ROUNDING_ROOM * (scores[rank - 1] - float(np.median(scores)))
            expected = pytest.approx(scores[rank - 1] + room, rel=1e-6)
            assert fitted.per_category[category].value == expected
            assert (
                sum(s > fitted.per_category[category].value for s in scores) == len(scores) - rank
            )
            assert fitted.per_category[category].count == COUNTS["calibration"]
    assert fitted.pooled.count == 2 * COUNTS["calibration"]
    assert fitted.false_alarm_rate == FALSE_ALARM_RATE


def test_a_run_folder_calibrates_on_what_training_held_out(
    texture_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(texture_run, tmp_path / "run"))
    held_out = load_checkpoint(run).record.holdout
    fitted = calibrate_model(run, false_alarm_rate=0.2)
    assert fitted.pooled.count == len(held_out) == 8
    assert load_checkpoint(run).record.calibration == fitted
    assert set(fitted.per_category) | set(fitted.uncovered) == set(CATEGORIES)


def test_calibrating_an_engine_keeps_everything_but_the_thresholds(
    texture_engine: Path, textures: Textures, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(texture_engine, tmp_path / "copy.engine"))
    fitted = calibrate_model(copy, data=textures.calibration, false_alarm_rate=0.1)
    with read_engine(texture_engine) as before, read_engine(copy) as after:
        assert after.manifest.calibration == fitted != before.manifest.calibration
        assert after.manifest.members == before.manifest.members
        assert after.manifest.spec == before.manifest.spec
        for name in set(before.manifest.members) - {MANIFEST}:
            assert after.member(name) == before.member(name)
    assert [p.name for p in tmp_path.iterdir()] == ["copy.engine"]


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.01, r"0\.01 needs at least 99 held-out normal images, got 48;.*0\.02041"),
        (0.0, r"false_alarm_rate: expected a rate in \(0, 1\), got 0\.0"),
        (1.5, r"false_alarm_rate: expected a rate in \(0, 1\), got 1\.5"),
    ],
)
def test_a_sample_too_small_is_refused_before_any_work(
    texture_engine: Path,
    textures: Textures,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    message: str,
) -> None:
    def opened(*_: object, **__: object) -> Predictor:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(evaluation, "open_model", opened)
    with pytest.raises(InputError, match=message):
        calibrate_model(texture_engine, data=textures.calibration, false_alarm_rate=rate)


def test_an_engine_needs_images_to_calibrate(texture_engine: Path) -> None:
    with pytest.raises(InputError, match="pass --data with normal images"):
        calibrate_model(texture_engine)


def test_an_unreadable_image_leaves_the_old_calibration(
    texture_engine: Path, textures: Textures, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(texture_engine, tmp_path / "copy.engine"))
    images = Path(shutil.copytree(textures.calibration, tmp_path / "images"))
    (images / "grain" / "good" / "07.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"07\.png: is not an image"):
        calibrate_model(copy, data=images, false_alarm_rate=FALSE_ALARM_RATE)
    assert copy.read_bytes() == texture_engine.read_bytes()


def test_missing_models_are_named(textures: Textures, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.engine"):
        evaluate(tmp_path / "none.engine", textures.root)
    with pytest.raises(InputError, match="expected a run folder or checkpoint"):
        evaluate(tmp_path, textures.root)


def test_the_manifest_reads_alike_from_engine_and_run(
    texture_engine: Path, texture_run: Path
) -> None:
    engine, run = read_manifest(texture_engine), read_manifest(texture_run)
    assert engine.spec == run.spec
    assert engine.calibration == run.calibration
    assert run.variants == ()
