"""Lower precisions of an engine, judged again when its thresholds change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad import calibration
from fastad.engine.container import EngineFile, read_engine
from fastad.engine.select import open_runtime, why_inexact
from fastad.errors import EngineError, FastadWarning, UnsupportedError
from fastad.spec import GateReport, Variant
from fastad.training.folder import Sample, load_images

BATCH = 8
Progress = Callable[[str, int, int], None]  # stage, done, total
Alarms = tuple[float, tuple[float, float]]  # share of normal images, and its 95 % interval


def rejudge(
    path: Path,
    threshold: float,
    samples: Sequence[Sample],
    runtime: str,
    scores: Sequence[float],
    progress: Progress | None,
) -> tuple[Variant, ...]:
    """An engine's variants, judged by their false alarms at a new threshold.

    A variant that cannot run here is refused. One that the gate refused at export has no parity
    report and stays refused; one that was refused here is judged again every time, with a
    `FastadWarning` to the caller of the calling function.

    Args:
        path: The engine file; it is only read.
        threshold: The pooled one.
        samples: The normal images of the calibration.
        runtime: Name of the runtime that gave ``scores``.
        scores: Of ``samples`` in float32.
        progress: Called with stage, images done and images in all.

    Raises:
        InputError: an image cannot be read.
        EngineError: the file is damaged.
    """
    with read_engine(path) as engine:
        base, *lower = engine.manifest.variants
        scorer = _Scorer(engine, samples, progress, {runtime: np.array(scores)})
        judged: list[Variant] = []
        for variant in lower:
            if _was_refused_at_export(variant):
                old = [_with_alarms(report, None, report.refused) for report in variant.gate]
                judged.append(replace(variant, gate=tuple(old)))
                continue
            judged.append(_judge_variant(scorer, variant, threshold))
            for report in judged[-1].gate:
                if report.refused:
                    text = f"{path}: {report.runtime} {report.precision} is refused from now on"
                    warnings.warn(f"{text}: {report.refused}", FastadWarning, stacklevel=3)
    own_gate = []
    for report in base.gate:
        above = scorer.full.get(report.runtime)
        alarms = None if above is None else _rate(above > threshold)
        own_gate.append(_with_alarms(report, alarms, report.refused))
    own_parity = []
    for p in base.parity:
        if p.runtime in scorer.full:
            flips = (scorer.full[p.runtime] > threshold) != (scorer.full[runtime] > threshold)
            p = replace(p, decision_flips=int(flips.sum()))
        own_parity.append(p)
    return (replace(base, gate=tuple(own_gate), parity=tuple(own_parity)), *judged)


@dataclass
class _Scorer:
    """Scores of the images by the graphs of an open engine; float32's are computed once."""

    engine: EngineFile
    samples: Sequence[Sample]
    progress: Progress | None
    full: dict[str, NDArray[Any]] = field(default_factory=dict)  # what is known, by runtime

    def full_scores(self, name: str) -> NDArray[Any]:
        if name not in self.full:
            self.full[name] = self.scores(self.engine.manifest.variants[0].member, name, "fp32")
        return self.full[name]

    def scores(self, member: str, name: str, precision: str) -> NDArray[Any]:
        """Raw scores [N] of one graph on one runtime."""
        spec, total = self.engine.manifest.spec.input, len(self.samples)
        opened = open_runtime(self.engine.member(member), name, precision, "cpu", cache=False)
        found: list[NDArray[np.float32]] = []
        try:
            batches = load_images(self.samples, spec.size, spec.value_range, batch_size=BATCH)
            for done, (batch, _) in enumerate(batches, 1):
                found.append(opened.run(batch)[1])
                if self.progress:
                    self.progress(f"{name} {precision}", min(BATCH * done, total), total)
        finally:
            opened.close()
        return np.concatenate(found)


def _was_refused_at_export(variant: Variant) -> bool:
    return not variant.parity and all(report.refused for report in variant.gate)


def _judge_variant(scorer: _Scorer, variant: Variant, threshold: float) -> Variant:
    """The variant with new alarms and reasons."""
    gate, flips = [], {}
    for report in variant.gate:
        judged, flips[report.runtime] = _judge(scorer, variant, report, threshold)
        gate.append(judged)
    parity = []
    for p in variant.parity:
        changed = flips.get(p.runtime)
        parity.append(p if changed is None else replace(p, decision_flips=changed))
    return replace(variant, gate=tuple(gate), parity=tuple(parity))


def _judge(
    scorer: _Scorer, variant: Variant, report: GateReport, threshold: float
) -> tuple[GateReport, int | None]:
    """One report with new alarms, and how many decisions differ from float32's, if it ran."""
    name = report.runtime
    try:
        if inexact := why_inexact(variant):
            raise UnsupportedError(inexact)
        full = scorer.full_scores(name)
        own = scorer.scores(variant.member, name, report.precision)
    except (EngineError, UnsupportedError) as error:
        reason = f"the threshold changed after the gate; export again: {error}"
        return _with_alarms(report, None, reason), None
    if not np.isfinite(own).all():
        return _with_alarms(report, None, "some outputs are NaN or infinite"), None
    alarms, expected = own > threshold, full > threshold
    rate, interval = float(alarms.mean()), _rate(expected)[1]
    reason = calibration.false_alarm_refusal(rate, interval, len(own))
    return _with_alarms(report, (rate, interval), reason), int((alarms != expected).sum())


def _rate(alarms: NDArray[np.bool_]) -> Alarms:
    interval = calibration.false_alarm_interval(int(alarms.sum()), len(alarms))
    return float(alarms.mean()), interval


def _with_alarms(report: GateReport, alarms: Alarms | None, refused: str) -> GateReport:
    """A gate report with another rate and interval, or none, and another reason."""
    rate, interval = alarms or (None, None)
    return replace(report, false_alarm_rate=rate, false_alarm_interval=interval, refused=refused)
