"""What a call costs beside the graph: no memory that grows, no file, no log line; and the modes."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated import LONG_S, GatedRuntime, comes_true
from numpy.typing import NDArray
from textures import MODEL_SIZE, H, Outcome, Textures, W

from fastad import Prediction, Predictor, _native, load, preprocess
from fastad.engine.base import Outputs
from fastad.engine.streams import Streams
from fastad.errors import EngineError, InputError

# Batches of other sizes sum in another order, as in test_predictor.py.
BATCH_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def frame() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


def test_memory_does_not_grow_after_warmup(predictor: Predictor, frame: NDArray[np.uint8]) -> None:
    tracemalloc.start()
    try:
        for _ in range(200):  # Python and the wrappers of the runtime fill small stores of theirs
            predictor.predict(frame)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300):
            predictor.predict(frame)
        gc.collect()
        grown_bytes = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown_bytes < 300 * 56  # a call that left an object would leave that, a map 16 KB


opened_files: list[Any] | None = None


def note_files(event: str, arguments: tuple[Any, ...]) -> None:
    if opened_files is not None and event == "open":
        opened_files.append(arguments[0])


@pytest.fixture(scope="module")
def files() -> Iterator[Callable[[Callable[[], object]], list[Any]]]:
    """What a function opens; an audit hook cannot be taken away, only told to sleep."""
    sys.addaudithook(note_files)

    def during(work: Callable[[], object]) -> list[Any]:
        global opened_files
        opened_files = []
        try:
            work()
            return opened_files
        finally:
            opened_files = None

    yield during


def test_a_call_opens_no_file_and_logs_nothing(
    predictor: Predictor,
    frame: NDArray[np.uint8],
    files: Callable[[Callable[[], object]], list[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor.predict(frame)
    with caplog.at_level(logging.DEBUG):
        assert files(lambda: predictor.predict(frame)) == []
    assert caplog.records == []
    assert len(files(lambda: Path(__file__).read_bytes())) == 1  # the hook is awake


def test_calls_in_turn_share_one_input_buffer(predictor: Predictor) -> None:
    runtime = GatedRuntime()
    with Predictor(predictor.manifest, runtime) as opened:
        for i in range(20):
            opened.predict(np.full((*MODEL_SIZE, 3), i, np.uint8))
        assert len(runtime.buffers) == 1


def test_calls_at_once_have_buffers_of_their_own(predictor: Predictor) -> None:
    runtime = GatedRuntime(concurrency=4)
    runtime.hold()
    frames = [np.full((*MODEL_SIZE, 3), i, np.uint8) for i in range(4)]
    with Predictor(predictor.manifest, runtime) as opened, ThreadPoolExecutor(4) as pool:
        found = pool.map(opened.predict, frames)
        assert comes_true(lambda: runtime.inside == 4)
        assert len(runtime.buffers) == 4
        runtime.let(4)
        assert [each.raw_score for each in found if isinstance(each, Prediction)] == [0, 1, 2, 3]


def test_the_wait_for_a_turn_is_no_stage(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = GatedRuntime()
    frame = np.zeros((*MODEL_SIZE, 3), np.uint8)
    with Predictor(predictor.manifest, runtime) as opened, ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(opened.predict, [frame] * 40))) == 40
        assert runtime.most_inside == 1
        runtime.hold()
        first = pool.submit(opened.predict, frame)
        assert comes_true(lambda: runtime.inside == 1)
        prepared = threading.Event()

        def to_batch(*arguments: Any) -> NDArray[np.uint8]:
            try:
                return preprocess.to_batch(*arguments)
            finally:
                prepared.set()

        monkeypatch.setattr("fastad.feed.to_batch", to_batch)
        began = time.perf_counter()
        second = pool.submit(opened.predict, frame)
        assert prepared.wait(LONG_S)
        waits = time.perf_counter()
        time.sleep(0.2)
        waited = time.perf_counter() - waits
        runtime.let(2)
        result = second.result(LONG_S)
        took = time.perf_counter() - began
        first.result(LONG_S)
    assert isinstance(result, Prediction)
    stages_s = [each / 1000 for each in result.speed.values()]
    assert min(stages_s) >= 0
    assert max(stages_s) <= sum(stages_s) <= took - waited


MODES = [("openvino", "throughput"), ("onnxruntime", "throughput"), ("onnxruntime", "latency")]


@pytest.mark.parametrize(("runtime", "mode"), MODES)
def test_modes_agree(
    texture_engine: Path, textures: Textures, predictor: Predictor, runtime: str, mode: str
) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    paths = textures.images()
    with load(texture_engine, runtime=runtime, precision="fp32", threads=2, mode=mode) as opened:
        assert opened.runs_at_once == (2 if mode == "throughput" else 1)
        together = opened.predict(paths)
        assert isinstance(together, list)
        alone = [opened.predict(path) for path in paths]
    known = predictor.predict(paths)
    assert isinstance(known, list)
    for i, expected in enumerate(known):
        bound = BATCH_TOLERANCE * float(np.ptp(expected.model_map))
        for found in (together[i], alone[i]):
            assert isinstance(found, Prediction)
            np.testing.assert_allclose(found.model_map, expected.model_map, rtol=0, atol=bound)
    assert [p.path for p in together] == paths


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_outputs_belong_to_the_caller(texture_engine: Path, runtime: str, mode: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    images = np.random.default_rng(0).integers(0, 256, (3, *MODEL_SIZE, 3), np.uint8)
    with load(texture_engine, runtime=runtime, precision="fp32", threads=2, mode=mode) as opened:
        first = opened.runtime.run(images)
        kept = [part.copy() for part in first]
        images[:] = 0  # the input is the caller's again, too
        second = opened.runtime.run(images)
        for part, before, other in zip(first, kept, second, strict=True):
            np.testing.assert_array_equal(part, before)
            assert not np.shares_memory(part, other) and not np.shares_memory(part, images)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_closed_runtime_says_so_in_throughput(
    texture_engine: Path, runtime: str, batch: int
) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    opened = load(texture_engine, runtime=runtime, precision="fp32", threads=2, mode="throughput")
    opened.close()
    with pytest.raises(EngineError, match="closed; load the engine again"):
        opened.runtime.run(np.zeros((batch, *MODEL_SIZE, 3), np.uint8))


def test_openvino_has_a_stream_for_each_core(texture_engine: Path) -> None:
    with load(texture_engine, runtime="openvino", threads=2, mode="throughput") as opened:
        runtime: Any = opened.runtime
        model = runtime._single.model
        assert model.get_property("NUM_STREAMS") == 2
        assert model.get_property("INFERENCE_NUM_THREADS") == 2


def test_unknown_modes_are_refused(
    texture_engine: Path, textures: Textures, cli: Callable[..., Outcome]
) -> None:
    with pytest.raises(InputError, match="mode: expected latency or throughput, got 'fast'"):
        load(texture_engine, mode="fast")
    done = cli("predict", texture_engine, textures.images()[0], "--mode", "fast")
    assert done.code == 1 and "expected latency or throughput" in done.err


def test_the_command_line_takes_a_mode(
    texture_engine: Path, textures: Textures, cli: Callable[..., Outcome]
) -> None:
    paths = textures.images()[:3]
    done = cli("predict", texture_engine, *paths, "--mode", "throughput", "--threads", 2)
    assert (done.code, len(done.out.splitlines())) == (0, 3)


def test_streams_run_that_many_images_at_once() -> None:
    together = threading.Barrier(2)

    def run(images: NDArray[np.uint8]) -> Outputs:
        assert images.shape == (1, 2, 2, 3)
        together.wait(LONG_S)  # breaks unless two are here at once
        return images.mean(3, np.float32), images.mean((1, 2, 3), np.float32)

    streams = Streams(2)
    images = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    maps, scores = streams.run(run, images)
    streams.close()
    np.testing.assert_array_equal(maps, images.mean(3, np.float32))
    np.testing.assert_array_equal(scores, images.mean((1, 2, 3), np.float32))


@pytest.mark.parametrize("images", [1, 3])
def test_closing_streams_waits_for_what_is_in_flight(images: int) -> None:
    inside, go_on = threading.Event(), threading.Event()
    done: list[Outputs] = []

    def run(images: NDArray[np.uint8]) -> Outputs:
        inside.set()
        assert go_on.wait(LONG_S)
        done.append((images.mean(3, np.float32), images.mean((1, 2, 3), np.float32)))
        return done[-1]

    streams = Streams(2)
    with ThreadPoolExecutor(2) as pool:
        batch = np.zeros((images, 2, 2, 3), np.uint8)
        running = pool.submit(streams.run, run, batch)
        assert inside.wait(LONG_S)
        closing = pool.submit(streams.close)
        assert wait([closing], 0.1).not_done
        go_on.set()
        closing.result(LONG_S)
        assert len(done) == images
        assert len(running.result(LONG_S)[1]) == images


def test_two_may_close_streams_at_once() -> None:
    go_on = [threading.Event(), threading.Event()]

    def run(images: NDArray[np.uint8]) -> Outputs:
        assert go_on[images[0, 0, 0, 0]].wait(LONG_S)
        return images.mean(3, np.float32), images.mean((1, 2, 3), np.float32)

    streams = Streams(2)
    images = [np.full((1, 2, 2, 3), i, np.uint8) for i in range(2)]
    running = [threading.Thread(target=streams.run, args=(run, each)) for each in images]
    closing = [threading.Thread(target=streams.close, daemon=True) for _ in range(2)]
    for thread in [*running, *closing]:
        thread.start()
    for event in go_on:
        closing[0].join(0.1)  # both ask meanwhile: each would get one of the two places
        event.set()
    for thread in [*running, *closing]:
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_closing_streams_meets_all_images_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(images: NDArray[np.uint8]) -> Outputs:
        return images.mean(3, np.float32), images.mean((1, 2, 3), np.float32)

    streams = Streams(2)
    submit, closing = streams._threads.submit, threading.Thread(target=streams.close)

    def interrupted(*arguments: Any) -> Future[Outputs]:
        if not closing.ident:
            closing.start()
            closing.join(0.2)  # it must wait for the other images
        return submit(*arguments)

    monkeypatch.setattr(streams._threads, "submit", interrupted)
    assert len(streams.run(run, np.zeros((3, 2, 2, 3), np.uint8))[1]) == 3
    closing.join(LONG_S)
    assert not closing.is_alive()


def test_threads_bound_the_resize_too(texture_engine: Path) -> None:
    before = _native.threads()
    try:
        _native.set_threads(5)
        load(texture_engine).close()
        assert _native.threads() == 5
        for threads, expected in ((1, 1), (64, _native.DEFAULT_THREADS)):
            load(texture_engine, threads=threads).close()
            assert _native.threads() == expected <= 8
    finally:
        _native.set_threads(before)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_a_dropped_predictor_is_freed_at_once(
    texture_engine: Path, frame: NDArray[np.uint8], runtime: str, mode: str
) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    opened = load(texture_engine, runtime=runtime, precision="fp32", threads=2, mode=mode)
    opened.predict([frame, frame])
    alive = weakref.ref(opened.runtime)
    gc.disable()
    try:
        del opened
        # Without the collector: nothing but a thread that just ended its work may hold it.
        assert comes_true(lambda: alive() is None)
    finally:
        gc.enable()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"threads": 0}, "threads: expected a whole number of at least 1, got 0"),
    ({"threads": 2.5}, "threads: expected a whole number of at least 1, got 2.5"),
    ({"threads": "2"}, "threads: expected a whole number of at least 1, got '2'"),
    ({"threads": True}, "threads: expected a whole number of at least 1, got True"),
    ({"device": None}, "device: expected cpu, cuda or cuda:N, got None"),
    ({"device": 0}, "device: expected cpu, cuda or cuda:N, got 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_load_refuses_what_is_no_setting(
    texture_engine: Path, runtime: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(texture_engine, runtime=runtime, **options)


@pytest.mark.parametrize("batch", [0, -1, 2.5, "2", True])
def test_warmup_refuses_what_is_no_batch(predictor: Predictor, batch: Any) -> None:
    with pytest.raises(InputError, match="batch: expected a whole number of at least 1, got"):
        predictor.warmup(batch)


FORK = """
import faulthandler, os, sys, threading, numpy as np, fastad
frame = np.zeros((72, 96, 3), np.uint8)
predictor = fastad.load(sys.argv[1], runtime=sys.argv[2], precision="fp32", threads=2)
known = predictor.predict(frame).raw_score
predictor.submit(frame).result()
going_on = threading.Event()

def camera():
    yield frame
    going_on.wait()  # nothing is in the graph when this process forks
    yield frame

streams = unread, begun, left = [predictor.stream(camera()) for _ in range(3)]
for each in (begun, left):
    next(each)
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(200, exit=True)  # nobody else ends it if it hangs
    calls = [predictor.predict, predictor.submit, predictor.stream, predictor.iterate]
    calls += [lambda _, each=each: next(each) for each in (unread, begun)]
    for call in [*calls, lambda _: predictor.warmup()]:
        try:
            call([frame])
        except fastad.InputError as error:
            assert "call fastad.load in this process" in str(error)
        else:
            os._exit(1)
    left.close()
    predictor.close()
    with fastad.load(sys.argv[1], runtime=sys.argv[2], precision="fp32", threads=2) as own:
        good = own.predict(frame).raw_score == known == own.submit(frame).result().raw_score
    os._exit(7 if good else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert predictor.predict(frame).raw_score == known
going_on.set()
assert [len(list(each)) for each in streams] == [2, 1, 1]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_forked_child_is_refused_and_can_load_its_own(texture_engine: Path, runtime: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    command = [sys.executable, "-c", FORK, str(texture_engine), runtime]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


CHILD = """
import os, sys, numpy as np, fastad
predictor = fastad.load(sys.argv[1], runtime="openvino", precision="fp32", threads=2)
predictor.predict(np.zeros((72, 96, 3), np.uint8))
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
del predictor
sys.exit(7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_a_forked_child_ends(texture_engine: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(texture_engine)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 7, done.stderr
