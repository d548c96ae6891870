"""What the command line shows: progress bars on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastad.atomic import unwritable

if TYPE_CHECKING:
    from fastad.doctor import Diagnosis
    from fastad.evaluation import Evaluation
    from fastad.spec import Calibration, GateReport, Manifest, ParityReport, Variant

messages = Console(stderr=True)
SCORE_HEADS = {
    "image_auroc": "image\nAUROC",
    "image_ap": "image\nAP",
    "image_f1max": "image\nF1max",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1max": "pixel\nF1max",
    "aupro": "pixel\nAUPRO",
    "false_alarm_rate": "false\nalarm",
    "detection_rate": "\nfound",
}


class Bars:
    """Progress bars on stderr, one per stage, for anything that reports (stage, done, total)."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[remark]}"),
            console=messages,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        return self  # shown with the first report: a refusal needs no empty bar above it

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, remark: str = "") -> None:
        """Show one step."""
        self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, remark="")
        self._progress.update(self._tasks[stage], completed=done, total=total, remark=remark)


def print_result(result: dict[str, Any], as_json: bool, *readable: Any) -> None:
    """Print the JSON document, or what people read; a full disk is an `EngineError`."""
    try:
        if as_json:
            print(json.dumps(result, indent=1), flush=True)
            return
        console = Console()
        if not readable:
            readable = ("\n".join(f"{key}: {value}" for key, value in result.items()),)
        for part in readable:
            console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable("standard output", error) from error


def plain(reports: Sequence[ParityReport | GateReport]) -> list[dict[str, Any]]:
    """Reports as JSON values."""
    return [asdict(report) for report in reports]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def scores_table(result: Evaluation) -> Table:
    """Metrics per category and their mean, readable at 80 columns."""
    title = (
        f"{escape(result.model)} on {escape(result.data)}, {result.ms_per_image:.2f} ms per image"
    )
    caption = "false alarms and found defects at the calibrated threshold"
    # Eleven columns in 80 characters: two-line heads, three digits, one blank between columns.
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("category", overflow="fold")
    table.add_column("images", justify="right", no_wrap=True, min_width=5)
    for head in SCORE_HEADS.values():
        table.add_column(head, justify="right", no_wrap=True, min_width=5)
    for row in (*result.categories, result.mean):
        values = (_number(getattr(row, name), 3) for name in SCORE_HEADS)
        table.add_row(escape(row.category), str(row.images), *values)
    return table


def parity_table(reports: list[ParityReport], title: str) -> Table:
    """One line per runtime."""
    columns = ("runtime", "precision", "images", "map max", "map mean", "score max", "flips")
    table = Table(*columns, title=escape(title), caption="differences over the range of the maps")
    for r in reports:
        differences = (f"{v:.2e}" for v in (r.map_max, r.map_mean, r.score_max))
        table.add_row(r.runtime, r.precision, str(r.images), *differences, str(r.decision_flips))
    return table


def fastest_precisions(variants: Sequence[Variant]) -> dict[str, str]:
    """What ``precision="auto"`` takes on each runtime of this machine; empty without a gate."""
    from fastad.engine.select import RUNTIMES, choose, why_unsupported

    if not any(variant.gate for variant in variants):
        return {}
    able = [name for name in RUNTIMES if why_unsupported(name, "fp32") is None]
    return {name: choose(variants, name, "auto", "cpu").precision for name in able}


def precision_parts(variants: Sequence[Variant]) -> list[Any]:
    """The accuracy gate: a table, why precisions were refused, what int8 does not compute."""
    from fastad.engine.base import rest_of

    rows = [(variant, report) for variant in variants for report in variant.gate]
    if not rows:
        return []
    heads = ("runtime", "precision", "map\nmean", "rank\ncorr.", "image\nAUROC", "pixel\nAUROC")
    table = Table(title="precisions against float32 of the same runtime", box=SIMPLE_HEAD)
    for head in heads[:2]:
        table.add_column(head, no_wrap=True)
    for head in (*heads[2:], "pixel\nAUPRO", "false\nalarm", "ms\nB1", "ms\nB8"):
        table.add_column(head, justify="right", no_wrap=True)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    notes = []
    if any(v.weight_bits == 7 and not r.refused for v, r in rows):
        notes.append("int8 weights have 7 bits: their sums are the same on every CPU")
    for variant, r in rows:
        changes = (r.image_auroc_change, r.pixel_auroc_change, r.aupro_change)
        table.add_row(
            r.runtime,
            f"({r.precision})" if r.refused else r.precision,
            f"{r.map_mean:.4f}",
            f"{r.score_rank_correlation:.3f}",
            *("-" if change is None else f"{change:+.2f}" for change in changes),
            _number(r.false_alarm_rate, 3),
            *(f"{ms:.1f}" if ms else "-" for ms in (r.ms_batch1, r.ms_batch8)),
        )
        if r.refused:
            notes.append(f"refused: {r.runtime} {r.precision}: {r.refused}")
        if variant.kept:
            notes.append(
                f"{r.runtime} {r.precision} keeps {len(variant.kept)} layers in "
                f"{rest_of(r.precision)}: {', '.join(variant.kept)}"
            )
    first = rows[0][1]
    table.caption = (
        f"{first.normal_images} normal and {first.test_images} labelled images; changes in points; "
        "ms per image on the exporting machine; refused ones in brackets"
    )
    return [table, *notes]


def calibration_table(fitted: Calibration) -> Table:
    """One line per threshold."""
    title = f"at most {fitted.false_alarm_rate:.2%} of normal images above the threshold"
    table = Table("category", "threshold", "median", "images", title=title)
    for name, t in {"pooled": fitted.pooled, **fitted.per_category}.items():
        table.add_row(escape(name), f"{t.value:.6g}", f"{t.median:.6g}", str(t.count))
    for name in fitted.uncovered:
        table.add_row(escape(name), "pooled", "-", "too few")
    return table


def manifest_tables(manifest: Manifest, path: Path) -> list[Any]:
    """Everything a manifest says."""
    spec = manifest.spec
    facts = Table("field", "value", title=escape(str(path)))
    rows = {
        "method": spec.method,
        "input": f"{spec.input.size[0]} x {spec.input.size[1]} (H x W) RGB uint8",
        "categories": ", ".join(spec.categories) or "-",
        "map": spec.map_rule,
        "raw score": spec.score_rule,
        "format": str(manifest.format_version),
        **manifest.provenance,
    }
    for key, value in rows.items():
        facts.add_row(key, escape(value))
    held = {name: m.size / 1e6 for name, m in manifest.members.items() if m.size >= 50_000}
    facts.add_row("holds", escape(", ".join(f"{name} {mb:.1f} MB" for name, mb in held.items())))
    parts: list[Any] = [facts]
    for variant in manifest.variants:
        if variant.parity:
            title = f"{variant.member} ({variant.precision})"
            parts.append(parity_table(list(variant.parity), title))
    parts += precision_parts(manifest.variants)
    if manifest.calibration:
        parts.append(calibration_table(manifest.calibration))
    return parts


def diagnosis_tables(found: Diagnosis) -> list[Any]:
    """What this machine can run."""
    title = f"fastad {found.fastad}, {found.machine}"
    table = Table("device", "runtime", "precision", "usable", title=title)
    for row in found.runtimes:
        table.add_row(row.device, row.runtime, row.precision, escape(row.reason or "yes"))
    packages = ", ".join(f"{k} {v or 'absent'}" for k, v in found.packages.items())
    notes = ["the GPU runtimes are not yet run on hardware"]
    if found.int8_weight_bits < 8:
        notes.append(
            "int8: this CPU has no dot products of int8 (AVX512-VNNI or AVX-VNNI): graphs with "
            "7-bit weights run, as exported here; those with 8-bit weights would saturate"
        )
    return [table, f"{found.cores} cores; {packages}", *notes]
