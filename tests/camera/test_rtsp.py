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

import numpy as np
import pytest
from gated import LONG_S, comes_true, threads_named
from loopback import H, RtspServer, W, number_of

from fastad import Predictor
from fastad.camera import source as source_module
from fastad.camera.events import Mailbox, StreamEvent, StreamResult
from fastad.camera.stream import stream

STALL_S = 0.6  # where a stall is wanted; a busy machine may pause for as long
# The watch over the frames and FFmpeg's own timeout race: whichever is first ends the wait.
NOTHING_CAME = re.compile(r"no frame for \d|no data came in time")

Stream = Generator[StreamResult | StreamEvent]


@pytest.fixture
def camera() -> Iterator[RtspServer]:
    with RtspServer() as server:
        yield server


def open_stream(predictor: Predictor, source: object, **options: Any) -> Stream:
    settings: dict[str, Any] = {"stall_s": LONG_S, "reconnect_s": 0.3, "events": True} | options
    return stream(predictor, source, **settings)


def until(results: Stream, kind: str) -> StreamEvent:
    """The next event of a kind; results and other events before it are passed over."""
    deadline = time.monotonic() + LONG_S
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
    deadline = time.monotonic() + LONG_S
    while len(found) < 6 or sum(each.dropped for each in found) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.2)  # six frames
        found.append(result(results))
        # Two clocks, of which one may be set meanwhile: 50 ms.
        assert 0 < found[-1].age_ms <= (time.time() - found[-1].received_s) * 1000 + 50
    shown = [number_of(each.prediction.orig_img) for each in (first, *found)]
    gaps = [each.dropped + 1 for each in found]
    assert [gap % 60 for gap in gaps] == [(b - a) % 60 for a, b in pairwise(shown)]
    assert gaps == [b.index - a.index for a, b in pairwise((first, *found))]
    times_s = [each.time_s for each in (first, *found) if each.time_s is not None]
    assert len(times_s) == len(found) + 1 and times_s == sorted(times_s)


def test_every_frame_of_a_camera_waits_in_a_bounded_queue(
    predictor: Predictor, camera: RtspServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, put, waiting = threading.Semaphore(1), Mailbox.put, 0

    def held(self: Mailbox, item: Any) -> bool:
        nonlocal waiting
        waiting += 1
        assert gate.acquire(timeout=LONG_S)
        return put(self, item)

    monkeypatch.setattr(Mailbox, "put", held)
    results = open_stream(predictor, camera.url, every=True, queue=4)
    first = result(results)
    gate.release(10)
    assert comes_true(lambda: waiting == 12)  # ten more are in, and one waits outside
    waited = [result(results) for _ in range(3)]  # the fourth of the queue is the one that ran
    gate.release(1000)
    assert [each.index for each in (first, *waited)] == [0, 8, 9, 10]
    assert [each.dropped for each in (first, *waited)] == [0, 7, 0, 0]
    results.close()


def test_a_camera_that_dies_is_found_again(predictor: Predictor) -> None:
    server = RtspServer()
    results = open_stream(predictor, server.url)
    result(results)
    gc.collect()
    threads = len(threads_named("fastad"))
    server.stop()
    lost = until(results, "stall")
    assert "trying again" in lost.message and lost.source == server.url
    with RtspServer(server.port):
        back = next(results)
        assert isinstance(back, StreamEvent) and back.kind == "reconnect"
        assert "frames again after" in back.message
        assert result(results).index >= back.index
        assert comes_true(lambda: len(threads_named("fastad")) == threads)
        results.close()


def test_a_camera_that_freezes_is_noticed(predictor: Predictor, camera: RtspServer) -> None:
    results = open_stream(predictor, camera.url, stall_s=STALL_S)
    result(results)
    camera.freeze()
    stall = until(results, "stall")
    assert NOTHING_CAME.search(stall.message)
    camera.thaw()
    until(results, "reconnect")
    assert result(results).prediction.orig_shape == (H, W)


def test_sound_does_not_hide_that_the_pictures_stopped(predictor: Predictor) -> None:
    with RtspServer(sound=True) as server:
        results = open_stream(predictor, server.url, stall_s=STALL_S)
        result(results)
        server.freeze()
        while "trying again" not in until(results, "stall").message:
            pass  # the watch over the frames was first
        results.close()
        assert comes_true(lambda: threads_named("fastad reader") == []), "the reader never left"


def test_a_camera_that_nothing_can_decode_says_so_and_can_be_left(predictor: Predictor) -> None:
    noise = [np.random.default_rng(i).bytes(200) for i in range(5)]
    with RtspServer(units=noise) as server:
        results = open_stream(predictor, server.url, stall_s=STALL_S)
        while "the data cannot be decoded: " not in until(results, "stall").message:
            pass  # the watch over the frames was first
        results.close()
        assert comes_true(lambda: threads_named("fastad reader") == []), "the reader never left"


def test_a_camera_of_frames_without_a_picture_can_be_left(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OPEN_S", STALL_S)
    with RtspServer(units=[b"\0\0\1\xb6\0\0\0"]) as server:  # not coded: as the one before
        results = open_stream(predictor, server.url, stall_s=STALL_S)
        until(results, "stall")
        results.close()
        assert comes_true(lambda: threads_named("fastad reader") == []), "the reader never left"


def test_why_a_camera_is_lost_is_told_after_its_silence(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OPEN_S", 2 * STALL_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/line"
        results = open_stream(predictor, address, stall_s=STALL_S, reconnect_s=None)
        found = [str(each) for each in results]
    assert "cannot be opened" in found[-2] and "ended after 0 frames" in found[-1]


def test_an_address_in_capitals_is_one(predictor: Predictor, camera: RtspServer) -> None:
    results = open_stream(predictor, camera.url.replace("rtsp", "RTSP"))
    assert result(results).index >= 0
    results.close()


def test_a_camera_that_is_not_there_yet_is_waited_for(predictor: Predictor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    results = open_stream(predictor, f"rtsp://127.0.0.1:{port}/line")
    event = next(results)
    assert isinstance(event, StreamEvent) and event.kind == "stall"
    assert "Connection refused" in event.message
    with RtspServer(port):
        until(results, "reconnect")
        back = result(results)
        assert back.index == back.dropped  # counted from 0
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
        # In this process the server has a side of each connection too.
        assert comes_true(lambda: threads_named("rtsp client") == [])
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    leave()
    before = leave()
    assert [leave() for _ in range(3)] == [before] * 3


def test_closing_while_a_host_never_answers(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OPEN_S", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        address = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/line"
        results = open_stream(predictor, address, stall_s=STALL_S)
        event = next(results)
        assert isinstance(event, StreamEvent) and event.kind == "stall"
        assert NOTHING_CAME.search(event.message)
        results.close()
        assert threads_named("fastad reader"), "closing waited for the reader"
        assert comes_true(lambda: threads_named("fastad reader") == []), "the reader never left"
