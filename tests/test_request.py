"""Options of a call: the same ones, with the same defaults, wherever images go in."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import numpy as np
import pytest
from fake_engine import CALIBRATION, fake_predictor

from fastad import Prediction, Predictor
from fastad.errors import InputError
from fastad.request import Options, check_options

IMAGE = np.zeros((4, 4, 3), np.uint8)


def named(call: Callable[..., Any]) -> dict[str, object]:
    """Keyword-only parameters and their defaults."""
    found = signature(call).parameters.values()
    return {each.name: each.default for each in found if each.kind is Parameter.KEYWORD_ONLY}


def test_predict_spells_out_the_options_that_are_checked() -> None:
    assert named(Predictor.predict) == named(check_options)
    assert named(check_options).keys() == Options.__annotations__.keys()


@pytest.mark.parametrize("call", ["predict", "iterate", "submit", "stream"])
def test_a_name_that_is_no_option_is_refused_at_the_call(predictor: Predictor, call: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
        getattr(predictor, call)(IMAGE, treshold=1.0)


@pytest.mark.parametrize("call", ["predict", "iterate", "submit", "stream"])
def test_an_option_that_cannot_be_used_is_refused_at_the_call(
    predictor: Predictor, call: str
) -> None:
    with pytest.raises(ValueError, match="category: expected one of grain, stripes, got 'wood'"):
        getattr(predictor, call)([IMAGE], category="wood")


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, int])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_threshold_of_any_number_type_is_written_as_json(
    kind: Callable[[float], float], calibrated: bool
) -> None:
    opened, _ = fake_predictor((4, 4), calibration=CALIBRATION if calibrated else None)
    found = opened.predict(IMAGE, threshold=kind(2))
    assert isinstance(found, Prediction)
    line = json.loads(found.to_json())
    assert (line["threshold"], line["pred_label"]) == (2.0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": True}, "threshold: expected a finite number, got True"),
        ({"value_range": ()}, r"value_range: expected two finite grey levels .*, got \(\)"),
    ],
)
def test_what_only_looks_like_none_or_a_number_is_refused(
    predictor: Predictor, options: Options, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        predictor.predict(IMAGE, **options)


def test_a_range_may_be_an_array(predictor: Predictor) -> None:
    image = np.full((4, 4), 4095, np.uint16)
    found = predictor.predict(image, value_range=np.array([0, 4095]))  # type: ignore[arg-type]  # a pair too
    known = predictor.predict(image, value_range=(0, 4095))
    assert isinstance(found, Prediction) and isinstance(known, Prediction)
    assert found.raw_score == known.raw_score
