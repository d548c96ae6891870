"""Network cameras: the newest frame, an exact count of the others, and every way to lose one."""

from __future__ import annotations

import gc
import re
import socket
import threading
import time
from collections.abc import Generator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loopback import H, RtspServer, W, number_of

from fastad import Predictor
from fastad.camera import source as source_module
from fastad.camera.events import StreamEvent, StreamResult
from fastad.camera.readers import CLOSE_S
from fastad.camera.stream import stream

STALL_S = 0.6
PATIENCE_S = 30.0  # on a busy machine; nothing here takes it
# The watch over the frames and FFmpeg's own timeout race: whichever is first ends the wait.
NOTHING_CAME = re.compile(r"no frame for \d|no data came in time")

Stream = Generator[StreamResult | StreamEvent]


@pytest.fixture
def camera() -> Iterator[RtspServer]:
    with RtspServer() as server:
        yield server


def open_stream(predictor: Predictor, source: object, **options: Any) -> Stream:
    settings: dict[str, Any] = {"stall_s": STALL_S, "reconnect_s": 0.3, "events": True} | options
    return stream(predictor, source, **settings)


def until(results: Stream, kind: str) -> StreamEvent:
    """The next event of a kind; results and other events before it are passed over."""
    deadline = time.monotonic() + PATIENCE_S
    for each in results:
        if isinstance(each, StreamEvent) and each.kind == kind:
            return each
        assert time.monotonic() < deadline, f"no {kind}"
    raise AssertionError(f"the stream ended without {kind}")


def result(results: Stream) -> StreamResult:
    """The next result."""
    return next(each for each in results if isinstance(each, StreamResult))


def test_a_slow_caller_gets_the_newest_frame_and_the_exact_loss(
    predictor: Predictor, camera: RtspServer
) -> None:
    results = open_stream(predictor, camera.url)
    first = result(results)
    found = []
    for _ in range(6):
        time.sleep(0.2)  # six frames
        found.append(result(results))
        # Two clocks, of which one may be set meanwhile: 50 ms.
        assert 0 < found[-1].age_ms <= (time.time() - found[-1].received_s) * 1000 + 50
    shown = [number_of(each.prediction.orig_img) for each in (first, *found)]
    gaps = [(b - a) % 60 for a, b in pairwise(shown)]
    assert gaps == [each.dropped + 1 for each in found]
    assert sum(each.dropped for each in found) >= 6
    indices = [each.index for each in (first, *found)]
    assert gaps == [b - a for a, b in pairwise(indices)]
    times_s = [each.time_s for each in (first, *found) if each.time_s is not None]
    assert len(times_s) == 7 and times_s == sorted(times_s)


def test_every_frame_of_a_camera_waits_in_a_bounded_queue(
    predictor: Predictor, camera: RtspServer
) -> None:
    results = open_stream(predictor, camera.url, every=True, queue=4, stall_s=10.0)
    first = result(results)
    time.sleep(1.0)
    camera.freeze()  # else another frame comes, and pushes one out, while these are looked at
    time.sleep(0.3)
    waited = [result(results) for _ in range(4)]
    assert waited[0].dropped >= 6
    assert [each.dropped for each in waited[1:]] == [0, 0, 0]
    start = waited[0].index
    assert [each.index for each in waited] == list(range(start, start + 4))
    assert start == first.index + waited[0].dropped + 1


def test_a_camera_that_dies_is_found_again(predictor: Predictor) -> None:
    server = RtspServer()
    results = open_stream(predictor, server.url)
    result(results)
    gc.collect()
    threads = sum(each.name.startswith("fastad") for each in threading.enumerate())
    server.stop()
    lost = until(results, "stall")
    assert "trying again" in lost.message and lost.source == server.url
    with RtspServer(server.port):
        back = next(results)
        assert isinstance(back, StreamEvent) and back.kind == "reconnect"
        assert "frames again after" in back.message
        assert result(results).index >= back.index
        assert sum(each.name.startswith("fastad") for each in threading.enumerate()) == threads
        results.close()


def test_a_camera_that_freezes_is_noticed(predictor: Predictor, camera: RtspServer) -> None:
    results = open_stream(predictor, camera.url)
    result(results)
    camera.freeze()
    stall = until(results, "stall")
    assert NOTHING_CAME.search(stall.message)
    camera.thaw()
    until(results, "reconnect")
    assert result(results).prediction.orig_shape == (H, W)


def test_a_camera_that_is_not_there_yet_is_waited_for(predictor: Predictor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    results = open_stream(predictor, f"rtsp://127.0.0.1:{port}/line")
    event = next(results)
    assert isinstance(event, StreamEvent) and event.kind == "stall"
    assert "Connection refused" in event.message
    with RtspServer(port):
        until(results, "reconnect")
        assert result(results).index == 0
        results.close()


def test_without_reconnecting_a_lost_camera_ends(predictor: Predictor) -> None:
    server = RtspServer()
    results = open_stream(predictor, server.url, reconnect_s=None)
    result(results)
    server.stop()
    kinds = [each.kind for each in results if isinstance(each, StreamEvent)]
    assert kinds == ["stall", "end"]


def test_a_camera_that_comes_back_with_another_size_is_told(predictor: Predictor) -> None:
    server = RtspServer()
    results = open_stream(predictor, server.url)
    result(results)
    server.stop()
    until(results, "stall")
    with RtspServer(server.port, size=(H * 2, W * 2)):
        changed = until(results, "changed")
        assert "[96, 128, 3]" in changed.message
        assert result(results).prediction.orig_shape == (H * 2, W * 2)
        results.close()


def test_one_lost_camera_leaves_the_other_running(predictor: Predictor, camera: RtspServer) -> None:
    other = RtspServer()
    results = open_stream(predictor, [camera.url, other.url])
    seen: set[str] = set()
    while len(seen) < 2:
        seen.add(result(results).source)
    other.stop()
    assert until(results, "stall").source == other.url
    assert {result(results).source for _ in range(5)} == {camera.url}


def test_a_password_opens_the_camera_and_stays_secret(predictor: Predictor) -> None:
    with RtspServer(user="line") as server:
        address = server.url.replace("rtsp://", "rtsp://line:secret@")
        results = open_stream(predictor, address)
        assert result(results).source == server.url
        results.close()
        refused = next(open_stream(predictor, address.replace("secret", "guess")))
        assert isinstance(refused, StreamEvent)
        assert "401 Unauthorized" in refused.message and "guess" not in str(refused)


def test_leaving_a_camera_leaves_no_thread_and_no_file(
    predictor: Predictor, camera: RtspServer
) -> None:
    def leave() -> tuple[int, int]:
        results = open_stream(predictor, camera.url)
        result(results)
        results.close()
        gc.collect()
        deadline = time.monotonic() + PATIENCE_S
        while any(each.name == "rtsp client" for each in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # until the server has closed its side in this process
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    leave()
    before = leave()
    assert [leave() for _ in range(3)] == [before] * 3


def test_closing_while_a_host_never_answers(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OPEN_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        results = open_stream(predictor, f"rtsp://127.0.0.1:{silent.getsockname()[1]}/line")
        event = next(results)
        assert isinstance(event, StreamEvent) and event.kind == "stall"
        assert NOTHING_CAME.search(event.message)
        began = time.monotonic()
        results.close()
        assert time.monotonic() - began < CLOSE_S + PATIENCE_S
        deadline = time.monotonic() + 2.0 + PATIENCE_S
        while any(each.name.startswith("fastad") for each in threading.enumerate()):
            assert time.monotonic() < deadline, "the reader never left"
            time.sleep(0.05)
