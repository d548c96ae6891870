"""The benchmark harness: interleaved timing, a description of the machine, result files, tables.

Variants of one comparison take turns (A B C A B C ...), so that a machine that slows down or is
shared slows all of them; ratios are formed within a round and their median is reported.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

PACKAGES = (
    "numpy",
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "opencv-python",
    "opencv-python-headless",
    "pillow",
    "tensorrt",
    "torch",
    "triton",
)

MACHINE = {  # field of a result file: what it holds
    "cpu": str,
    "cores": int,
    "system": str,
    "python": str,
    "packages": dict,
    "commit": (str, type(None)),  # None outside a checkout
    "load_1min_before": (float, type(None)),  # None where the system does not say
    "idle_before": (bool, type(None)),
}

# Above this share of the cores in the 1-minute load average, other work disturbs the figures.
IDLE_LOAD_PER_CORE = 0.25


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one variant.

    ``ratio`` says how many times as fast as the baseline: median over rounds of baseline time /
    own time; 1.0 for the baseline itself, None if no baseline was named.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    ratio: float | None


def compare(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warmup: int = 5,
    baseline: str | None = None,
    budget_s: float | None = None,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time callables in turns.

    Args:
        variants: What to time, by name; a round calls each once, in this order.
        rounds: Timed rounds, each giving every variant one measurement.
        warmup: Rounds before that, not timed; one suffices if it takes a quarter of the budget.
        baseline: The variant whose time the ratios are relative to.
        budget_s: Stop early, after at least three rounds, when the timed rounds took this long.
        synchronize: Called inside the timed region after the variant, to wait for a device.

    Raises:
        ValueError: no variants, fewer than one round, or a baseline that is not among them.
    """
    if not variants or rounds < 1:
        raise ValueError(f"expected variants and rounds, got {len(variants)} and {rounds}")
    if baseline is not None and baseline not in variants:
        raise ValueError(f"baseline: expected one of {sorted(variants)}, got {baseline!r}")
    start = time.perf_counter()
    for done in range(warmup):
        if budget_s is not None and done >= 1 and time.perf_counter() - start > budget_s / 4:
            break
        for call in variants.values():
            _time_ns(call, synchronize)
    times_ns: dict[str, list[int]] = {name: [] for name in variants}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if budget_s is not None and done >= 3 and time.perf_counter() - start > budget_s:
                break
            for name, call in variants.items():
                times_ns[name].append(_time_ns(call, synchronize))
    finally:
        if collecting:
            gc.enable()
    base = times_ns[baseline] if baseline is not None else None
    return {name: _timing(times, base) for name, times in times_ns.items()}


def _time_ns(call: Callable[[], object], synchronize: Callable[[], object] | None) -> int:
    start = time.perf_counter_ns()
    call()
    if synchronize is not None:
        synchronize()
    return time.perf_counter_ns() - start


def _timing(times_ns: Sequence[int], base_ns: Sequence[int] | None) -> Timing:
    ratio = None
    if base_ns is not None:
        ratio = statistics.median(b / max(t, 1) for b, t in zip(base_ns, times_ns, strict=True))
    p50_ms, p90_ms, p99_ms = (percentile(times_ns, percent) / 1e6 for percent in (50, 90, 99))
    return Timing(p50_ms, p90_ms, p99_ms, len(times_ns), ratio)


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank: a value that was measured, never one between two.

    Args:
        values: At least one, in any order.
        percent: 0 to 100; 0 gives the least value.

    >>> percentile([30.0, 10.0, 20.0], 50)
    20.0
    """
    rank = -(-percent * len(values) // 100)
    return sorted(values)[max(rank, 1) - 1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every bench with a result file takes: ``--name`` and ``--results``."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--name", default="", help="goes behind the suite's name in the result file")
    found.add_argument("--results", type=Path, default=RESULTS, help="folder for all versions")
    return found


def suite(*parts: str) -> str:
    """A suite's name from its parts, such as the bench and ``--name``; empty ones are left out.

    >>> suite("models", ""), suite("models", "demo")
    ('models', 'models-demo')
    """
    return "-".join(part for part in parts if part)


def machine() -> dict[str, Any]:
    """Describe this machine and checkout; call it before timing, for its load average."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = _cores()
    versions = {name: _version(name) for name in ("fastad", *PACKAGES)}
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version is not None},
        "commit": _commit(),
        "load_1min_before": load,
        "idle_before": None if load is None else load <= IDLE_LOAD_PER_CORE * cores,
    }


def write_result(
    suite: str,
    payload: Mapping[str, Any],
    *,
    about: Mapping[str, Any] | None = None,
    device: str = "cpu",
    results: Path = RESULTS,
) -> Path:
    """Write ``results/<version>/<suite>--<machine>--<device>.json`` and return its path.

    The file holds ``payload`` plus suite, device and machine, and replaces an older one whole.

    Args:
        suite: Name of the suite.
        payload: What was measured; JSON values only.
        about: What `machine` returned before the timing; asked now if not given.
        device: What ran it: "cpu", or the GPU's name.
        results: Folder for all versions.

    Raises:
        ValueError: the file would not be what `check_document` expects.
    """
    about = machine() if about is None else about
    document = {"suite": suite, "device": device, "machine": dict(about), **payload}
    check_document(document)
    path = version_folder(results) / file_name(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def version_folder(results: Path = RESULTS) -> Path:
    """Where the results of the installed version lie."""
    return results / (_version("fastad") or "unreleased")


def file_name(document: Mapping[str, Any]) -> str:
    """Name of a result's file: suite, machine and device."""
    about = document["machine"]
    place = f"{_slug(about['cpu'])}-{about['cores']}-cores"
    return f"{document['suite']}--{place}--{_slug(document['device'])}.json"


def check_document(document: Mapping[str, Any]) -> None:
    """Check a result: suite, device, machine with its idle flag, and rows of the same kind.

    Raises:
        ValueError: a field is missing or of another type, there are no rows, or a row is empty.
    """
    for name, kind in (("suite", str), ("device", str), ("machine", dict), ("rows", list)):
        if not isinstance(document.get(name), kind):
            raise ValueError(f"{name}: expected {kind.__name__}, got {document.get(name)!r}")
    for name, kinds in MACHINE.items():
        about = document["machine"]
        if name not in about or not isinstance(about[name], kinds):
            raise ValueError(f"machine.{name}: expected {kinds}, got {about.get(name)!r}")
    rows = document["rows"]
    if not rows or not all(isinstance(row, dict) and row for row in rows):
        raise ValueError(f"rows: expected a list of objects with fields, got {rows!r:.80}")


def table(rows: Sequence[Mapping[str, object]], title: str = "") -> None:
    """Print rows as a table, uncut: columns are the first row's keys, numbers to the right."""
    if not rows:
        return
    printed = rich.table.Table(title=title or None, box=rich.box.SIMPLE_HEAD)
    for key, value in rows[0].items():
        printed.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        printed.add_row(*(_cell(row.get(key)) for key in rows[0]))
    # Redirected output counts as 80 columns, which would cut names short.
    width = rich.console.Console(width=1000).measure(printed).maximum
    rich.console.Console(width=width).print(printed)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout, with "+changes" if files differ from it; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")
