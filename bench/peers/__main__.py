"""Frame in, verdict out: fastad against what a user would run instead, in one interleaved run.

    python -m bench.peers RUN ENGINE [--only NAME ...] [--environments DIR]

Each row is a process that loads its model once and then takes turns with the others, on the same
images with the same number of threads, batch 1. A time holds what happens between a uint8 RGB
frame in memory and its score and map in memory, the map at the size the model makes it: resize,
normalisation, network, score, and what an API always does besides. No file is read, no map
enlarged to the frame, no overlay drawn.

Two sets of images: the engine's golden images, which are at model size, and the same enlarged to
1920 x 1080. Where there is no resize in the API, Pillow's does it, the rule that the model was
trained with; anomalib resizes in its own graph.

Rows of RUN's own model run its weights, and the table says how far their scores are from PyTorch
in float32. anomalib's networks have random weights, since nothing here downloads any: time does
not depend on them, and the accuracy columns stay empty. A row that cannot be made says why.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import timing
from bench.peers.environments import prepare, versions
from bench.peers.process import Worker, WorkerError
from bench.peers.rows import BASELINE, OURS, Row, rows, selected
from bench.peers.turns import Measured, score_difference, summary, take_turns
from bench.peers.worker import Setup
from fastad.engine.base import core_count
from fastad.engine.container import read_engine
from fastad.errors import FastadError
from fastad.training.checkpoint import load_record

FRAME = (1080, 1920)
IMAGES = 4  # of the golden set: each worker holds them, as frames 6 MB apiece
ROUNDS = 12
COUNT = 4  # images a turn, after one that is not timed
BUDGET_S = 300.0
ENVIRONMENTS = timing.ROOT / "build" / "peers"


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.prog = "python -m bench.peers"
    parser.add_argument("run", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="or 'anomalib-*'")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {COUNT} images a row")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all rounds")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    run, engine, place = (p.resolve() for p in (options.run, options.engine, options.environments))
    try:
        spec = load_record(run).spec
        chosen = selected(rows(run, engine), options.only)
        with read_engine(engine) as opened:
            golden = opened.golden().images[:IMAGES]
    except FastadError as error:
        print(error, file=sys.stderr)
        return 2
    about = timing.machine()
    threads = core_count()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sets = image_sets(golden, Path(folder))
        paths = {name: str(path) for name, (path, _) in sets.items()}
        sizes = {name: size for name, (_, size) in sets.items()}
        workers, refused, packages = load(chosen, Setup(paths, threads), place, Path(folder), stack)
        loaded = {name: worker.about for name, worker in workers.items()}
        found = refused | take_turns(
            workers, sizes, rounds=options.rounds, count=COUNT, budget_s=options.budget_s
        )
    H, W = spec.input.size
    printed = printed_rows(chosen, found, loaded)
    title = f"{spec.method}, batch 1, {threads} threads; ours x: {OURS} is so many times as fast"
    timing.table(printed, title=title)
    for row in chosen:
        if reason := found[row.name].reason:
            print(f"{row.name}: {reason}")
    payload = {
        "unit": "ms",
        "contains": "uint8 RGB frame to score and map at model size, in memory: resize, "
        "normalisation, network, score",
        "sets": {
            "frame": f"{FRAME[1]} x {FRAME[0]}, enlarged golden images",
            "golden": f"{W} x {H}, the engine's golden images",
        },
        "batch": 1,
        "threads": threads,
        "baseline": BASELINE,
        "ours": OURS,
        "method": spec.method,
        "config": spec.config,
        "engine_bytes": engine.stat().st_size,
        "peer_packages": packages,
        "rows": [result(row.name, found, loaded) for row in chosen],
    }
    suite = timing.suite("peers", options.name or spec.method)
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def image_sets(
    golden: np.ndarray,  # uint8 [N, H, W, 3]
    folder: Path,
) -> dict[str, tuple[Path, int]]:
    """Both sets as files for the workers, with the number of images."""
    height, width = FRAME
    enlarged = [np.asarray(Image.fromarray(i).resize((width, height))) for i in golden]
    found = {}
    for name, images in (("frame", np.stack(enlarged)), ("golden", golden)):
        np.save(folder / f"{name}.npy", images)
        found[name] = (folder / f"{name}.npy", len(images))
    return found


def load(
    chosen: Sequence[Row], setup: Setup, environments: Path, folder: Path, stack: ExitStack
) -> tuple[dict[str, Worker], dict[str, Measured], dict[str, dict[str, str]]]:
    """A worker for each row, which ``stack`` closes; rows without one, with the reason; package
    versions by environment.
    """
    workers: dict[str, Worker] = {}
    refused: dict[str, Measured] = {}
    packages: dict[str, dict[str, str]] = {}
    for row in chosen:
        print(f"loading {row.name}", file=sys.stderr)
        scratch = folder / row.name
        scratch.mkdir()
        try:
            python = Path(sys.executable)
            if row.environment:
                python = prepare(row.environment, environments)
                packages[row.environment.name] = versions(python, row.environment.reported)
            own = replace(setup, options=row.options)
            workers[row.name] = Worker(python, row.module, own, scratch)
        except WorkerError as error:
            refused[row.name] = Measured(reason=str(error))
            continue
        stack.callback(workers[row.name].close)
    return workers, refused, packages


def result(
    name: str, found: Mapping[str, Measured], loaded: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One row of the result file; a failed row holds its reason."""
    row, base, ours = found[name], found[BASELINE], found[OURS]
    if row.reason:
        return {"row": name, "reason": row.reason}
    out: dict[str, Any] = {"row": name, **loaded[name]}
    for shown, turns in row.times_ms.items():
        out[shown] = summary(turns, base.times_ms.get(shown), ours.times_ms.get(shown))
    if loaded[name]["weights"] == "run" and base.scores:
        out["score_difference"] = max(
            score_difference(row.scores[shown], base.scores[shown]) or 0.0 for shown in row.scores
        )
    return out


def printed_rows(
    chosen: Sequence[Row],
    found: Mapping[str, Measured],
    loaded: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, object]]:
    """The table: failed rows stay in, without figures."""
    printed: list[dict[str, object]] = []
    for row in chosen:
        measured = result(row.name, found, loaded)
        size = measured.get("size")
        cells: dict[str, object] = {
            "row": row.name,
            "network": measured.get("network", "-"),
            "px": f"{size[0]} x {size[1]}" if size else "-",
            "precision": measured.get("precision", "-"),
            "weights": measured.get("weights", "-"),
        }
        for shown, head in (("frame", "1920x1080"), ("golden", "model size")):
            times = measured.get(shown, {})
            cells[f"{head}\nms"] = times.get("p50_ms")
            cells[f"{head}\np90 ms"] = times.get("p90_ms")
            cells[f"{head}\nx eager"] = times.get("ratio")
            cells[f"{head}\nours x"] = times.get("ours_ratio")
        cells["score\ndifference"] = measured.get("score_difference")
        printed.append(cells)
    return printed


if __name__ == "__main__":
    sys.exit(main())
