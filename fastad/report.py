"""An HTML report of an evaluation: one file, no scripts, images inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastad.atomic import write_whole
from fastad.evaluation import Evaluation, Scores
from fastad.prediction import Prediction
from fastad.spec import Manifest
from fastad.training.folder import Sample, read_mask

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}
tr.mean td{font-weight:600;border-top:2px solid #888}
figure{display:inline-block;margin:.4rem;vertical-align:top}
figure img{height:150px;image-rendering:auto;margin-right:2px}
figcaption{font-size:.8rem;color:#444}
.wrong{color:#b00020;font-weight:600}
"""

_COLUMNS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "false_alarm_rate": "false alarms",
    "detection_rate": "detected",
}


@dataclass(frozen=True)
class Example:
    """One test image as the report shows it, a few kilobytes."""

    name: str
    is_anomalous: bool
    pred_label: bool | None
    pred_score: float | None
    raw_score: float
    panels: tuple[bytes, ...]  # JPEG: image, heat map, mask


def example_of(sample: Sample, prediction: Prediction) -> Example:
    """Image, heat map and true mask of one prediction."""
    truth = read_mask(sample) if sample.mask_path or not sample.is_anomalous else None
    panels = [prediction.orig_img, prediction.plot()]
    if truth is not None:
        panels.append(np.repeat(truth[..., None].astype(np.uint8) * 255, 3, 2))
    return Example(
        name=f"{sample.category}/{sample.defect or 'normal'}/{sample.path.name}",
        is_anomalous=sample.is_anomalous,
        pred_label=prediction.pred_label,
        pred_score=prediction.pred_score,
        raw_score=prediction.raw_score,
        panels=tuple(_small_jpeg(panel) for panel in panels),
    )


def write_report(
    path: Path,
    evaluation: Evaluation,
    manifest: Manifest,
    examples: Sequence[Example],
    notes: Sequence[str] = (),
) -> Path:
    """Write the report, complete or not at all.

    Raises:
        EngineError: the folder cannot be written.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>fastad: {html.escape(manifest.spec.method)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(manifest.spec.method)} on {html.escape(evaluation.data)}</h1>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        _table(evaluation),
        _facts(evaluation, manifest),
        "<h2>Test images</h2>",
        "<p>Image, heat map on the calibrated scale with the predicted outline, true mask.</p>",
        *(_figure(example) for example in examples),
        "</html>",
    ]
    return write_whole(path, lambda file: file.write("\n".join(parts).encode()))


def _table(evaluation: Evaluation) -> str:
    head = "".join(f"<th>{label}</th>" for label in _COLUMNS.values())
    rows = [_row(scores, "") for scores in evaluation.categories]
    rows.append(_row(evaluation.mean, " class=mean"))
    return f"<table><tr><th>category</th><th>images</th>{head}</tr>{''.join(rows)}</table>"


def _row(scores: Scores, css: str) -> str:
    values = (getattr(scores, name) for name in _COLUMNS)
    cells = "".join(f"<td>{'-' if v is None else f'{v:.3f}'}</td>" for v in values)
    category = html.escape(scores.category)
    return f"<tr{css}><td>{category}</td><td>{scores.images}</td>{cells}</tr>"


def _facts(evaluation: Evaluation, manifest: Manifest) -> str:
    lines = [
        f"Map: {manifest.spec.map_rule}.",
        f"Raw score: {manifest.spec.score_rule}.",
        f"{evaluation.ms_per_image:.1f} ms per image (preprocess, inference, postprocess).",
    ]
    fitted = manifest.calibration
    if fitted:
        lines.append(
            f"Threshold for at most {fitted.false_alarm_rate:.1%} false alarms, from "
            f"{fitted.pooled.count} normal images: {fitted.pooled.value:.4g} pooled"
            + "".join(f", {n} {t.value:.4g}" for n, t in fitted.per_category.items())
            + "."
        )
    for variant in manifest.variants:
        lines += [
            f"Parity of {variant.member} on {p.runtime} {p.precision}, {p.images} real images: "
            f"largest map difference {p.map_max:.1e} of the range, {p.decision_flips} flips."
            for p in variant.parity
        ]
    if evaluation.unreadable:
        lines.append(f"{len(evaluation.unreadable)} images could not be read.")
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _figure(example: Example) -> str:
    images = "".join(f"<img src='{_data_url(panel)}' alt=''>" for panel in example.panels)
    wrong = example.pred_label is not None and example.pred_label != example.is_anomalous
    verdict = {None: "no threshold", True: "anomalous", False: "normal"}[example.pred_label]
    score = example.raw_score if example.pred_score is None else example.pred_score
    css = " class=wrong" if wrong else ""
    return (
        f"<figure>{images}<figcaption>{html.escape(example.name)}: "
        f"<span{css}>{verdict}</span>, score {score:.3f}</figcaption></figure>"
    )


def _small_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((300, 300))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
