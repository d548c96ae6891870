"""Measure a model on labelled images, and calibrate it on normal ones.

A model is an engine file or a run folder; both go through the same `Predictor`, the same
preprocessing and the same metrics, so what is measured is what ships.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastad import calibration
from fastad.engine.container import read_engine, write_engine
from fastad.errors import FastadError, InputError
from fastad.metrics import PixelMetrics, image_scores
from fastad.prediction import Prediction
from fastad.predictor import Predictor, load
from fastad.preprocess import Source
from fastad.rejudge import Progress, rejudge
from fastad.spec import Calibration, Manifest, Variant
from fastad.training.folder import Sample, read_mask, scan


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
    variants: tuple[Variant, ...] = ()
    if not path.is_dir():
        variants = rejudge(path, fitted.pooled.value, samples, runtime, scores, progress)
    _store(path, fitted, variants)
    return fitted


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
