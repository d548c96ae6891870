"""Engines that earlier versions wrote stay readable: files committed once and never made again.

``grad-format1.engine`` is a GRAD on mobilenetv3_small_050 at 32 px, written by fastad 0.1.0 with
a domain node, calibration and the accuracy gate's reports of fp32 and bf16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastad.engine.container import read_engine
from fastad.engine.parity import verify
from fastad.engine.select import RUNTIMES, why_unsupported
from fastad.predictor import load

ENGINES = sorted((Path(__file__).parent / "engines").glob("*.engine"))


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_old_engine_still_verifies(path: Path) -> None:
    reports, _ = verify(path)
    able = {name for name in RUNTIMES if why_unsupported(name, "fp32") is None}
    assert {report.runtime for report in reports if report.precision == "fp32"} >= able
    assert {report.decision_flips for report in reports if report.precision == "fp32"} == {0}


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_old_engine_still_predicts(path: Path) -> None:
    with read_engine(path) as engine:
        golden, manifest = engine.golden(), engine.manifest
    assert manifest.calibration is not None
    with load(path, precision="fp32") as predictor:
        found = predictor.predict(list(golden.images))
    assert isinstance(found, list)
    scores = [prediction.raw_score for prediction in found]
    np.testing.assert_allclose(scores, golden.raw_score, rtol=1e-4)
    limit = manifest.calibration.pooled.value
    assert [p.pred_label for p in found] == [bool(s > limit) for s in golden.raw_score]


def test_there_is_an_old_engine_and_it_is_small() -> None:
    assert ENGINES
    assert max(path.stat().st_size for path in ENGINES) < 300_000
