"""The accuracy gate: may a faster variant replace float32 of the same runtime?

With labelled test images the question is asked in the users' own terms: AUROC and AUPRO may fall by
at most the tenths of a point that `Limits` names. Without them only normal images speak, and a rule
is needed that can still fail. It has two parts. The order of the normal scores must stay: they lie
close together, so a rank correlation below 0.9 means that the change of precision moves scores by
as much as the images themselves do, and a threshold set on one says little about the other. The
mean error of the maps must stay within 2 % of their range on normal images: heat maps span twice
the range of normal peaks, so 2 % is at most one grey level in a hundred, and the range on defects
is larger still. The largest error decides nothing: where a method steps (GRAD's
``mse <= threshold``), single pixels may step in any other arithmetic. With fewer than `MIN_IMAGES`
images a rank correlation is chance, so nothing can pass.

Either way the false-alarm rate at the calibrated threshold must lie inside the 95 % interval that
float32's own alarms prove, and every output must be finite. The images that a variant is judged by
are not those that its value ranges were measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad import calibration
from fastad.engine.base import Runtime
from fastad.metrics import PixelMetrics, image_scores
from fastad.spec import GateReport, InputSpec
from fastad.training.folder import Sample, load_images, read_mask

BATCH = 8  # what the predictor runs at once
MIN_IMAGES = 8


@dataclass(frozen=True)
class Limits:
    """What a variant may lose; changes of metrics in points of 0..100."""

    auroc_loss: float = 0.1  # image and pixel AUROC each
    aupro_loss: float = 0.3
    rank_correlation: float = 0.9  # without labels, at least
    map_mean: float = 0.02  # without labels, at most, of the range of float32's maps


@dataclass(frozen=True)
class GateImages:
    """Normal images the model never trained on, then labelled ones if there are any."""

    pixels: NDArray[np.uint8]  # [N, H, W, 3]
    samples: tuple[Sample, ...]  # [N], the first `normal` of no test set
    normal: int

    @property
    def labelled(self) -> int:
        """Count of labelled test images."""
        return len(self.samples) - self.normal


def load_gate_images(
    held_out: Sequence[Sample], labelled: Sequence[Sample], spec: InputSpec
) -> GateImages:
    """Read the images at model size.

    Raises:
        InputError: an image cannot be read.
    """
    samples = (*held_out, *labelled)
    batches = [pixels for pixels, _ in load_images(samples, spec.size, spec.value_range)]
    return GateImages(np.concatenate(batches), samples, len(held_out))


@dataclass
class _Metrics:
    """One runtime's scores, and its AUROC and AUPRO per category."""

    scores: list[float]
    pixels: dict[str, PixelMetrics]
    masked: set[str]

    def add(self, sample: Sample, anomaly_map: NDArray[np.float32], labelled: bool) -> None:
        if not labelled or (sample.is_anomalous and sample.mask_path is None):
            return
        metrics = self.pixels.setdefault(sample.category, PixelMetrics())
        H, W = anomaly_map.shape
        metrics.add(anomaly_map, read_mask(sample, (H, W)) if sample.is_anomalous else None)
        if sample.is_anomalous:
            self.masked.add(sample.category)

    def points(self, images: GateImages) -> tuple[float | None, float | None, float | None]:
        """Mean over categories of image AUROC, pixel AUROC and AUPRO, 0..100."""
        tested = images.samples[images.normal :]
        scores = np.array(self.scores[images.normal :])
        labels = np.array([s.is_anomalous for s in tested], bool)
        names = np.array([s.category for s in tested])
        image = [image_scores(scores[names == c], labels[names == c]).auroc for c in set(names)]
        pixel = [self.pixels[name].compute() for name in sorted(self.masked)]
        return _mean(image), _mean([p.auroc for p in pixel]), _mean([p.aupro for p in pixel])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 100.0 * float(np.mean(known)) if known else None


def rank_correlation(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Spearman's correlation of two samples [N]; ties share ranks, no spread at all counts as 0.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 20.0, 300.0]))
    1.0
    """
    ranks = []
    for values in (first, second):
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(count)
        ranks.append((ends - (count - 1) / 2.0)[group])
    a, b = (r - r.mean() for r in ranks)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return round(float(a @ b) / spread, 12) if spread > 0 else 0.0


def measure(
    runtime: Runtime, reference: Runtime, images: GateImages, threshold: float | None
) -> GateReport:
    """Compare a runtime with float32 of the same name, batch by batch; times stay 0.

    The report is `judge`d by the caller; outputs that are not finite are refused here.
    """
    own, ref = (_Metrics([], {}, set()) for _ in range(2))
    low, high, worst, total = np.inf, -np.inf, 0.0, 0.0
    for start in range(0, len(images.pixels), BATCH):
        batch = images.pixels[start : start + BATCH]
        (maps, scores), (ref_maps, ref_scores) = runtime.run(batch), reference.run(batch)
        if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
            return _not_finite(runtime, images)
        difference = np.abs(maps - ref_maps)
        worst, total = (
            max(worst, float(difference.max())),
            total + float(difference.mean(axis=(1, 2)).sum()),
        )
        low, high = min(low, float(ref_maps.min())), max(high, float(ref_maps.max()))
        own.scores += scores.tolist()
        ref.scores += ref_scores.tolist()
        for i, sample in enumerate(images.samples[start : start + BATCH], start):
            own.add(sample, maps[i - start], i >= images.normal)
            ref.add(sample, ref_maps[i - start], i >= images.normal)
    span = max(high - low, float(np.finfo(np.float32).tiny))
    rate = interval = None
    if threshold is not None and images.normal:
        alarms = [int((np.array(m.scores[: images.normal]) > threshold).sum()) for m in (own, ref)]
        rate = alarms[0] / images.normal
        interval = calibration.false_alarm_interval(alarms[1], images.normal)
    changes = [
        None if a is None or b is None else a - b
        for a, b in zip(own.points(images), ref.points(images), strict=True)
    ]
    return GateReport(
        runtime=runtime.name,
        precision=runtime.precision,
        normal_images=images.normal,
        test_images=images.labelled,
        map_max=worst / span,
        map_mean=total / len(images.pixels) / span,
        score_rank_correlation=rank_correlation(np.array(own.scores), np.array(ref.scores)),
        false_alarm_rate=rate,
        false_alarm_interval=interval,
        image_auroc_change=changes[0],
        pixel_auroc_change=changes[1],
        aupro_change=changes[2],
        ms_batch1=0.0,
        ms_batch8=0.0,
    )


def _not_finite(runtime: Runtime, images: GateImages) -> GateReport:
    return GateReport(
        runtime=runtime.name,
        precision=runtime.precision,
        normal_images=images.normal,
        test_images=images.labelled,
        map_max=1.0,
        map_mean=1.0,
        score_rank_correlation=0.0,
        false_alarm_rate=None,
        false_alarm_interval=None,
        image_auroc_change=None,
        pixel_auroc_change=None,
        aupro_change=None,
        ms_batch1=0.0,
        ms_batch8=0.0,
        refused="some outputs are NaN or infinite",
    )


def judge(report: GateReport, limits: Limits) -> GateReport:
    """The report with ``refused`` set: the first rule that failed, or empty."""
    return report if report.refused else replace(report, refused=_failed_rule(report, limits))


def _failed_rule(r: GateReport, limits: Limits) -> str:
    labelled = r.image_auroc_change is not None or r.pixel_auroc_change is not None
    for name, change, limit in (
        ("image AUROC", r.image_auroc_change, limits.auroc_loss),
        ("pixel AUROC", r.pixel_auroc_change, limits.auroc_loss),
        ("AUPRO", r.aupro_change, limits.aupro_loss),
    ):
        if change is not None and not change >= -limit:
            return f"{name} changes by {change:+.2f} points, allowed is -{limit:g}"
    if not labelled:
        images = r.normal_images + r.test_images
        if images < MIN_IMAGES:
            return (
                f"{images} held-out normal images prove nothing, {MIN_IMAGES} are needed; hold out "
                "more, or pass labelled images with --test-data"
            )
        if not r.score_rank_correlation >= limits.rank_correlation:
            return (
                f"scores of normal images correlate by rank to {r.score_rank_correlation:.3f}, "
                f"needed is {limits.rank_correlation:g}"
            )
        if not r.map_mean <= limits.map_mean:
            return (
                f"maps differ by {r.map_mean:.2%} of their range on average, allowed is "
                f"{limits.map_mean:.2%}"
            )
    if r.false_alarm_rate is not None and r.false_alarm_interval is not None:
        low, high = r.false_alarm_interval
        if not low <= r.false_alarm_rate <= high:
            return (
                f"{r.false_alarm_rate:.2%} false alarms on {r.normal_images} normal images, "
                f"float32's own prove a rate of {low:.2%} to {high:.2%}"
            )
    return ""
