"""`Predictor.submit`: answers of `predict`, bounded memory, errors that stay with their image."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated import LONG_S, GatedRuntime, comes_true, threads_named
from numpy.typing import NDArray
from textures import MODEL_SIZE, Textures

from fastad import Prediction, Predictor
from fastad.errors import InputError

THREADS, ROOM = 2, 4  # of a runtime that takes one run at a time


def frame(level: int = 0) -> NDArray[np.uint8]:
    return np.full((*MODEL_SIZE, 3), level % 256, np.uint8)


def filled(opened: Predictor, runtime: GatedRuntime) -> list[Future[Prediction]]:
    """As many images as fit: one is in the graph, one is prepared, four wait."""
    runtime.hold()
    futures = [opened.submit(frame(i)) for i in range(THREADS)]
    assert comes_true(lambda: all(future.running() for future in futures))
    return futures + [opened.submit(frame(i)) for i in range(THREADS, THREADS + ROOM)]


def test_gives_what_predict_gives(predictor: Predictor, textures: Textures) -> None:
    paths = textures.images()
    futures = [predictor.submit(path, category="grain", threshold=1.5) for path in paths]
    for path, future in zip(paths, futures, strict=True):
        found, known = future.result(LONG_S), predictor.predict(path, category="grain")
        assert isinstance(known, Prediction)
        assert (found.path, found.category, found.threshold) == (path, "grain", 1.5)
        assert found.raw_score == known.raw_score
        assert list(found.speed) == ["decode", "preprocess", "inference", "postprocess"]
        np.testing.assert_array_equal(found.model_map, known.model_map)


def test_a_callback_that_exits_stops_no_thread(
    opened: Predictor, runtime: GatedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    futures = filled(opened, runtime)
    for future in futures[: 2 * THREADS]:
        future.add_done_callback(lambda _: sys.exit(1))
    runtime.let(len(futures) + 1)
    assert opened.submit(frame()).result(LONG_S)
    assert not wait(futures, LONG_S).not_done
    # Who waits for a result is woken before its callbacks run.
    assert comes_true(lambda: caplog.text.count("exception calling callback") == 2 * THREADS)


def test_an_image_is_prepared_while_another_runs(
    opened: Predictor, runtime: GatedRuntime, resized: list[int]
) -> None:
    futures = filled(opened, runtime)
    assert comes_true(lambda: len(resized) == 2)
    assert (runtime.begun, runtime.done) == (1, 0)
    runtime.let(len(futures))
    wait(futures, LONG_S)
    assert runtime.most_inside == 1


def test_memory_of_ten_thousand_unread_submits_is_bounded(
    opened: Predictor, runtime: GatedRuntime
) -> None:
    alive: set[int] = set()
    most = 0

    def forget(i: int, _: object) -> None:
        alive.discard(i)

    gone = []  # a weak reference calls back only while it lives itself
    for i in range(10_000):
        image = frame(i)
        alive.add(i)
        gone.append(weakref.ref(image, partial(forget, i)))
        opened.submit(image)
        del image
        most = max(most, len(alive))
    # A result holds its image; those that wait, and those that a thread works on or just ended.
    assert most <= ROOM + 2 * THREADS
    opened.close()
    assert runtime.done == 10_000 and not alive


def test_submitting_waits_for_room(opened: Predictor, runtime: GatedRuntime) -> None:
    futures = filled(opened, runtime)
    late: list[Future[Prediction]] = []
    thread = threading.Thread(target=lambda: late.append(opened.submit(frame(9))))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not late
    runtime.let(THREADS + ROOM + 1)
    thread.join(LONG_S)
    assert late[0].result(LONG_S).raw_score == 9
    assert [future.result(LONG_S).raw_score for future in futures] == list(range(THREADS + ROOM))


BAD: list[tuple[Any, str]] = [
    ("nowhere.png", "no such file"),
    (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
    (np.full((4, 4, 3), 2.0), r"expected float64 in 0\.\.1"),
    (None, "expected a path"),
    ([frame(), frame()], "expected one image, got 2"),
]


@pytest.mark.parametrize(("image", "message"), BAD)
def test_an_error_belongs_to_its_image(opened: Predictor, image: Any, message: str) -> None:
    bad, good = opened.submit(image), opened.submit(frame(7))
    with pytest.raises(InputError, match=message):
        bad.result(LONG_S)
    assert good.result(LONG_S).raw_score == 7


def test_a_failing_run_belongs_to_its_image(opened: Predictor, runtime: GatedRuntime) -> None:
    runtime.fails_at[0] = RuntimeError("out of memory")
    bad = opened.submit(frame(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(LONG_S)
    assert opened.submit(frame(2)).result(LONG_S).raw_score == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("nan")}, "threshold: expected a finite number"),
        ({"category": "wood"}, "category: expected one of grain, stripes"),
        ({"color": "yuv"}, "color: expected one of"),
        ({"value_range": (5, 5)}, "value_range: expected two finite"),
    ],
)
def test_refuses_options_at_the_call(
    opened: Predictor, runtime: GatedRuntime, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened.submit(frame(), **options)
    assert runtime.begun == 0


def test_what_is_not_begun_can_be_cancelled(opened: Predictor, runtime: GatedRuntime) -> None:
    futures = filled(opened, runtime)
    assert [future.cancel() for future in futures] == [False] * THREADS + [True] * ROOM
    runtime.let(THREADS + 1)
    assert opened.submit(frame(5)).result(LONG_S).raw_score == 5
    wait(futures[:THREADS], LONG_S)  # the graph may take a later image first
    assert runtime.done == THREADS + 1
    with pytest.raises(CancelledError):
        futures[-1].result(0)


def test_what_the_caller_drops_is_freed(opened: Predictor) -> None:
    image = frame(3)
    future = opened.submit(image)
    found = future.result(LONG_S)
    alive = [weakref.ref(each) for each in (image, found, future)]
    del image, found, future
    assert comes_true(lambda: gc.collect() >= 0 and all(each() is None for each in alive))


def test_closing_finishes_what_waits(opened: Predictor, runtime: GatedRuntime) -> None:
    before = len(threads_named("fastad submit"))
    futures = filled(opened, runtime)
    closing = threading.Thread(target=opened.close)
    closing.start()
    runtime.let(len(futures))
    closing.join(LONG_S)
    assert [future.result(0).raw_score for future in futures] == list(range(THREADS + ROOM))
    assert runtime.closed and len(threads_named("fastad submit")) == before
    with pytest.raises(InputError, match="closed"):
        opened.submit(frame())


def test_closing_can_cancel_what_waits(opened: Predictor, runtime: GatedRuntime) -> None:
    futures = filled(opened, runtime)
    closing = threading.Thread(target=lambda: opened.close(cancel=True))
    closing.start()
    done, _ = wait(futures[THREADS:], LONG_S)
    assert len(done) == ROOM and all(future.cancelled() for future in done)
    runtime.let(THREADS)
    closing.join(LONG_S)
    assert [future.result(0).raw_score for future in futures[:THREADS]] == [0, 1]
    assert runtime.closed


def test_an_exception_in_the_with_block_cancels(
    predictor: Predictor, runtime: GatedRuntime
) -> None:
    with pytest.raises(KeyboardInterrupt), Predictor(predictor.manifest, runtime) as opened:
        futures = filled(opened, runtime)
        futures[-1].add_done_callback(lambda _: runtime.let(THREADS))
        raise KeyboardInterrupt
    assert [future.cancelled() for future in futures] == [False] * THREADS + [True] * ROOM


def test_closing_frees_who_waits_for_room(opened: Predictor, runtime: GatedRuntime) -> None:
    filled(opened, runtime)
    refused: list[str] = []

    def late() -> None:
        try:
            opened.submit(frame())
        except InputError as error:
            refused.append(str(error))

    waiting = threading.Thread(target=late)
    waiting.start()
    waiting.join(0.1)
    closing = threading.Thread(target=opened.close)
    closing.start()
    waiting.join(LONG_S)
    assert refused == ["predictor: it is closed; call fastad.load again"]
    runtime.let(THREADS + ROOM)
    closing.join(LONG_S)


def test_a_callback_is_refused_where_it_would_wait_for_itself(
    opened: Predictor, runtime: GatedRuntime
) -> None:
    futures = filled(opened, runtime)
    refused: list[str] = []

    def again(_: Future[Prediction]) -> None:
        try:
            opened.submit(frame())
        except InputError as error:
            refused.append(str(error))

    for future in futures[:THREADS]:
        future.add_done_callback(again)
    runtime.let(1)
    assert comes_true(lambda: len(refused) == 1)
    assert "submit from a thread of your own" in refused[0]
    runtime.let(2 * (THREADS + ROOM))
    wait(futures, LONG_S)


def test_a_predictor_that_is_dropped_leaves_no_threads(predictor: Predictor) -> None:
    before = len(threads_named("fastad submit"))
    dropped = Predictor(predictor.manifest, GatedRuntime())
    dropped.submit(frame()).result(LONG_S)
    assert len(threads_named("fastad submit")) == before + THREADS
    del dropped
    assert comes_true(lambda: gc.collect() >= 0 and len(threads_named("fastad submit")) == before)


PROGRAM = """
import sys, numpy as np, fastad
predictor = fastad.load(sys.argv[1], threads=1)
for i in range(20):
    predictor.submit(np.zeros((48, 64, 3), np.uint8))
print("over")
"""


def test_a_program_ends_although_images_wait(texture_engine: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(texture_engine)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_two_callbacks_may_close_at_once(opened: Predictor, runtime: GatedRuntime) -> None:
    before = len(threads_named("fastad submit"))
    inside = threading.Barrier(THREADS)

    def close(_: Future[Prediction]) -> None:
        inside.wait(LONG_S)  # each waits in a thread that the other would have to join
        opened.close()

    runtime.hold()
    futures = [opened.submit(frame(i)) for i in range(THREADS)]
    for future in futures:
        future.add_done_callback(close)
    runtime.let(THREADS)
    assert comes_true(lambda: len(threads_named("fastad submit")) == before)
    assert runtime.closed
