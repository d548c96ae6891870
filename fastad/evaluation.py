"""Measure a model on labelled images, and calibrate it on normal ones.

A model is an engine file or a run folder; both go through the same `Predictor`, the same
preprocessing and the same metrics, so what is measured is what ships.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastad import calibration
from fastad.engine.container import read_engine, write_engine
from fastad.engine.select import open_runtime
from fastad.errors import EngineError, FastadError, FastadWarning, InputError, UnsupportedError
from fastad.metrics import PixelMetrics, image_scores
from fastad.prediction import Prediction
from fastad.predictor import Predictor, load
from fastad.preprocess import Source
from fastad.spec import Calibration, GateReport, Manifest, Variant
from fastad.training.folder import Sample, load_images, read_mask, scan

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Scores:
    """Metrics of one category, or their mean over categories; None where they are undefined.

    AUROC, AP, F1max and AUPRO (up to 30 % false positives) are in 0..1. Rates are at the
    calibrated threshold and None without calibration; the interval says what so few images prove.
    """

    category: str
    images: int
    anomalous: int
    image_auroc: float | None
    image_ap: float | None
    image_f1max: float | None
    pixel_auroc: float | None
    pixel_ap: float | None
    pixel_f1max: float | None
    aupro: float | None
    false_alarm_rate: float | None
    detection_rate: float | None
    false_alarm_interval: tuple[float, float] | None  # 95 %, Clopper-Pearson; None for means


@dataclass(frozen=True)
class Evaluation:
    """Scores per category and their mean, with what could not be read and how long it took."""

    model: str
    data: str
    resolution: str
    categories: tuple[Scores, ...]
    mean: Scores
    unreadable: tuple[str, ...]
    ms_per_image: float  # preprocess + inference + postprocess, without decoding files

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


_CHECKPOINT = (("auto", "pytorch"), ("auto", "fp32"), ("auto", "cpu"))  # what serves a run folder


def open_model(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    runtime: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Predictor:
    """A predictor for an engine file, or for a run folder through PyTorch in float32.

    Raises:
        InputError: neither an engine file nor a run folder.
        EngineError: a damaged file.
    """
    path = Path(path)
    if not path.is_dir():
        return load(path, device=device, runtime=runtime, precision=precision, threads=threads)
    # Imported here: looking at an engine must not load a training framework.
    from fastad.engine.pytorch import PyTorchRuntime
    from fastad.training.checkpoint import load_checkpoint

    asked = (runtime, precision, device)
    if any(a not in known for a, known in zip(asked, _CHECKPOINT, strict=True)):
        raise InputError(
            f"{path}: a checkpoint runs on pytorch in fp32 on the CPU only, got {' '.join(asked)}; "
            "export it for other runtimes"
        )
    if threads is not None:
        raise InputError(f"{path}: threads can be chosen for engine files only; export it first")
    checkpoint = load_checkpoint(path)
    record = checkpoint.record
    manifest = Manifest(record.spec, (), record.calibration, record.provenance)
    return Predictor(manifest, PyTorchRuntime(checkpoint.method))


def read_manifest(path: str | PathLike[str]) -> Manifest:
    """What an engine file or a run folder says about itself; errors as in `open_model`."""
    path = Path(path)
    if not path.is_dir():
        with read_engine(path) as engine:
            return engine.manifest
    from fastad.training.checkpoint import load_record

    record = load_record(path)
    return Manifest(record.spec, (), record.calibration, record.provenance)


def evaluate(
    model: str | PathLike[str],
    data: str | PathLike[str],
    *,
    categories: Sequence[str] | None = None,
    resolution: Literal["model", "original"] = "model",
    mask_folder: str = "ground_truth",
    device: str = "auto",
    runtime: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    on_prediction: Callable[[Sample, Prediction], None] | None = None,
) -> Evaluation:
    """Image and pixel metrics of a model on the test images below ``data``.

    Args:
        model: Engine file or run folder.
        data: MVTec-style root or one category of it.
        categories: Which to evaluate; None takes all.
        resolution: ``model`` compares maps and masks at model size, as the papers do;
            ``original`` at image size. Memory is bounded either way: one image at a time.
        mask_folder: Name of the folder with masks inside each category.
        device: As in `fastad.load`.
        runtime: As in `fastad.load`.
        precision: As in `fastad.load`.
        threads: As in `fastad.load`.
        progress: Called with stage, images done and images in all.
        on_prediction: Called with each sample and its prediction, such as for a report.

    Raises:
        InputError: no test images, an unknown category, masks of another size than their image.
        EngineError: the model is damaged.
    """
    if resolution not in ("model", "original"):
        raise InputError(f"resolution: expected model or original, got {resolution!r}")
    folder = scan(data, categories, mask_folder)
    if not folder.test:
        raise InputError(f"{data}: expected test images in <category>/test/, found none")
    unreadable: list[str] = []
    rows: list[Scores] = []
    spent: list[float] = []
    chosen = {"device": device, "runtime": runtime, "precision": precision}
    with open_model(model, **chosen, threads=threads) as predictor:
        predictor.warmup()
        done = 0
        for category in folder.categories:
            samples = [s for s in folder.test if s.category == category]
            row = _Category(category)
            for sample, prediction in _predictions(predictor, samples, unreadable):
                row.add(sample, prediction, resolution)
                spent.append(sum(prediction.speed.values()) - prediction.speed["decode"])
                done += 1
                if on_prediction:
                    on_prediction(sample, prediction)
                if progress:
                    progress("evaluate", done, len(folder.test))
            if samples:
                rows.append(row.scores())
    return Evaluation(
        model=str(model),
        data=str(data),
        resolution=resolution,
        categories=tuple(rows),
        mean=_mean(rows),
        unreadable=tuple(unreadable),
        ms_per_image=float(np.median(spent)) if spent else 0.0,
    )


class _Category:
    """Accumulates one category."""

    def __init__(self, category: str) -> None:
        self.category = category
        self.pixels = PixelMetrics()
        self.masked = False  # some mask is there, so pixel metrics mean something
        self.scores_seen: list[float] = []
        self.labels: list[bool] = []
        self.alarms: list[bool | None] = []

    def add(self, sample: Sample, prediction: Prediction, resolution: str) -> None:
        self.scores_seen.append(prediction.raw_score)
        self.labels.append(sample.is_anomalous)
        self.alarms.append(prediction.pred_label)
        if sample.is_anomalous and sample.mask_path is None:
            return  # counts for image metrics only
        at_model_size = resolution == "model"
        anomaly_map = prediction.model_map if at_model_size else prediction.anomaly_map
        if sample.is_anomalous:
            size = (anomaly_map.shape[0], anomaly_map.shape[1])
            self.pixels.add(anomaly_map, read_mask(sample, size if at_model_size else None))
            self.masked = True
        else:
            self.pixels.add(anomaly_map, None)

    def scores(self) -> Scores:
        labels = np.array(self.labels, bool)
        image = image_scores(np.array(self.scores_seen, np.float64), labels)
        pixel = self.pixels.compute() if self.masked else None
        calibrated = None not in self.alarms
        alarms = np.array([bool(a) for a in self.alarms])
        return Scores(
            category=self.category,
            images=len(labels),
            anomalous=int(labels.sum()),
            image_auroc=image.auroc,
            image_ap=image.ap,
            image_f1max=image.f1max,
            pixel_auroc=pixel.auroc if pixel else None,
            pixel_ap=pixel.ap if pixel else None,
            pixel_f1max=pixel.f1max if pixel else None,
            aupro=pixel.aupro if pixel else None,
            false_alarm_rate=_share(alarms[~labels]) if calibrated else None,
            detection_rate=_share(alarms[labels]) if calibrated else None,
            false_alarm_interval=calibration.false_alarm_interval(
                int(alarms[~labels].sum()), int((~labels).sum())
            )
            if calibrated and not labels.all()
            else None,
        )


def _share(values: np.ndarray[Any, np.dtype[np.bool_]]) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean(rows: Sequence[Scores]) -> Scores:
    means: dict[str, float | None] = {}
    others = ("category", "images", "anomalous", "false_alarm_interval")
    for name in (f.name for f in fields(Scores) if f.name not in others):
        values = [getattr(row, name) for row in rows]
        known = [v for v in values if v is not None]
        means[name] = float(np.mean(known)) if known else None
    return Scores(
        category="mean",
        images=sum(row.images for row in rows),
        anomalous=sum(row.anomalous for row in rows),
        **means,
        false_alarm_interval=None,
    )


def _predictions(predictor: Predictor, samples: Sequence[Sample], unreadable: list[str]) -> Any:
    """(sample, prediction) pairs in order; unreadable images are named and left out."""
    by_path = {sample.path: sample for sample in samples}
    known = predictor.manifest.spec.categories
    category = samples[0].category if samples and samples[0].category in known else None

    def note(source: Source, error: FastadError) -> None:
        unreadable.append(str(error))

    paths = list(by_path)
    for prediction in predictor.iterate(paths, category=category, on_unreadable=note):
        assert prediction.path is not None
        yield by_path[prediction.path], prediction


def calibrate_model(
    model: str | PathLike[str],
    *,
    data: str | PathLike[str] | None = None,
    false_alarm_rate: float = 0.01,
    progress: Progress | None = None,
) -> Calibration:
    """Set a model's thresholds from normal images that training never saw.

    Args:
        model: Run folder, or an engine file: its thresholds are replaced, its graphs stay, and its
            lower precisions are judged again by their false alarms on the same images. One that
            fails is refused from then on, with a `FastadWarning`, until a calibration passes it.
        data: Folder of normal images in any layout `scan` reads; None takes the images that
            training held out, which only a run folder knows. Folders named like the model's
            categories set their thresholds too, all others the pooled one only.
        false_alarm_rate: Largest accepted share of normal images called anomalous, in (0, 1).
        progress: Called with stage, images done and images in all.

    Returns:
        The calibration, which has also been stored with the model.

    Raises:
        InputError: no images, an unreadable one, or too few for the rate.
        EngineError: the model is damaged or cannot be written.
    """
    path = Path(model)
    # A rate outside (0, 1) and a sample too small for it are refused before minutes of work.
    needed = calibration.needed_count(false_alarm_rate)
    samples = _held_out(path) if data is None else list(scan(data).train)
    if len(samples) < needed:
        calibration.calibrate(
            np.zeros(len(samples)), [s.category for s in samples], (0, 1), false_alarm_rate
        )
    scores, medians, peaks = [], [], []
    with open_model(path, precision="fp32") as predictor:  # the gate compares with these
        runtime = predictor.runtime.name
        known = predictor.manifest.spec.categories
        for prediction in predictor.iterate([s.path for s in samples]):
            scores.append(prediction.raw_score)
            medians.append(float(np.median(prediction.model_map)))
            peaks.append(float(prediction.model_map.max()))
            if progress:
                progress("calibrate", len(scores), len(samples))
    fitted = calibration.calibrate(
        np.array(scores),
        [s.category for s in samples],
        calibration.heat_map_scale(np.array(medians), np.array(peaks)),
        false_alarm_rate,
    )
    # A folder that is no category of the model counts in the pool only: nothing could ask for it.
    own = {name: t for name, t in fitted.per_category.items() if name in known}
    missing = tuple(name for name in known if name not in own)
    fitted = replace(fitted, per_category=own, uncovered=missing)
    variants = () if path.is_dir() else _rejudged(path, fitted, samples, runtime, scores, progress)
    _store(path, fitted, variants)
    return fitted


def _rejudged(
    path: Path,
    fitted: Calibration,
    samples: Sequence[Sample],
    runtime: str,
    scores: Sequence[float],  # of that runtime in float32
    progress: Progress | None,
) -> tuple[Variant, ...]:
    """An engine's variants, judged by their false alarms at new thresholds.

    The images are those of the calibration; a variant that cannot run here is refused. One that the
    gate refused at export has no parity report and stays refused; one that was refused here is
    judged again every time.
    """
    threshold = fitted.pooled.value
    full = {runtime: np.array(scores)}  # what of float32 is known, by runtime

    with read_engine(path) as engine:
        base, *lower = engine.manifest.variants
        spec = engine.manifest.spec.input

        def run(member: str, name: str, precision: str) -> NDArray[np.floating[Any]]:
            opened = open_runtime(engine.member(member), name, precision, "cpu", cache=False)
            found: list[NDArray[np.float32]] = []
            try:
                for batch, _ in load_images(samples, spec.size, spec.value_range, batch_size=8):
                    found.append(opened.run(batch)[1])
                    if progress:
                        done = min(8 * len(found), len(samples))
                        progress(f"{name} {precision}", done, len(samples))
            finally:
                opened.close()
            return np.concatenate(found)

        def judge(variant: Variant, report: GateReport) -> tuple[GateReport, int | None]:
            name = report.runtime
            try:
                if name not in full:
                    full[name] = run(base.member, name, "fp32")
                own = run(variant.member, name, report.precision)
            except (EngineError, UnsupportedError) as error:
                reason = f"the threshold changed after the gate; export again: {error}"
                return _with_alarms(report, None, reason), None
            if not np.isfinite(own).all():
                return _with_alarms(report, None, "some outputs are NaN or infinite"), None
            alarms, expected = own > threshold, full[name] > threshold
            rate = float(alarms.mean())
            interval = calibration.false_alarm_interval(int(expected.sum()), len(expected))
            reason = calibration.false_alarm_refusal(rate, interval, len(samples))
            return _with_alarms(report, (rate, interval), reason), int((alarms != expected).sum())

        judged: list[Variant] = []
        for variant in lower:
            if not variant.parity and all(report.refused for report in variant.gate):
                old = [_with_alarms(report, None, report.refused) for report in variant.gate]
                judged.append(replace(variant, gate=tuple(old)))
                continue
            results = {report.runtime: judge(variant, report) for report in variant.gate}
            for name, (report, _) in results.items():
                if report.refused:
                    text = f"{path}: {name} {report.precision} is refused from now on"
                    warnings.warn(f"{text}: {report.refused}", FastadWarning, stacklevel=3)
            parity = []
            for p in variant.parity:
                flips = results[p.runtime][1] if p.runtime in results else None
                parity.append(p if flips is None else replace(p, decision_flips=flips))
            gate = tuple(report for report, _ in results.values())
            judged.append(replace(variant, gate=gate, parity=tuple(parity)))
    own_gate = []
    for report in base.gate:
        alarms = None
        if report.runtime in full:
            above = full[report.runtime] > threshold
            interval = calibration.false_alarm_interval(int(above.sum()), len(above))
            alarms = (float(above.mean()), interval)
        own_gate.append(_with_alarms(report, alarms, report.refused))
    own_parity = []
    for p in base.parity:
        if p.runtime in full:
            flips = (full[p.runtime] > threshold) != (full[runtime] > threshold)
            p = replace(p, decision_flips=int(flips.sum()))
        own_parity.append(p)
    return (replace(base, gate=tuple(own_gate), parity=tuple(own_parity)), *judged)


def _with_alarms(
    report: GateReport, alarms: tuple[float, tuple[float, float]] | None, refused: str
) -> GateReport:
    """A gate report with another rate and interval, or none, and another reason."""
    rate, interval = alarms or (None, None)
    return replace(report, false_alarm_rate=rate, false_alarm_interval=interval, refused=refused)


def _held_out(path: Path) -> list[Sample]:
    if not path.is_dir():
        raise InputError(f"{path}: pass --data with normal images to calibrate an engine file")
    from fastad.training.checkpoint import load_record

    record = load_record(path)
    if not record.holdout:
        raise InputError(
            f"{path}: training held no images out; pass --data with normal images, or train with "
            "train.holdout above 0"
        )
    categories = record.spec.categories
    return [
        Sample(Path(record.data_root) / name, _category_of(name, categories), False)
        for name in record.holdout
    ]


def _category_of(name: str, categories: tuple[str, ...]) -> str:
    first = name.split("/")[0]
    return first if first in categories else categories[0]


def _store(path: Path, fitted: Calibration, variants: tuple[Variant, ...]) -> None:
    if path.is_dir():
        from fastad.training.checkpoint import checkpoint_folder, load_record, save_record

        save_record(checkpoint_folder(path), replace(load_record(path), calibration=fitted))
        return
    with read_engine(path) as engine:
        members = {name: engine.member(name) for name in engine.manifest.members}
        manifest = replace(engine.manifest, calibration=fitted, variants=variants)
    write_engine(path, manifest, members)
