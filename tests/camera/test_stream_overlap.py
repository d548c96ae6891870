"""Streams overlap: a batch is resized while another runs, and both while the caller works."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from gated import LONG_S, GatedRuntime, comes_true, threads_named
from loopback import H, W, picture
from numpy.typing import NDArray

from fastad import Predictor
from fastad.camera import readers
from fastad.camera import stream as module
from fastad.camera.events import StreamResult, Taken
from fastad.camera.stream import stream
from fastad.engine.base import Outputs
from fastad.preprocess import Source


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that always has the next frame, however busy the machine is."""
    taken = readers.Batches.next
    monkeypatch.setattr(readers.Batches, "next", lambda self, *, wait=True: taken(self))


def shown(results: Any) -> list[int]:
    return [each.index for each in results if isinstance(each, StreamResult)]


def test_the_next_batch_runs_while_the_caller_works(
    opened: Predictor, runtime: GatedRuntime, prompt: None
) -> None:
    results = stream(opened, (picture(i) for i in range(9)))
    for i in range(1, 8):
        next(results)
        # No call of `next` asks for it.
        assert comes_true(lambda due=i: runtime.done >= due + 1)
    results.close()


def test_a_batch_is_resized_while_another_is_in_the_graph(
    opened: Predictor, runtime: GatedRuntime, prompt: None, resized: list[int]
) -> None:
    pulled = itertools.count()
    results = stream(opened, (picture(next(pulled)) for _ in range(9)))
    next(results)
    assert comes_true(lambda: runtime.inside == 0 and runtime.done == 2)
    assert len(resized) == 2
    runtime.hold()
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.extend(itertools.islice(results, 2)))
    caller.start()
    # The caller asks for the second result, then for the third, whose batch is held in the graph;
    # the fourth is resized meanwhile.
    assert comes_true(lambda: len(resized) == 4 and runtime.inside == 1)
    assert runtime.done == 2
    runtime.let(9)
    caller.join(LONG_S)
    assert shown(found) == [1, 2] and runtime.most_inside == 1
    results.close()


def test_order_holds_when_later_batches_finish_first(predictor: Predictor) -> None:
    class Uneven(GatedRuntime):
        def run(self, images: NDArray[np.uint8]) -> Outputs:
            time.sleep(0.01 if images[0, 0, 0, 0] == picture(0)[0, 0, 0] else 0.0)
            return super().run(images)

    runtime = Uneven(concurrency=3)
    slow_first = [picture(0 if i % 3 == 0 else 1) for i in range(30)]
    with Predictor(predictor.manifest, runtime) as opened:
        assert shown(stream(opened, [slow_first])) == list(range(30))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_caller_that_stops_reading_bounds_what_is_held(
    predictor: Predictor, concurrency: int
) -> None:
    pulled = itertools.count()
    runtime = GatedRuntime(concurrency)
    with Predictor(predictor.manifest, runtime) as opened:
        results = stream(opened, (picture(next(pulled)) for _ in itertools.count()), queue=2)
        for _ in range(5):
            next(results)
        time.sleep(0.3)
        # Given out, at work, waiting, in the reader's hand; `next` itself counts.
        assert next(pulled) <= 5 + concurrency + max(1, 2 - concurrency) + 1
        assert runtime.begun <= 5 + concurrency
        results.close()


def test_a_failing_run_comes_after_the_results_before_it(
    opened: Predictor, runtime: GatedRuntime
) -> None:
    runtime.fails_at[3] = RuntimeError("the device is gone")
    found = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        found.extend(each.index for each in stream(opened, [[picture(i) for i in range(9)]]))
    results = stream(opened, [[picture(i) for i in range(3)]])
    assert shown(results) == [0, 1, 2]
    assert threads_named("fastad stream") == []


def test_leaving_waits_for_the_graph_and_drops_the_rest(
    opened: Predictor, runtime: GatedRuntime, prompt: None
) -> None:
    results = stream(opened, (picture(i) for i in range(9)))
    next(results)
    assert comes_true(lambda: runtime.done == 2)
    runtime.hold()
    caller = threading.Thread(target=lambda: list(itertools.islice(results, 2)))
    caller.start()
    assert comes_true(lambda: runtime.inside == 1)
    runtime.let(9)
    caller.join(LONG_S)
    results.close()
    assert runtime.inside == 0
    assert threads_named("fastad stream") == []


class LiveSource:
    """A camera that shows as fast as it can until `stop`."""

    live, steady, name = True, True, "camera"

    def __init__(self) -> None:
        self.shown = 0
        self.stop = threading.Event()

    def frames(self) -> Generator[Taken]:
        while not self.stop.wait(0.002):
            source = Source(np.full((H, W, 3), 1, np.uint8), self.name)
            yield Taken(source, source.frame(), None, 0.0)
            self.shown += 1
        self.stop.wait()


def test_of_a_camera_nothing_runs_ahead(
    opened: Predictor, runtime: GatedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = LiveSource()
    monkeypatch.setattr(module, "open_sources", lambda *_: [camera])
    results = stream(opened, 0, reconnect_s=None)
    first = next(results)
    seen = camera.shown
    assert comes_true(lambda: camera.shown > seen + 5)
    assert runtime.begun == 1
    second = next(results)
    assert isinstance(first, StreamResult) and isinstance(second, StreamResult)
    assert second.index > first.index + 5 and second.dropped >= 5
    camera.stop.set()
    results.close()
