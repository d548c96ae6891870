"""Image-level and pixel-level scores of a detector: AUROC, AP, F1max and AUPRO.

Image-level scores are exact. Pixel-level scores come from histograms, so memory does not grow with
the number of images; they are exact while the maps share few enough float32 prefixes, and carry
exact error bounds otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastad._native import connected_components
from fastad.errors import InputError

__all__ = ["ImageMetrics", "PixelMetrics", "PixelScores", "image_scores"]

# 28 bytes a bin: 56 MiB at most. Values spread over 10 binades (0.001 to 1) then still have 2^16
# bins a binade, relative width 1.5e-5.
MAX_BINS = 1 << 21
PAGE_BITS = 16  # low half of a float32 key; the high half (sign, exponent, 7 mantissa bits) pages
PREFIXES = 1 << (32 - PAGE_BITS)

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Halves = NDArray[np.uint16]

# One value a bin each: how two bins become one, and what an empty bin holds.
TABLES = (
    ("_normal", np.add, 0),
    ("_anomalous", np.add, 0),
    ("_overlap", np.add, 0),
    ("_lowest", np.minimum, (1 << PAGE_BITS) - 1),
    ("_highest", np.maximum, 0),
)


@dataclass(frozen=True)
class ImageMetrics:
    """Image-level scores in 0..1; all None when the images are all normal or all anomalous."""

    auroc: float | None
    ap: float | None
    f1max: float | None


@dataclass(frozen=True)
class PixelScores:
    """Pixel-level scores in 0..1; all None when the pixels are all normal or all anomalous.

    A ``*_bound`` is the largest possible absolute difference to the same score computed without
    histograms; 0.0 says that no bin holds two different values that matter. The bounds of AUROC and
    AUPRO average over all bins; those of AP and F1max can hang on a single one, most of all when
    few pixels are anomalous, so read them before comparing close results.
    """

    auroc: float | None
    ap: float | None
    f1max: float | None
    aupro: float | None
    auroc_bound: float | None
    ap_bound: float | None
    f1max_bound: float | None
    aupro_bound: float | None
    normal_count: int  # pixels
    anomalous_count: int  # pixels
    region_count: int  # 8-connected defect regions over all images


@dataclass(frozen=True)
class _Ranking:
    """Cumulative counts over K groups of tied scores, most anomalous first; float64 [K] each."""

    positive: Floats
    negative: Floats
    tp: Floats
    fp: Floats

    @staticmethod
    def of(positive: NDArray[Any], negative: NDArray[Any]) -> _Ranking:
        pos, neg = positive.astype(np.float64), negative.astype(np.float64)
        return _Ranking(pos, neg, np.cumsum(pos), np.cumsum(neg))

    def scores(self) -> tuple[float, float, float]:
        """AUROC, average precision and the best F1 over all thresholds; ties count half."""
        P, N = self.tp[-1], self.fp[-1]
        auroc = (self.negative * (self.tp - self.positive / 2)).sum() / (P * N)
        ap = (self.positive * (self.tp / (self.tp + self.fp))).sum() / P
        f1max = (2 * self.tp / (P + self.tp + self.fp)).max()
        return float(auroc), float(ap), float(f1max)

    def bounds(self, tied: NDArray[np.bool_], f1max: float) -> tuple[float, float, float]:
        """Largest errors of `scores` if only these groups are tied and the others only close."""
        P, N = self.tp[-1], self.fp[-1]
        tp_before, fp_before = self.tp - self.positive, self.fp - self.negative
        loose = ~tied
        auroc = (self.positive * self.negative)[loose].sum() / 2 / (P * N)
        # Inside a group a positive is preceded by at best no, at worst all of its negatives.
        highest = self.tp / np.maximum(self.tp + fp_before, 1)
        lowest = (tp_before + 1) / (tp_before + 1 + self.fp)
        ap = (self.positive * (highest - lowest))[loose].sum() / P
        # Thresholds between groups are a subset of all thresholds: the exact value is not lower.
        f1 = (2 * self.tp / (P + self.tp + fp_before))[loose].max(initial=f1max) - f1max
        return float(auroc), float(ap), float(f1)


def image_scores(
    raw_score: NDArray[np.floating[Any]],  # [N], any float dtype
    gt_label: NDArray[np.bool_],  # [N], True is anomalous
) -> ImageMetrics:
    """Exact image-level AUROC, average precision and best F1.

    Ties are handled as in scikit-learn: half a win for AUROC, one threshold for AP and F1.

    Raises:
        InputError: not 1-D of one length, of another dtype, or a score is NaN or infinite.

    >>> image_scores(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).auroc
    0.75
    """
    if gt_label.dtype != np.bool_ or raw_score.dtype.kind != "f":
        got = f"{raw_score.dtype} and {gt_label.dtype}"
        raise InputError(f"raw_score, gt_label: expected float and bool, got {got}; convert them")
    if raw_score.ndim != 1 or raw_score.shape != gt_label.shape:
        got = f"{list(raw_score.shape)} and {list(gt_label.shape)}"
        raise InputError(
            f"raw_score, gt_label: expected [N] and [N], got {got}; pass one per image"
        )
    _check_finite("raw_score", raw_score)
    P = int(np.count_nonzero(gt_label))
    if P in (0, len(gt_label)):
        return ImageMetrics(None, None, None)
    _, group = np.unique(raw_score, return_inverse=True)
    positive = np.bincount(group, weights=gt_label)[::-1]
    negative = np.bincount(group, weights=~gt_label)[::-1]
    return ImageMetrics(*_Ranking.of(positive, negative).scores())


class PixelMetrics:
    """Accumulates anomaly maps of any number of images in bounded memory.

    Owns three histograms over the bit pattern of a float32 value, ordered like the value: normal
    pixels, anomalous pixels, and defect regions (a pixel of a region of area A adds 1 / A). They
    are paged: only prefixes that occur get bins, so maps near 60.0 are kept as exactly as maps near
    0. When the pages outgrow `MAX_BINS`, neighbouring bins are joined; the width that results
    depends on the values added, not on their order. Each bin knows its lowest and highest value, so
    a value that is repeated often (0.0 after a clip) does not count as an error. At most 56 MiB,
    and up to three times that for a moment. Not thread-safe: give each thread its own and `merge`.

    Paper:
        AUPRO: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5.2.

    >>> metrics = PixelMetrics()
    >>> metrics.add(np.array([[0.1, 0.2, 0.9]], np.float32), np.array([[False, False, True]]))
    >>> metrics.compute().auroc
    1.0
    """

    def __init__(self) -> None:
        self._shift = 0  # low bits of a key that a bin ignores
        self._page_of = np.full(PREFIXES, -1, np.int64)  # page of a prefix; -1 none yet
        self._normal: Counts = np.zeros(0, np.int64)
        self._anomalous: Counts = np.zeros(0, np.int64)
        self._overlap: Floats = np.zeros(0, np.float64)
        self._lowest: Halves = np.zeros(0, np.uint16)  # low half of the key
        self._highest: Halves = np.zeros(0, np.uint16)
        self._region_count = 0

    def add(
        self,
        anomaly_map: NDArray[np.float32],  # [H, W], higher is more anomalous
        gt_mask: NDArray[np.bool_] | None,  # [H, W], True is defect; None: a normal image
    ) -> None:
        """Add one image.

        Raises:
            InputError: wrong dtype or shape, or a map value is NaN or infinite; nothing was added.
        """
        _check_map(anomaly_map, gt_mask)
        if anomaly_map.size == 0:
            return
        key = _ordered_key(anomaly_map)
        prefix = key >> PAGE_BITS
        self._open_pages(np.flatnonzero(np.bincount(prefix, minlength=PREFIXES)))
        index = self._page_of[prefix] << (PAGE_BITS - self._shift)
        low_half = key.astype(np.uint16)
        index += low_half >> self._shift
        np.minimum.at(self._lowest, index, low_half)
        np.maximum.at(self._highest, index, low_half)
        bins = len(self._normal)
        if gt_mask is None or not gt_mask.any():
            self._normal += np.bincount(index, minlength=bins)
            return
        labels, count = connected_components(gt_mask)
        label = labels[gt_mask]
        share = 1.0 / np.bincount(label, minlength=count + 1).clip(min=1)
        defect = index[gt_mask.ravel()]
        self._normal += np.bincount(index[~gt_mask.ravel()], minlength=bins)
        self._anomalous += np.bincount(defect, minlength=bins)
        self._overlap += np.bincount(defect, weights=share[label], minlength=bins)
        self._region_count += count

    def merge(self, other: PixelMetrics) -> None:
        """Add everything that ``other`` holds, as if its images had been added here."""
        prefixes = np.flatnonzero(other._page_of >= 0)
        self._open_pages(prefixes)
        # This one now has at least the pages of the other, so its bins are at least as wide.
        assert self._shift >= other._shift
        source, target = other._page_of[prefixes], self._page_of[prefixes]
        for name, join, _ in TABLES:
            pages = getattr(other, name).reshape(len(prefixes), -1, 1 << self._shift - other._shift)
            mine = getattr(self, name).reshape(-1, 1 << PAGE_BITS - self._shift)
            mine[target] = join(mine[target], join.reduce(pages[source], axis=2))
        self._region_count += other._region_count

    def compute(self, fpr_limit: float = 0.3) -> PixelScores:
        """Scores of all pixels added so far; adding may go on afterwards.

        Args:
            fpr_limit: In (0, 1]. AUPRO is the mean overlap with the defect regions, integrated
                over the false-positive rate of all normal pixels from 0 to this limit and divided
                by it.

        Raises:
            InputError: ``fpr_limit`` is outside (0, 1].
        """
        if not 0.0 < fpr_limit <= 1.0:
            raise InputError(f"fpr_limit: expected a rate in (0, 1], got {fpr_limit}; try 0.3")
        N, P = int(self._normal.sum()), int(self._anomalous.sum())
        counts = (N, P, self._region_count)
        if N == 0 or P == 0:
            return PixelScores(None, None, None, None, None, None, None, None, *counts)
        rows = self._page_of[self._page_of >= 0][::-1]  # pages from the highest values down
        normal, anomalous, overlap, lowest, highest = (
            getattr(self, name).reshape(len(rows), -1)[rows, ::-1].ravel() for name, _, _ in TABLES
        )
        occupied = np.flatnonzero(normal + anomalous)
        tied = lowest[occupied] == highest[occupied]
        ranking = _Ranking.of(anomalous[occupied], normal[occupied])
        scores = ranking.scores()
        fpr = np.concatenate([[0.0], ranking.fp / N])
        pro = np.concatenate([[0.0], np.cumsum(overlap[occupied]) / self._region_count])
        aupro, aupro_bound = _integrate(fpr, pro, tied, fpr_limit)
        bounds = ranking.bounds(tied, scores[2])
        return PixelScores(*scores, aupro, *bounds, aupro_bound, *counts)

    def _open_pages(self, prefixes: NDArray[np.intp]) -> None:
        """Give bins to the prefixes that have none; join bins first where they would not fit."""
        missing = prefixes[self._page_of[prefixes] < 0]
        if len(missing) == 0:
            return
        opened = int(np.count_nonzero(self._page_of >= 0))
        shift = self._shift
        while (opened + len(missing)) << (PAGE_BITS - shift) > MAX_BINS:
            shift += 1
        joined = 1 << (shift - self._shift)
        new_bins = len(missing) << (PAGE_BITS - shift)
        for name, join, empty in TABLES:
            table = join.reduce(getattr(self, name).reshape(-1, joined), axis=1)
            setattr(self, name, np.concatenate([table, np.full(new_bins, empty, table.dtype)]))
        self._page_of[missing] = np.arange(opened, opened + len(missing))
        self._shift = shift


def _ordered_key(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unsigned integers [H * W] that sort and tie like the finite float32 values."""
    bits = (values + np.float32(0.0)).ravel().view(np.uint32)  # -0.0 + 0.0 is 0.0: they must tie
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign)


def _integrate(
    fpr: Floats,  # [K + 1], from 0, never falling
    pro: Floats,  # [K + 1], from 0, never falling
    tied: NDArray[np.bool_],  # [K], of the steps between: a straight line for certain
    limit: float,
) -> tuple[float, float]:
    """Area under the curve up to the limit, over the limit, and its error bound.

    Inside a bin that is not tied the true curve can be any rising one between the same corners:
    half the bin's rectangle away from the straight line, all of it in the bin that the limit cuts.
    """
    last = int(np.searchsorted(fpr, limit, side="right"))  # first point beyond the limit
    width, rise = np.diff(fpr[:last]), np.diff(pro[:last])
    area = float((width * (pro[1:last] - rise / 2)).sum())
    error = float((width * rise)[~tied[: last - 1]].sum()) / 2
    if last < len(fpr):
        width_cut = limit - fpr[last - 1]
        rise_cut = pro[last] - pro[last - 1]
        rise_at_limit = rise_cut * width_cut / (fpr[last] - fpr[last - 1])
        area += float(width_cut * (pro[last - 1] + rise_at_limit / 2))
        error += 0.0 if tied[last - 1] else float(width_cut * rise_cut)
    return area / limit, error / limit


def _check_map(anomaly_map: NDArray[Any], gt_mask: NDArray[Any] | None) -> None:
    if anomaly_map.dtype != np.float32 or anomaly_map.ndim != 2:
        got = f"{anomaly_map.dtype} {list(anomaly_map.shape)}"
        raise InputError(f"anomaly_map: expected float32 [H, W], got {got}; pass one map at a time")
    if gt_mask is not None and (gt_mask.dtype != np.bool_ or gt_mask.shape != anomaly_map.shape):
        got = f"{gt_mask.dtype} {list(gt_mask.shape)}"
        raise InputError(
            f"gt_mask: expected bool {list(anomaly_map.shape)} like the map, got {got}; "
            "compare with `mask > 0` and resize the map to the mask"
        )
    _check_finite("anomaly_map", anomaly_map)


def _check_finite(name: str, values: NDArray[Any]) -> None:
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise InputError(
            f"{name}: expected finite values, got {bad} NaN or infinite of {values.size}; "
            "check the engine's precision on this input"
        )
