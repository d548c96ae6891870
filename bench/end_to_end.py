"""From a 1920 x 1080 frame to a verdict, stage by stage, and streams of several sources.

    python -m bench.end_to_end ENGINE

The frame comes as an array in memory, a PNG file, a JPEG file or a frame of an H.264 video, with
detail and noise as a camera's has. Stages are what each result says of itself; "rest" is a
call minus their sum, and "over graph" a call minus the graph alone on the same prepared batch, in
the same round. All are medians over the rounds. A video decodes beside the graph, in its reader's
thread, so that its "ms" are the time between two results and have no rest.

Streams read the same frames from 1, 4 and 16 iterables; each source waits while the predictor is
busy, with one frame ready (``queue=1``), so that the age of a result is what a full house costs.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import timing
from fastad.camera.events import StreamEvent, StreamResult
from fastad.engine.base import core_count
from fastad.engine.container import read_engine
from fastad.prediction import Prediction
from fastad.predictor import Predictor, load
from fastad.preprocess import Frame, to_batch

SIZE = (1080, 1920)  # (H, W)
SOURCES = (1, 4, 16)
FRAMES = 192  # of a stream's test, all sources together
KINDS = 4  # different frames, in turns
NOISE = 4.0  # grey levels: a camera's; without it files would decode faster than real ones
STAGES = ("decode", "preprocess", "inference", "postprocess")
WARM = 2  # results of each source before a stream's clock starts


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of each test with a stream")
    parser.add_argument("--budget-s", type=float, default=60.0, help="of the stages")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args(arguments)
    about = timing.machine()
    with read_engine(options.engine) as engine:
        picture = engine.golden().images[0]
    frames = camera_frames(picture)
    with load(options.engine, precision=options.precision) as predictor:
        with tempfile.TemporaryDirectory() as folder:
            rows = stages(predictor, frames, Path(folder), options.rounds, options.budget_s)
            rows += video(predictor, frames, Path(folder) / "frames.mp4", options.frames)
        streams = [stream(predictor, frames, count, options.frames) for count in SOURCES]
        runtime = f"{predictor.runtime.name} {predictor.runtime.precision}"
        spec = predictor.manifest.spec
    what = f"{spec.method} {spec.input.size[0]} px, {runtime}"
    timing.table(rows, title=f"{what}: one {SIZE[1]} x {SIZE[0]} frame, ms")
    print(f"a frame in memory may cost {allowed_ms(rows[0]['ms']):.2f} ms over the graph")
    timing.table(streams, title=f"{what}: streams")
    if not find_spec("av"):
        print("missing: video, for want of PyAV: pip install 'fastad[camera]'")
    payload = {
        "unit": "ms",
        "engine": options.engine.stem,
        "method": spec.method,
        "size": list(spec.input.size),
        "runtime": runtime,
        "threads": core_count(),
        "over_graph_allowed_ms": allowed_ms(rows[0]["ms"]),
        "rows": rows,
        "streams": streams,
    }
    suite = timing.suite("end_to_end", options.name)
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def allowed_ms(graph_ms: float) -> float:
    """What a call may take beside its graph: 5 % of it or 0.3 ms, whichever is larger."""
    return max(0.05 * graph_ms, 0.3)


def camera_frames(picture: np.ndarray) -> list[np.ndarray]:
    """`KINDS` frames uint8 [*SIZE, 3] RGB: a normal image enlarged, each with noise of its own."""
    rng = np.random.default_rng(0)
    large = np.asarray(Image.fromarray(picture).resize(SIZE[::-1], Image.Resampling.BICUBIC))
    noisy = (large + rng.normal(0, NOISE, large.shape) for _ in range(KINDS))
    return [np.clip(np.rint(frame), 0, 255).astype(np.uint8) for frame in noisy]


def stages(
    predictor: Predictor, frames: list[np.ndarray], folder: Path, rounds: int, budget_s: float
) -> list[dict[str, Any]]:
    """One image a call: array, files and the graph alone, in turns.

    Raises:
        RuntimeError: the lossless file does not give the array's score.
    """
    png, jpeg = folder / "frame.png", folder / "frame.jpg"
    Image.fromarray(frames[0]).save(png)
    Image.fromarray(frames[0]).save(jpeg, quality=90)
    scores = [one(predictor, source).raw_score for source in (frames[0], png)]
    if scores[0] != scores[1]:
        raise RuntimeError(f"frame and PNG file differ in their scores: {scores}; no figures")
    batch = to_batch([Frame(frames[0])], predictor.manifest.spec.input.size)
    told: dict[str, list[dict[str, float]]] = {}

    def timed(name: str, run: Callable[[], dict[str, float]]) -> Callable[[], None]:
        told[name] = []

        def call() -> None:
            began = time.perf_counter()
            speed = run()
            total = (time.perf_counter() - began) * 1000
            told[name].append(speed | {"total": total, "rest": total - sum(speed.values())})

        return call

    def graph() -> dict[str, float]:
        predictor.runtime.run(batch)
        return {}

    def predict(source: object, *parts: str) -> Callable[[], dict[str, float]]:
        # What is made on first access, as far as the engine is calibrated for it.
        wanted = [p for p in parts if p == "anomaly_map" or predictor.manifest.calibration]

        def run() -> dict[str, float]:
            result = one(predictor, source)
            for part in wanted:
                getattr(result, part)
            return result.speed

        return run

    variants = {
        "graph alone": graph,
        "frame in memory": predict(frames[0]),
        "the same, regions": predict(frames[0], "regions"),
        "the same, regions, mask, map": predict(frames[0], "regions", "pred_mask", "anomaly_map"),
        "PNG file": predict(png),
        "JPEG file": predict(jpeg),
    }
    calls = {name: timed(name, run) for name, run in variants.items()}
    timings = timing.compare(calls, rounds=rounds, budget_s=budget_s)
    return [stage_row(name, row, told[name], told["graph alone"]) for name, row in timings.items()]


def stage_row(
    name: str,
    row: timing.Timing,
    told: list[dict[str, float]],
    graph: list[dict[str, float]],
) -> dict[str, Any]:
    """One row of the stages: ``told`` and ``graph`` hold a call each, warm-up first."""
    told, graph = told[-row.runs :], graph[-row.runs :]
    known = "inference" in told[0]
    over = (call["total"] - alone["total"] for call, alone in zip(told, graph, strict=True))
    return {
        "input": name,
        "ms": row.p50_ms,
        "p99 ms": row.p99_ms,
        **{
            stage: statistics.median(call[stage] for call in told) if known else None
            for stage in (*STAGES, "rest")
        },
        "over graph": statistics.median(over) if known else None,
        "runs": row.runs,
    }


def one(predictor: Predictor, source: object) -> Prediction:
    result = predictor.predict(source)
    assert isinstance(result, Prediction)
    return result


def video(
    predictor: Predictor, frames: list[np.ndarray], path: Path, count: int
) -> list[dict[str, Any]]:
    """A row for an H.264 file read by `Predictor.stream`; none without PyAV."""
    if not find_spec("av"):
        return []
    write_video(path, frames, count)
    came, results = watch(predictor.stream(str(path)), WARM)
    between = (np.diff(came) * 1000).tolist()
    told = {
        stage: statistics.median(result.prediction.speed[stage] for result in results)
        for stage in STAGES
    }
    return [
        {
            "input": "H.264 video, decoded beside",
            "ms": statistics.median(between),
            "p99 ms": timing.percentile(between, 99),
            **told,
            "rest": None,
            "over graph": None,
            "runs": len(between),
        }
    ]


def write_video(path: Path, frames: list[np.ndarray], count: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        track = container.add_stream("h264", rate=25)
        track.height, track.width, track.pix_fmt = (*SIZE, "yuv420p")
        track.options = {"preset": "ultrafast"}
        for pixels in itertools.islice(itertools.cycle(frames), count):
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())


def stream(
    predictor: Predictor, frames: list[np.ndarray], sources: int, count: int
) -> dict[str, Any]:
    """Several iterables at once: frames a second, and how old a frame is when its result comes.

    Raises:
        RuntimeError: a source lost frames.
    """
    each = max(count // sources, WARM + 2)
    feeds = [itertools.islice(itertools.cycle(frames), each) for _ in range(sources)]
    came, results = watch(predictor.stream(list(feeds), queue=1), WARM * sources)
    if len(results) != sources * (each - WARM) or any(result.dropped for result in results):
        raise RuntimeError(f"{sources} sources of {each} frames gave {len(results)} results")
    seconds = came[-1] - came[0]
    ages = [result.age_ms for result in results]
    rate = (len(came) - 1) / seconds
    return {
        "sources": sources,
        "frames/s": rate,
        "frames/s each": rate / sources,
        "age p50 ms": statistics.median(ages),
        "age p99 ms": timing.percentile(ages, 99),
        "frames": len(results),
    }


def watch(
    results: Iterator[StreamResult | StreamEvent], warm: int
) -> tuple[list[float], list[StreamResult]]:
    """When each result came, in seconds, and the results, without the first ``warm``."""
    came, kept = [], []
    for result in results:
        if isinstance(result, StreamResult):
            came.append(time.perf_counter())
            kept.append(result)
    return came[warm:], kept[warm:]


if __name__ == "__main__":
    sys.exit(main())
