"""A threshold for tiles or a region: the calibration's rule on scores made the same way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_engine import CALIBRATION, fake_predictor
from numpy.typing import NDArray
from textures import Outcome, Textures

from fastad import Predictor
from fastad.calibration import calibrate
from fastad.errors import InputError
from fastad.images import expand
from fastad.request import Options

WAYS: list[Options] = [
    {"tile": 20},
    {"tile": (20, 30), "overlap": 0.5},
    {"region": [(5, 5, 30, 30)]},
    {"tile": 20, "ignore": [(0, 0, 25, 40)]},
    {"color": "bgr"},
]


def normal_images(count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, rng.integers(40, 250), (40, 60, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_is_the_calibrated_threshold_of_scores_made_the_same_way(options: Options) -> None:
    predictor, _ = fake_predictor((16, 24), calibration=CALIBRATION)
    images = normal_images(39)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning about tiles is not for whoever follows it
        found = predictor.find_threshold(images, false_alarm_rate=0.05, **options)
        results = list(predictor.iterate(images, **(options | {"threshold": found.value})))
    scores = np.array([result.raw_score for result in results])
    assert found == calibrate(scores, ["any"] * 39, (0.0, 1.0), 0.05).pooled
    assert sum(result.pred_label is True for result in results) == 1  # k is 38 of 39
    whole = predictor.find_threshold(images, false_alarm_rate=0.05)
    assert found != whole


def test_progress_counts_every_image() -> None:
    predictor, _ = fake_predictor((16, 24))
    seen: list[tuple[int, int]] = []
    predictor.find_threshold(
        normal_images(19),
        false_alarm_rate=0.05,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 19) for i in range(1, 20)]


@pytest.mark.parametrize(
    ("count", "rate", "message"),
    [
        (18, 0.05, "0.05 needs at least 19 held-out normal images, got 18"),
        (0, 0.05, "needs at least 19 held-out normal images, got 0; add normal images"),
        (30, 0.0, r"false_alarm_rate: expected a rate in \(0, 1\)"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_any_image_runs(
    count: int, rate: float, message: str
) -> None:
    predictor, runtime = fake_predictor((16, 24))
    with pytest.raises(InputError, match=message):
        predictor.find_threshold(normal_images(count), false_alarm_rate=rate)
    assert runtime.counts == []


def test_a_threshold_to_find_one_is_refused() -> None:
    predictor, _ = fake_predictor((16, 24))
    with pytest.raises(InputError, match="threshold: it is what is looked for; leave it out"):
        predictor.find_threshold(normal_images(19), false_alarm_rate=0.05, threshold=1.0)


def test_the_command_prints_what_predict_takes(
    cli: Callable[..., Outcome], texture_engine: Path, predictor: Predictor, textures: Textures
) -> None:
    before = texture_engine.read_bytes()
    area = ("--tile", "48", "--overlap", "0.5")
    done = cli(
        *("threshold", texture_engine, textures.calibration, *area),
        *("--false-alarm-rate", "0.05", "--json"),
    )
    assert done.code == 0
    found = json.loads(done.out)
    images = expand([textures.calibration])
    expected = predictor.find_threshold(images, false_alarm_rate=0.05, tile=48, overlap=0.5)
    assert found["threshold"] == pytest.approx(expected.value, rel=1e-5)
    assert (found["count"], found["false_alarm_rate"]) == (len(images), 0.05)
    assert texture_engine.read_bytes() == before
    done = cli("predict", texture_engine, images[0], *area, "--threshold", found["threshold"])
    assert "warning" not in done.err
    assert json.loads(done.out)["threshold"] == found["threshold"]


def test_the_command_refuses_too_few_images(
    cli: Callable[..., Outcome], texture_engine: Path, textures: Textures
) -> None:
    done = cli("threshold", texture_engine, textures.calibration)
    assert (done.code, done.out) == (1, "")
    assert "0.01 needs at least 99 held-out normal images, got 48" in done.err
    assert "pass --false-alarm-rate 0.02041" in done.err
