"""The predictor: what it takes, what it gives back, and what never changes its answers."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from textures import CATEGORIES, MODEL_SIZE, H, Textures, W

from fastad import Prediction, Predictor, load
from fastad.engine.base import Outputs, Precision
from fastad.errors import EngineError, FastadError, InputError, UnsupportedError
from fastad.predictor import BATCH
from fastad.preprocess import Source

# Other batch sizes sum in another order: a few float32 ulp over some hundred terms, seen 2e-6.
BATCH_TOLERANCE = 2e-5


class FakeRuntime:
    """Answers with the mean of each image; remembers the batches it saw."""

    name = "fake"
    precision: Precision = "fp32"

    def __init__(self, score: float | None = None) -> None:
        self.score = score
        self.batches: list[int] = []

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        self.batches.append(len(images))
        maps = images.mean(axis=3, dtype=np.float32)
        scores = maps.mean(axis=(1, 2))
        return maps, scores if self.score is None else np.full_like(scores, self.score)

    def close(self) -> None:
        pass


def fake(predictor: Predictor, **changes: Any) -> tuple[Predictor, FakeRuntime]:
    runtime = FakeRuntime(changes.pop("score", None))
    return Predictor(replace(predictor.manifest, **changes), runtime), runtime


def one(found: Prediction | list[Prediction]) -> Prediction:
    assert isinstance(found, Prediction)
    return found


def many(found: Prediction | list[Prediction]) -> list[Prediction]:
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def image(textures: Textures) -> Path:
    return textures.root / "stripes" / "test" / "hole" / "00.png"


@pytest.fixture(scope="module")
def pixels(image: Path) -> NDArray[np.uint8]:
    return np.array(Image.open(image))


def to_tensor(rgb: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(rgb).permute(2, 0, 1)


FORMS: dict[str, tuple[Callable[[Path, NDArray[np.uint8]], object], dict[str, Any]]] = {
    "str": (lambda path, _: str(path), {}),
    "path": (lambda path, _: path, {}),
    "pil": (lambda path, _: Image.open(path), {}),
    "uint8 HWC": (lambda _, rgb: rgb, {}),
    "uint8 HWC strided": (lambda _, rgb: np.asfortranarray(rgb), {}),
    "uint8 HWC with alpha": (lambda _, rgb: np.dstack([rgb, rgb[..., :1]]), {}),
    "uint8 HWC bgr": (lambda _, rgb: rgb[..., ::-1], {"color": "bgr"}),
    "float32 HWC": (lambda _, rgb: rgb / np.float32(255), {}),
    "tensor uint8 CHW": (lambda _, rgb: to_tensor(rgb), {}),
    "tensor float CHW": (lambda _, rgb: to_tensor(rgb) / 255, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_image_in_any_form_gives_one_equal_prediction(
    predictor: Predictor, image: Path, pixels: NDArray[np.uint8], form: str
) -> None:
    make, arguments = FORMS[form]
    expected = one(predictor.predict(image))
    found = one(predictor.predict(make(image, pixels), **arguments))
    assert found.raw_score == expected.raw_score
    assert found.orig_shape == (H, W)
    np.testing.assert_array_equal(found.model_map, expected.model_map)


@pytest.mark.parametrize("form", ["HW", "HW1"])
def test_gray_is_rgb_with_equal_channels(
    predictor: Predictor, pixels: NDArray[np.uint8], form: str
) -> None:
    gray = pixels[..., 0] if form == "HW" else pixels[..., :1]
    expected = one(predictor.predict(np.repeat(pixels[..., :1], 3, axis=2)))
    assert one(predictor.predict(gray, color="gray")).raw_score == expected.raw_score


def test_swapped_colors_are_another_image(predictor: Predictor, pixels: NDArray[np.uint8]) -> None:
    scores = {one(predictor.predict(pixels, color=color)).raw_score for color in ("rgb", "bgr")}
    assert len(scores) == 2


@pytest.mark.parametrize("form", ["list", "tuple", "NHWC", "tensor BCHW"])
def test_several_images_give_a_list(
    predictor: Predictor, pixels: NDArray[np.uint8], form: str
) -> None:
    batch = np.stack([pixels, pixels[::-1]])
    given: dict[str, object] = {
        "list": list(batch),
        "tuple": tuple(batch),
        "NHWC": batch,
        "tensor BCHW": torch.from_numpy(batch).permute(0, 3, 1, 2),
    }
    found = many(predictor.predict(given[form]))
    expected = many(predictor.predict(list(batch)))
    assert [p.raw_score for p in found] == [p.raw_score for p in expected]
    assert found[0].raw_score != found[1].raw_score


def test_a_list_of_one_gives_a_list_of_one(predictor: Predictor, image: Path) -> None:
    assert len(many(predictor.predict([image]))) == 1


def test_no_images_give_no_predictions(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


def test_a_list_mixes_kinds_and_sizes(
    predictor: Predictor, image: Path, pixels: NDArray[np.uint8]
) -> None:
    mixed = [image, pixels[:40, :50], Image.fromarray(pixels[:, :33]), to_tensor(pixels[5:, 7:])]
    found = many(predictor.predict(mixed))
    assert [p.orig_shape for p in found] == [(H, W), (40, 50), (H, 33), (H - 5, W - 7)]
    assert [p.anomaly_map.shape for p in found] == [p.orig_shape for p in found]
    for item, prediction in zip(mixed, found, strict=True):
        alone = one(predictor.predict(item)).raw_score
        assert prediction.raw_score == pytest.approx(alone, rel=BATCH_TOLERANCE)


def test_results_do_not_depend_on_the_batch_they_travelled_in(
    predictor: Predictor, textures: Textures
) -> None:
    paths = textures.images()
    assert len(paths) > 2 * BATCH
    together = many(predictor.predict(paths))
    assert [p.path for p in together] == paths
    for path, prediction in zip(paths, together, strict=True):
        alone = one(predictor.predict(path))
        bound = BATCH_TOLERANCE * float(np.ptp(alone.model_map))
        np.testing.assert_allclose(prediction.model_map, alone.model_map, rtol=0, atol=bound)


def test_batches_are_split(predictor: Predictor) -> None:
    opened, runtime = fake(predictor)
    opened.predict(np.zeros((2 * BATCH + 3, 8, 8, 3), np.uint8))
    assert runtime.batches == [BATCH, BATCH, 3]


def test_calling_is_predicting(predictor: Predictor, image: Path) -> None:
    assert one(predictor(image)).raw_score == one(predictor.predict(image)).raw_score


def test_a_threshold_holds_for_its_call_only(predictor: Predictor, image: Path) -> None:
    before = one(predictor.predict(image))
    assert one(predictor.predict(image, threshold=before.raw_score + 1)).pred_label is False
    assert one(predictor.predict(image, threshold=before.raw_score - 1)).pred_label is True
    after = one(predictor.predict(image))
    assert (after.threshold, after.pred_label) == (before.threshold, before.pred_label)
    assert predictor.manifest.calibration is not None
    assert after.threshold == predictor.manifest.calibration.pooled.value


def test_a_tie_is_normal(predictor: Predictor, image: Path) -> None:
    raw = one(predictor.predict(image)).raw_score
    tie = one(predictor.predict(image, threshold=raw))
    assert (tie.pred_label, tie.pred_score) == (False, 0.5)
    above = one(predictor.predict(image, threshold=float(np.nextafter(raw, -np.inf))))
    assert above.pred_label is True
    assert above.pred_score is not None and above.pred_score > 0.5


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_category_has_its_own_threshold(predictor: Predictor, image: Path, category: str) -> None:
    fitted = predictor.manifest.calibration
    assert fitted is not None
    found = one(predictor.predict(image, category=category))
    assert (found.category, found.threshold) == (category, fitted.per_category[category].value)
    assert len({own.value for own in fitted.per_category.values()}) == len(CATEGORIES)


def test_calibrated_scores_keep_the_order_of_raw_ones(
    predictor: Predictor, textures: Textures
) -> None:
    found = many(predictor.predict(textures.images()))
    raw = [p.raw_score for p in found]
    scores = [p.pred_score for p in found if p.pred_score is not None]
    assert len(set(raw)) == len(set(scores)) == len(found)
    assert np.argsort(raw).tolist() == np.argsort(scores).tolist()
    assert all(0 < score < 1 for score in scores)
    assert [score > 0.5 for score in scores] == [p.pred_label for p in found]


def test_eight_threads_give_the_answers_of_one(predictor: Predictor, textures: Textures) -> None:
    paths = textures.images()
    expected = [one(predictor.predict(path)).model_map for path in paths]

    def look(start: int) -> list[tuple[int, NDArray[np.float32]]]:
        order = [(start + i) % len(paths) for i in range(len(paths))]
        return [(i, one(predictor.predict(paths[i])).model_map) for i in order]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for part in pool.map(look, range(8)) for answer in part]
    assert len(answers) == 8 * len(paths)
    assert all(np.array_equal(found, expected[i]) for i, found in answers)


def test_later_calls_leave_earlier_results_alone(
    predictor: Predictor, image: Path, textures: Textures
) -> None:
    first = one(predictor.predict(image))
    kept = first.model_map.copy()
    predictor.predict(textures.images())
    np.testing.assert_array_equal(first.model_map, kept)


def test_speed_names_every_stage(predictor: Predictor, image: Path) -> None:
    first, second = many(predictor.predict([image, image]))
    assert list(first.speed) == ["decode", "preprocess", "inference", "postprocess"]
    assert all(0 <= ms < 60_000 for ms in first.speed.values())
    assert first.speed["inference"] > 0
    assert first.speed is not second.speed


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_refuses_to_be_pickled_or_copied(
    predictor: Predictor, how: Callable[[object], object]
) -> None:
    with pytest.raises(InputError, match=r"cannot be pickled.*fastad\.load in the other process"):
        how(predictor)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_closed_predictor_says_so(texture_engine: Path, image: Path, runtime: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    with load(texture_engine, runtime=runtime, threads=1) as opened:
        running = opened.iterate([image] * (BATCH + 1))
        for _ in range(BATCH):
            next(running)
    with pytest.raises(InputError, match=r"closed; call fastad\.load again"):
        opened.predict(image)
    with pytest.raises(InputError, match="closed"):
        next(running)
    with pytest.raises(InputError, match="closed"):
        opened.warmup()
    opened.close()  # twice is no error


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"runtime": "tensorflow"}, InputError, "runtime: expected auto, tensorrt, .*got 'tens"),
        ({"precision": "int4"}, InputError, "precision: expected auto, fp32, bf16, .*got 'int4'"),
        ({"device": "tpu"}, InputError, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"threads": 0}, InputError, "threads: expected a whole number of at least 1, got 0"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, UnsupportedError, "onnxruntime"),
    ],
)
def test_load_refuses(
    texture_engine: Path, arguments: dict[str, Any], error: type[FastadError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(texture_engine, **arguments)


@pytest.mark.parametrize("method", ["predict", "iterate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "strips"}, "category: expected one of grain, stripes, got 'strips'"),
        ({"threshold": float("nan")}, "threshold: expected a finite number, got nan"),
        ({"threshold": "high"}, "threshold: expected a finite number, got 'high'"),
        ({"color": "rbg"}, "color: expected one of"),
        ({"value_range": (5, 5)}, "value_range: expected two finite grey levels"),
    ],
)
def test_refuses_arguments_at_the_call(
    predictor: Predictor, image: Path, method: str, arguments: dict[str, Any], message: str
) -> None:
    opened, runtime = fake(predictor)
    with pytest.raises(InputError, match=message):
        getattr(opened, method)([image], **arguments)
    assert runtime.batches == []


@pytest.mark.parametrize("method", ["predict", "iterate"])
def test_refuses_unknown_keywords(predictor: Predictor, image: Path, method: str) -> None:
    with pytest.raises(TypeError, match="treshold"):
        getattr(predictor, method)([image], treshold=1.0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("missing.png", "missing.png: no such file"),
        (None, "image: expected a path, a PIL image"),
        ([np.zeros((4, 4, 3), np.uint8), 7], r"images\[1\]: expected a path"),
        (np.zeros((4, 4), np.int64), "expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((2, 2, 4, 4, 3), np.uint8), r"\[2, 2, 4, 4, 3\]"),
        (np.full((4, 4, 3), 2.0), r"expected float64 in 0\.\.1, got 2\.\.2"),
        (np.full((4, 4, 3), np.nan, np.float32), r"expected float32 in 0\.\.1"),
        (np.zeros((4, 4), np.uint16), "which of them are black and white must be declared"),
    ],
)
def test_refuses_what_is_no_image(predictor: Predictor, images: object, message: str) -> None:
    opened, runtime = fake(predictor)
    with pytest.raises(InputError, match=message):
        opened.predict(images)
    assert runtime.batches == []


def test_uint16_takes_its_declared_range(predictor: Predictor, pixels: NDArray[np.uint8]) -> None:
    levels = pixels[..., 0].astype(np.uint16) * 16
    found = one(predictor.predict(levels, value_range=(0, 255 * 16)))
    assert found.raw_score == one(predictor.predict(pixels[..., 0])).raw_score


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_no_verdict(
    predictor: Predictor, image: Path, score: float
) -> None:
    opened, _ = fake(predictor, score=score, calibration=None)
    with pytest.raises(EngineError, match=r"00\.png: the raw score is (nan|inf) on fake fp32"):
        opened.predict(image, threshold=1.0)


def test_without_calibration_there_is_a_score_and_no_verdict(
    predictor: Predictor, image: Path
) -> None:
    opened, _ = fake(predictor, calibration=None)
    found = one(opened.predict(image))
    assert (found.threshold, found.pred_label, found.pred_score) == (None, None, None)
    judged = one(opened.predict(image, threshold=0.0))
    assert (judged.threshold, judged.pred_label, judged.pred_score) == (0.0, True, None)


def test_unreadable_images_are_named_and_left_out(
    predictor: Predictor, image: Path, tmp_path: Path
) -> None:
    cut, text = tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes(image.read_bytes()[:200])
    text.write_text("no image")
    named: list[tuple[Path | None, str]] = []
    found = list(
        predictor.iterate(
            [text, image, cut],
            on_unreadable=lambda source, error: named.append((source.path, str(error))),
        )
    )
    assert [p.path for p in found] == [image]
    assert [path for path, _ in named] == [text, cut]
    assert "text.png: is not an image" in named[0][1]
    assert "cut.png: is damaged or truncated" in named[1][1]
    with pytest.raises(InputError, match=r"cut\.png: is damaged"):
        predictor.predict([image, cut])


def test_iterating_reads_one_batch_ahead_at_most(
    predictor: Predictor, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = fake(predictor)
    read: list[Source] = []
    frame = Source.frame
    monkeypatch.setattr(Source, "frame", lambda self: (read.append(self), frame(self))[1])
    running = opened.iterate([image] * (5 * BATCH))
    assert len(read) == 0
    next(running)
    assert len(read) == BATCH
    assert len(list(running)) == 5 * BATCH - 1


def test_memory_of_iterating_does_not_grow_with_the_number_of_paths(
    predictor: Predictor, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (700, 500)).save(large)
    opened, _ = fake(predictor)

    def peak_bytes(count: int) -> int:
        tracemalloc.start()
        try:
            for prediction in opened.iterate([large] * count):
                assert prediction.anomaly_map.shape == (500, 700)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The longer list costs its paths, far below the 1 MB of one decoded image.
    assert peak_bytes(6 * BATCH) < peak_bytes(2 * BATCH) + 500 * 700 * 3


def test_one_path_can_be_iterated(predictor: Predictor, image: Path) -> None:
    assert [p.path for p in predictor.iterate(str(image))] == [image]


def test_warmup_runs_the_batch_it_is_told(predictor: Predictor) -> None:
    opened, runtime = fake(predictor)
    opened.warmup(3)
    assert runtime.batches == [3]
    with pytest.raises(InputError, match="batch: expected a whole number of at least 1, got 0"):
        opened.warmup(0)


def test_images_of_model_size_reach_the_graph_unchanged(predictor: Predictor) -> None:
    opened, _ = fake(predictor)
    frame = np.random.default_rng(0).integers(0, 256, (*MODEL_SIZE, 3), np.uint8)
    found = one(opened.predict(frame))
    np.testing.assert_array_equal(found.model_map, frame.mean(axis=2, dtype=np.float32))
    np.testing.assert_array_equal(found.anomaly_map, found.model_map)
