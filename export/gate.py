"""The accuracy gate: may a faster variant replace float32 of the same runtime?

Labelled test images ask the question in the users' own terms: AUROC and AUPRO may fall by at most
the tenths of a point that `Limits` names. Normal images need rules that can fail without labels.
The order of their scores must stay: they lie close together, so a rank correlation below 0.9 means
that the change of precision moves scores by as much as the images themselves do, and a threshold
set on one says little about the other. The mean error of the maps must stay within 2 % of their
range: heat maps span twice the range of normal peaks, so 2 % is at most one grey level in a
hundred, and the range on defects is larger still. The largest error decides nothing: where a method
steps (GRAD's ``mse <= threshold``), single pixels may step in any other arithmetic. With fewer than
`MIN_IMAGES` normal images a rank correlation is chance, so nothing can pass.

Labels replace a rule for normal images only where they judge the same thing: image AUROC the order
of scores, pixel AUROC and AUPRO the maps. They do so from `MIN_LABELLED` images of each kind on,
and the scores only where one pair of images that changes order is no more than the limit. With
fewer, AUROC can fall by one pair or not at all: one pair is allowed, and both sets of rules apply.

Always the false-alarm rate at the calibrated threshold must lie inside the 95 % interval that
float32's own alarms prove, and every output must be finite. The images that a variant is judged by
are not those that its value ranges were measured on.

They are, however, those that the layers left in float32 were chosen with: the search ranks layers
by a few of these images and stops at the first choice that passes on all of them. What passed after
a search is therefore the best of up to seven tries on these very images, and its report is a little
better than new images would show. It is no estimate of accuracy: for that, `fastad evaluate` the
precision on labelled images that the export never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
MIN_LABELLED = 8  # of each kind, normal and anomalous


@dataclass(frozen=True)
class Limits:
    """What a variant may lose; changes of metrics in points of 0..100."""

    auroc_loss: float = 0.1  # image and pixel AUROC each; of few images at least one pair
    aupro_loss: float = 0.3
    rank_correlation: float = 0.9  # where labels do not judge scores, at least
    map_mean: float = 0.02  # where labels do not judge maps, at most, of float32's range


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

    @property
    def is_normal(self) -> NDArray[np.bool_]:
        """Held-out and labelled normal images alike, bool [N]; training saw neither."""
        return np.array([not sample.is_anomalous for sample in self.samples], bool)

    @property
    def one_pair(self) -> float:
        """Most points of image AUROC that one pair of test images costs by changing its order."""
        tested = self.samples[self.normal :]
        pairs = []
        for name in {sample.category for sample in tested}:
            anomalous = [sample.is_anomalous for sample in tested if sample.category == name]
            pairs.append(sum(anomalous) * (len(anomalous) - sum(anomalous)))
        known = [count for count in pairs if count]
        return 100.0 / (min(known) * len(known)) if known else 0.0

    def count_labelled(self, *, masked: bool = False) -> int:
        """Test images of the rarer kind; ``masked`` counts anomalous ones with a mask only."""
        tested = self.samples[self.normal :]
        normal = sum(not sample.is_anomalous for sample in tested)
        shown = (s for s in tested if s.is_anomalous and (s.mask_path or not masked))
        return min(normal, sum(1 for _ in shown))


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


@dataclass(frozen=True)
class Reference:
    """Float32 of one runtime and its outputs, computed once for all trials; the caller closes it.

    ``points`` are the means over categories of image AUROC, pixel AUROC and AUPRO, 0..100.
    """

    runtime: Runtime
    images: GateImages
    maps: NDArray[np.float32]  # [N, H, W], a third larger than the images
    scores: NDArray[np.float32]  # [N]
    masks: Mapping[int, NDArray[np.bool_]]  # [H, W] of anomalous images, by their index
    points: tuple[float | None, float | None, float | None]

    @property
    def is_finite(self) -> bool:
        """Whether no output is NaN or infinite."""
        return bool(np.isfinite(self.maps).all() and np.isfinite(self.scores).all())


def refer(runtime: Runtime, images: GateImages) -> Reference:
    """Run float32 over the gate's images.

    Raises:
        InputError: a mask cannot be read.
        EngineError: the runtime fails.
    """
    batches = [
        runtime.run(images.pixels[start : start + BATCH])
        for start in range(0, len(images.pixels), BATCH)
    ]
    maps, scores = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    size = (maps.shape[1], maps.shape[2])
    masks = {
        i: read_mask(sample, size)
        for i, sample in enumerate(images.samples)
        if i >= images.normal and sample.is_anomalous and sample.mask_path
    }
    reference = Reference(runtime, images, maps, scores, masks, (None, None, None))
    if not reference.is_finite:
        return reference
    own = _Outputs(reference)
    for i in range(len(maps)):
        own.add(i, maps[i], scores[i])
    return replace(reference, points=own.points())


class _Outputs:
    """What a runtime gave for the images that it ran so far, compared with float32."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.scores = np.zeros(len(reference.scores))
        self.pixels: dict[str, PixelMetrics] = {}
        self.worst = self.total = 0.0
        self.count = 0

    def run(self, runtime: Runtime, which: NDArray[np.intp]) -> bool:
        """Run and compare these images; False, at the first batch that is not finite."""
        for start in range(0, len(which), BATCH):
            part = which[start : start + BATCH]
            maps, scores = runtime.run(self.reference.images.pixels[part])
            if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
                return False
            for i, anomaly_map, score in zip(part.tolist(), maps, scores, strict=True):
                self.add(i, anomaly_map, score)
        return True

    def add(self, i: int, anomaly_map: NDArray[np.float32], score: float) -> None:
        """Count one image."""
        difference = np.abs(anomaly_map - self.reference.maps[i])
        self.worst = max(self.worst, float(difference.max()))
        self.total += float(difference.mean())
        self.count += 1
        self.scores[i] = score
        sample, mask = self.reference.images.samples[i], self.reference.masks.get(i)
        if i >= self.reference.images.normal and (mask is not None or not sample.is_anomalous):
            metrics = self.pixels.setdefault(sample.category, PixelMetrics())
            metrics.add(anomaly_map, mask)

    def points(self) -> tuple[float | None, float | None, float | None]:
        """Mean over categories of image AUROC, pixel AUROC and AUPRO, 0..100; all have run."""
        images = self.reference.images
        tested = images.samples[images.normal :]
        scores = self.scores[images.normal :]
        labels = np.array([s.is_anomalous for s in tested], bool)
        names = np.array([s.category for s in tested])
        image = [image_scores(scores[names == c], labels[names == c]).auroc for c in set(names)]
        masked = {images.samples[i].category for i in self.reference.masks}
        pixel = [self.pixels[name].compute() for name in sorted(masked)]
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
    runtime: Runtime, reference: Reference, threshold: float | None, limits: Limits | None = None
) -> GateReport:
    """Compare a runtime with float32 of the same name, batch by batch; times stay 0.

    Float32 itself is not run again: it loses nothing, and what it gave is known.

    Outputs that are not finite are refused here, all else by `judge`. With ``limits``, normal
    images come first and what they refuse ends it: anomalous images do not run, no metrics are
    computed, and the report's errors are those of the normal images. Whether it is refused is the
    same; the reason may name another of the rules that failed.

    Raises:
        EngineError: the runtime fails.
    """
    images = reference.images
    own, normal = _Outputs(reference), images.is_normal
    is_itself = runtime is reference.runtime
    if not (reference.is_finite if is_itself else own.run(runtime, np.flatnonzero(normal))):
        return _not_finite(runtime, images)
    scores = reference.scores if is_itself else own.scores
    low, high = float(reference.maps.min()), float(reference.maps.max())
    span = max(high - low, float(np.finfo(np.float32).tiny))
    rate = interval = None
    if threshold is not None and normal.any():
        rate = float((scores[normal] > threshold).mean())
        alarms, count = int((reference.scores[normal] > threshold).sum()), int(normal.sum())
        interval = calibration.false_alarm_interval(alarms, count)
    # What is not known yet counts as if nothing were lost.
    report = GateReport(
        runtime=runtime.name,
        precision=runtime.precision,
        normal_images=images.normal,
        test_images=images.labelled,
        map_max=0.0,
        map_mean=0.0,
        score_rank_correlation=rank_correlation(scores[normal], reference.scores[normal]),
        false_alarm_rate=rate,
        false_alarm_interval=interval,
        image_auroc_change=_change(reference.points[0], reference.points[0]),
        pixel_auroc_change=_change(reference.points[1], reference.points[1]),
        aupro_change=_change(reference.points[2], reference.points[2]),
        ms_batch1=0.0,
        ms_batch8=0.0,
    )
    early = judge(report, limits, images).refused if limits else ""
    if is_itself:
        return replace(report, refused=early)
    changes: list[float | None] = [None, None, None]
    if not early:
        if not own.run(runtime, np.flatnonzero(~normal)):
            return _not_finite(runtime, images)
        changes = [_change(*pair) for pair in zip(own.points(), reference.points, strict=True)]
    return replace(
        report,
        map_max=own.worst / span,
        map_mean=own.total / max(own.count, 1) / span,
        image_auroc_change=changes[0],
        pixel_auroc_change=changes[1],
        aupro_change=changes[2],
        refused=early,
    )


def _change(own: float | None, full: float | None) -> float | None:
    return None if own is None or full is None else own - full


def _not_finite(runtime: Runtime, images: GateImages) -> GateReport:
    return unusable(runtime.name, runtime.precision, images, "some outputs are NaN or infinite")


def unusable(runtime: str, precision: str, images: GateImages, reason: str) -> GateReport:
    """The report of a variant that gives nothing to compare, with the worst of every value."""
    return GateReport(
        runtime=runtime,
        precision=precision,
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
        refused=reason,
    )


def judge(report: GateReport, limits: Limits, images: GateImages) -> GateReport:
    """The report with ``refused`` set: the first rule that failed, or empty."""
    if report.refused:
        return report
    return replace(report, refused=_failed_rule(report, limits, images))


def _judged_by_labels(r: GateReport, limits: Limits, images: GateImages) -> tuple[bool, bool]:
    """Whether labels replace the rule on scores, and the one on maps."""
    scores = (
        r.image_auroc_change is not None
        and images.count_labelled() >= MIN_LABELLED
        and images.one_pair <= limits.auroc_loss
    )
    maps = (
        r.pixel_auroc_change is not None
        and r.aupro_change is not None
        and images.count_labelled(masked=True) >= MIN_LABELLED
    )
    return scores, maps


def too_few(report: GateReport, limits: Limits, images: GateImages) -> str:
    """Why these images cannot pass any variant, or empty."""
    normal = int(images.is_normal.sum())
    if all(_judged_by_labels(report, limits, images)) or normal >= MIN_IMAGES:
        return ""
    return (
        f"{normal} held-out normal images prove nothing, {MIN_IMAGES} are needed; hold out more, "
        "or pass labelled images with --test-data"
    )


def _failed_rule(r: GateReport, limits: Limits, images: GateImages) -> str:
    if reason := too_few(r, limits, images):
        return reason
    scores_judged, maps_judged = _judged_by_labels(r, limits, images)
    for name, change, limit in (
        ("image AUROC", r.image_auroc_change, max(limits.auroc_loss, images.one_pair)),
        ("pixel AUROC", r.pixel_auroc_change, limits.auroc_loss),
        ("AUPRO", r.aupro_change, limits.aupro_loss),
    ):
        # rounded: a sum of pairs is not exact, and the limit itself is allowed
        if change is not None and not round(change + limit, 9) >= 0:
            return f"{name} changes by {change:+.2f} points, allowed is -{limit:.3g}"
    if not scores_judged and not r.score_rank_correlation >= limits.rank_correlation:
        return (
            f"scores of normal images correlate by rank to {r.score_rank_correlation:.3f}, "
            f"needed is {limits.rank_correlation:g}"
        )
    if not maps_judged and not r.map_mean <= limits.map_mean:
        return (
            f"maps differ by {r.map_mean:.2%} of their range on average, allowed is "
            f"{limits.map_mean:.2%}"
        )
    if r.false_alarm_rate is None or r.false_alarm_interval is None:
        return ""
    count = int(images.is_normal.sum())
    return calibration.false_alarm_refusal(r.false_alarm_rate, r.false_alarm_interval, count)
