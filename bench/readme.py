"""Tables of the README and of docs/benchmarks.md, made from the committed results.

    python -m bench.readme

What stands between ``<!-- bench:SUITE -->`` and ``<!-- end -->`` is replaced by one table for each
result file of that suite and this version, with the machine it comes from. A test holds the pages
to the files.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import timing

PAGES = (timing.ROOT / "README.md", timing.ROOT / "docs" / "benchmarks.md")
# Suites whose results, once committed, have to be on a page.
REQUIRED = ("models", "end_to_end", "cold", "soak", "peers", "precisions", "accuracy")
SECTION = re.compile(r"(<!-- bench:([a-z0-9._-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARKER = re.compile(r"<!-- (?:bench:\S*|end) -->")
Row = Mapping[str, Any]


def main() -> int:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = rendered(text)
        page.write_text(made, encoding="utf-8")
        print(f"{page.name}: {'unchanged' if made == text else 'written'}; {suites(text)}")
    return 0


def suites(text: str) -> list[str]:
    """Suites that have a place in the text."""
    return [suite for _, suite, _, _ in SECTION.findall(text)]


def rendered(text: str, results: Path = timing.RESULTS) -> str:
    """The text with every table made anew.

    Raises:
        ValueError: a marker without its partner, or a suite without a result of this version.
    """
    if len(MARKER.findall(text)) != 2 * len(suites(text)):
        raise ValueError("expected each <!-- bench:SUITE --> to be followed by its <!-- end -->")
    return SECTION.sub(lambda found: found[1] + section(found[2], results) + found[4], text)


def section(suite: str, results: Path = timing.RESULTS) -> str:
    """Markdown of all results of a suite, a paragraph on the machine before each table.

    Raises:
        ValueError: there is no result of this version.
    """
    folder = timing.version_folder(results)
    paths = sorted(folder.glob(f"{suite}--*.json"))
    if not paths:
        raise ValueError(f"no {suite}--*.json in {folder}; run the bench that writes it")
    parts = []
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        timing.check_document(document)
        made = TABLES.get(suite.partition("-")[0], plain)(document)
        parts += [place(document), *made]
    return "\n".join(f"{part}\n" for part in parts)


def place(document: Mapping[str, Any]) -> str:
    """One sentence: machine, packages, commit, and whether anything else was running."""
    about = document["machine"]
    idle = {True: "idle", False: "not idle", None: "load unknown"}[about["idle_before"]]
    shown = ("openvino", "onnxruntime", "torch")
    versions = [f"{name} {about['packages'][name]}" for name in shown if name in about["packages"]]
    whole, changes, _ = (about["commit"] or "none").partition("+changes")
    commit = f"commit {whole[:7]}{' with changes' if changes else ''}"
    cpu = re.sub(r"\((R|TM)\)", "", about["cpu"])
    device = "" if document["device"] == "cpu" else f" with {document['device']}"
    facts = (f"{about['cores']} cores, {idle}", f"Python {about['python']}", *versions, commit)
    return f"*{cpu}{device}: {', '.join(facts)}.*"


def table(rows: list[Row], columns: Mapping[str, str | Callable[[Row], object]]) -> str:
    """A Markdown table: column titles and the field, or function of a row, that fills them."""
    lines = [
        [cell(of(row) if callable(of) else row.get(of)) for of in columns.values()] for row in rows
    ]
    head = [list(columns), ["---"] * len(columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in head + lines)


def cell(value: object) -> str:
    """Three digits; nothing that would end a cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def plain(document: Mapping[str, Any]) -> list[str]:
    """Every field of the first row whose value is one number or text."""
    rows = document["rows"]
    names = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
    return [table(rows, {name: name for name in names})]


def models(document: Mapping[str, Any]) -> list[str]:
    """A line for each method and runtime, its batches side by side."""
    by: dict[tuple[str, str], dict[int, Row]] = {}
    for row in document["rows"]:
        by.setdefault((row["engine"], row["runtime"]), {})[row["batch"]] = row
    batches = sorted({row["batch"] for row in document["rows"]})
    least = batches[0]

    def of(batch: int, field: str) -> Callable[[Row], object]:
        return lambda row: by[row["engine"], row["runtime"]].get(batch, {}).get(field)

    columns: dict[str, str | Callable[[Row], object]] = {
        "method": "method",
        "runtime": "runtime",
        f"ms p50 / p99, batch {least}": lambda r: f"{cell(r['p50_ms'])} / {cell(r['p99_ms'])}",
        "x eager": "ratio",
        "x GEMM limit": "times_limit",
        **{f"images/s, batch {batch}": of(batch, "images_per_s") for batch in batches[1:]},
        f"MB, batch {batches[-1]}": of(batches[-1], "peak_mb"),
        "first result s, again": lambda r: f"{cell(r['first_s'])}, {cell(r['again_s'])}",
        "map error mean": "map_mean",
        "gate": "gate",
    }
    firsts = [row for row in document["rows"] if row["batch"] == least]
    refused = [
        f"Refused at export and not in the file: {model['method']}: {sentence}."
        for model in document["models"]
        for sentence in model["refused and left out"]
    ]
    return [table(firsts, columns), *refused]


def end_to_end(document: Mapping[str, Any]) -> list[str]:
    """The stages of one frame, what they may take beside the graph, then the streams."""
    name, (height, width) = document["method"], document["size"]
    what = f"{name}, {height} x {width} px, {document['runtime']}, one frame of 1920 x 1080, in ms:"
    over = next(r["over graph"] for r in document["rows"] if r["input"] == "frame in memory")
    allowed = document["over_graph_allowed_ms"]
    target = f"A frame in memory takes {over:.2f} ms over the graph, allowed are {allowed:.2f} ms."
    streams = document["streams"]
    shown = table(streams, {field: field for field in streams[0]})
    return [what, *plain(document), target, shown]


def peers(document: Mapping[str, Any]) -> list[str]:
    """What each way of running takes for a frame; rows that could not be made say why."""
    rows = [row for row in document["rows"] if "frame" in row]

    def of(place: str, field: str) -> Callable[[Row], object]:
        return lambda row: row[place][field]

    columns: dict[str, str | Callable[[Row], object]] = {
        "": "row",
        "network": "network",
        "precision": "precision",
        "ms, 1920 x 1080": of("frame", "p50_ms"),
        "fastad is x as fast, 1920 x 1080": of("frame", "ours_ratio"),
        "ms, model size": of("golden", "p50_ms"),
        "x eager, model size": of("golden", "ratio"),
        "fastad is x as fast, model size": of("golden", "ours_ratio"),
    }
    failed = [
        f"Not run: {row['row']}: {row['reason']}." for row in document["rows"] if row.get("reason")
    ]
    return [table(rows, columns), *failed]


def accuracy(document: Mapping[str, Any]) -> list[str]:
    """What recipes reach; names of weights without their suffix.

    AUROCs are means over the categories' own, which are not rounded as the row's are.
    """

    def auroc(which: int) -> Callable[[Row], object]:
        def mean(row: Row) -> float | None:
            known = [pair[which] for pair in row["categories"].values() if pair[which] is not None]
            return statistics.fmean(known) if known else None

        return mean

    columns: dict[str, str | Callable[[Row], object]] = {
        "weights": lambda row: Path(row["weights"]).stem,
        **{name: name for name in ("recipe", "seed", "minutes")},
        "image AUROC": auroc(0),
        "image AP": "image AP",
        "pixel AUROC": auroc(1),
        **{name: name for name in ("pixel AP", "AUPRO", "parity")},
        "ms per image, file to map": "ms per image",
    }
    return [f"{document['data']}:", table(document["rows"], columns)]


def precisions(document: Mapping[str, Any]) -> list[str]:
    """Rows of the gate, its refusals, and what auto takes."""
    auto = ", ".join(f"{name} {precision}" for name, precision in document["auto"].items())
    what = (
        f"{document['method']} on {document['data']}; auto: {auto}; x is against onnxruntime fp32."
    )
    refused = [
        f"Refused: {report['runtime']} {report['precision']}: {report['refused']}."
        for report in document["gate"]
        if report["refused"]
    ]
    return [what, *plain(document), *refused]


TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {  # by what comes before a hyphen
    "accuracy": accuracy,
    "models": models,
    "end_to_end": end_to_end,
    "peers": peers,
    "precisions": precisions,
}


if __name__ == "__main__":
    sys.exit(main())
