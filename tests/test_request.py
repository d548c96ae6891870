"""Options of a call: the same ones, with the same defaults, wherever images go in."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import numpy as np
import pytest

from fastad import Predictor
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
