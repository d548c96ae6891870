"""`stream`: results for as long as a source gives frames, the newest frame of a camera first.

Each source has a reader thread that decodes into a bounded `Mailbox`. While a batch is in the graph
the next one is resized, and both go on while the caller uses the results before; only the newest
frame of a camera is taken when it is asked for, in the caller's thread. A slow caller costs a
camera's older frames, which are counted, and makes files wait.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from fastad.camera.events import Entry, Mailbox, Shot, StreamEvent, StreamResult
from fastad.camera.source import AnySource, LostError, open_sources
from fastad.errors import InputError
from fastad.inspected import Area
from fastad.pending import Workers
from fastad.prediction import Prediction
from fastad.preprocess import Color, ValueRange

if TYPE_CHECKING:
    from fastad.look import Frames
    from fastad.predictor import Predictor, Request

log = logging.getLogger(__name__)

QUEUE = 8  # frames; 50 MB of 1080p
FIRST_PAUSE_S = 0.25  # before the first attempt to reconnect; each further pause is twice as long
CLOSE_S = 1.0  # how long closing waits for readers; one inside FFmpeg follows at its timeout

OnEvent = Callable[[StreamEvent], object]


def stream(
    predictor: Predictor,
    source: object,
    *,
    every: bool = False,
    queue: int = QUEUE,
    threshold: float | None = None,
    color: Color = "rgb",
    category: str | None = None,
    value_range: ValueRange | None = None,
    tile: tuple[int, int] | int | None = None,
    overlap: float = 0.25,
    region: Area | None = None,
    ignore: Area | None = None,
    batch: int | None = None,
    stall_s: float = 2.0,
    reconnect_s: float | None = 2.0,
    on_event: OnEvent | None = None,
    events: bool = False,
) -> Generator[StreamResult | StreamEvent]:
    """Look at frames as they come, with bounded memory; the `predictor` stays the caller's.

    A finite source (folder, pattern, image files, video file, any iterable) gives a result for
    every frame, and runs ahead of the caller by ``queue`` frames. A live source (camera,
    ``rtsp://``) gives its newest frame each time; those in between are dropped and counted in
    ``dropped``, and nothing runs ahead, since a result made early would be an old one. It never
    ends by itself: a lost camera is tried again until the generator is closed.

    Arguments are checked at the call; sources are read from the first ``next`` on. Leaving the
    loop, ``close()``, Ctrl-C, an exception and the end of the program stop the readers. Closing
    waits for batches that are in the graph, and at most 1 s for the readers. A reader that waits
    inside FFmpeg then ends on its own, within twice ``stall_s``, or while it connects within 5 s or
    ``stall_s`` if that is more; one that waits inside an iterable ends with the iterable's next
    frame.

    Args:
        predictor: An open predictor.
        source: A folder, a pattern, an image or video file, an ``rtsp://`` address, the number of
            a camera (V4L2) also as a string, or an iterable of what `predict` takes as one image
            (or a batch). A list or tuple of these is several sources; one that holds images only
            is one source. PyAV reads videos and cameras.
        every: Also a live source queues its frames, and drops the oldest of a full queue.
        queue: Frames of each source that may wait or run ahead of the caller, for finite sources
            and with ``every``; at least one waits beside those that run.
        threshold: As in `predict`.
        color: As in `predict`, for the arrays of iterables.
        category: As in `predict`.
        value_range: As in `predict`, and for gray videos with more than 8 bits.
        tile: As in `predict`.
        overlap: As in `predict`.
        region: As in `predict`; a frame that it does not fit ends the stream.
        ignore: As in `predict`.
        batch: Frames that run together at most, of those that wait already; None takes the number
            of sources.
        stall_s: Seconds without a frame after which a live source counts as stalled.
        reconnect_s: Longest pause between two attempts to reconnect; None ends a lost source.
        on_event: Called with each `StreamEvent`, in the caller's thread and in order with the
            results. None logs them.
        events: Yield the events among the results instead.

    Yields:
        `StreamResult`, in order for each source; with ``events`` also `StreamEvent`.

    Raises:
        InputError: an argument that cannot be used, a source that does not exist, or a file that
            is no video.
        UnsupportedError: the source needs PyAV, which is not installed.
        EngineError: while running, the runtime fails. What an iterable raises comes out as it is.
    """
    for name, value in (("queue", queue), ("batch", 1 if batch is None else batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected a whole number of frames from 1, got {value!r}")
    _check_seconds("stall_s", stall_s)
    if reconnect_s is not None:
        _check_seconds("reconnect_s", reconnect_s)
    if events and on_event:
        raise InputError("events: expected either events=True or on_event, got both")
    predictor._check_open()
    request = predictor.request(
        threshold=threshold,
        category=category,
        tile=tile,
        overlap=overlap,
        region=region,
        ignore=ignore,
    )
    declared = value_range or predictor.manifest.spec.input.value_range
    sources = open_sources(source, color, declared, stall_s)
    size = batch or len(sources)
    newest = any(each.live for each in sources) and not every
    ahead = 0 if newest else predictor.runs_at_once
    # Of each source, when all are equally fast; what runs ahead left the queue.
    waiting = max(1, queue - ahead * math.ceil(size / len(sources)))
    bell = threading.Condition()
    readers = [
        Reader(each, 1 if each.live and not every else waiting, bell, reconnect_s)
        for each in sources
    ]
    batches = _Batches(readers, bell, size, stall_s)
    tell = None if events else on_event or _Log()
    return _results(predictor, batches, request, tell, ahead)


class Reader:
    """Reads one source into its mailbox, on a daemon thread that it owns from start to stop."""

    def __init__(
        self,
        source: AnySource,
        capacity: int,
        bell: threading.Condition,
        reconnect_s: float | None,
    ) -> None:
        self.source = source
        self.mailbox = Mailbox(
            source.name, capacity, live=source.live, steady=source.steady, bell=bell
        )
        self._reconnect_s = reconnect_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read."""
        self.mailbox.begin()
        name = f"fastad reader of {self.source.name}"
        self._thread = threading.Thread(target=self._read, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, without waiting for it."""
        self._stopping.set()
        self.mailbox.close()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(max(timeout_s, 0.0))

    def _read(self) -> None:
        try:
            self._read_while_wanted()
        except BaseException as error:
            self.mailbox.fail(error)
        finally:
            self.mailbox.end()

    def _read_while_wanted(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                # Leaving closes the file or connection here, in the thread that reads it.
                with closing(self.source.frames()) as frames:
                    for item in frames:
                        if not self.mailbox.put(item):
                            return
                        pause_s = FIRST_PAUSE_S
                reason = "the connection ended"  # FFmpeg ends so when the server goes away
            except LostError as error:
                reason = str(error)
                if not self.source.live:
                    self.mailbox.unreadable(reason)
            if not self.source.live:
                return
            if self._reconnect_s is None:
                self.mailbox.stall(reason)
                return
            self.mailbox.stall(f"{reason}; trying again every {self._reconnect_s:g} s")
            if self._stopping.wait(min(pause_s, self._reconnect_s)):
                return
            pause_s *= 2


class _Batches:
    """Takes what waits in the mailboxes, in turn; owns the readers between start and stop."""

    def __init__(
        self, readers: list[Reader], bell: threading.Condition, size: int, stall_s: float
    ) -> None:
        self._readers, self._bell, self._size, self._stall_s = readers, bell, size, stall_s
        self._first = 0

    def start(self) -> None:
        _running.add(self)
        for reader in self._readers:
            reader.start()

    def stop(self) -> None:
        """Stop all readers and wait up to `CLOSE_S` for them."""
        for reader in self._readers:
            reader.stop()
        deadline = time.monotonic() + CLOSE_S
        for reader in self._readers:
            reader.join(deadline - time.monotonic())
        _running.discard(self)

    def next(self, *, wait: bool = True) -> list[Entry]:
        """What came since, at most ``size`` frames; waits for something; empty after the end.

        Without ``wait`` also empty if nothing came.
        """
        with self._bell:
            while True:
                ended = all(reader.mailbox.ended for reader in self._readers)
                found = self._take()
                if found or ended or not wait:
                    return found
                self._bell.wait(self._until_stall())

    def _take(self) -> list[Entry]:
        found: list[Entry] = []
        frames = 0
        boxes = [reader.mailbox for reader in self._readers]
        boxes = boxes[self._first :] + boxes[: self._first]
        self._first = (self._first + 1) % len(boxes)  # no source is always served first
        while frames < self._size and boxes:
            for box in list(boxes):
                entry = box.take() if frames < self._size else None
                if entry is None:
                    boxes.remove(box)
                else:
                    found.append(entry)
                    frames += isinstance(entry, Shot)
        return found

    def _until_stall(self) -> float:
        """Note the stalls that are due; seconds until the next one can be."""
        until_s = 1.0
        for box in (reader.mailbox for reader in self._readers):
            silent_s = box.silent_s()
            if silent_s is not None and silent_s >= self._stall_s:
                box.stall(f"no frame for {silent_s:.1f} s")
                until_s = 0.0
            elif silent_s is not None:
                until_s = min(until_s, self._stall_s - silent_s)
        return until_s


# Streams that run: the end of the program stops what a module still holds.
_running: weakref.WeakSet[_Batches] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for batches in list(_running):
        batches.stop()


def _results(
    predictor: Predictor,
    batches: _Batches,
    request: Request,
    tell: OnEvent | None,
    ahead: int,
) -> Generator[StreamResult | StreamEvent]:
    line = _Line(predictor, batches, request, ahead)
    try:
        batches.start()
        while entries := line.next():
            found = iter(line.predictions())
            entries.reverse()
            while entries:
                entry = entries.pop()
                if isinstance(entry, BaseException):
                    raise entry
                if isinstance(entry, StreamEvent):
                    if tell is None:
                        yield entry
                    else:
                        tell(entry)
                    continue
                prediction = next(found)
                prediction.speed["decode"] = entry.taken.decode_ms  # in the reader's thread
                yield StreamResult(
                    prediction=prediction,
                    source=entry.name,
                    index=entry.index,
                    time_s=entry.taken.time_s,
                    received_s=entry.received_s,
                    dropped=entry.dropped,
                    age_ms=(time.monotonic() - entry.received) * 1000,
                )
                del prediction, entry
    finally:
        batches.stop()
        line.stop()


class _Line:
    """Batches on their way through the predictor, in order; owns the threads they run on.

    ``ahead`` batches go on while the caller uses the results before them, and one more while it
    waits: one is resized while the others are in the graph. 0 runs each batch as it is taken.
    """

    def __init__(
        self, predictor: Predictor, batches: _Batches, request: Request, ahead: int
    ) -> None:
        self._predictor, self._batches, self._request = predictor, batches, request
        self._ahead = ahead
        self._workers = Workers("fastad stream", ahead + 1, ahead + 1) if ahead else None
        self._running: deque[tuple[list[Entry], Future[list[Prediction]] | None]] = deque()
        self._first: Future[list[Prediction]] | None = None

    def next(self) -> list[Entry]:
        """Entries of the next batch; empty after the end."""
        while len(self._running) <= self._ahead:
            entries = self._batches.next(wait=not self._running)
            if not entries:
                break
            self._running.append((entries, self._begin(entries)))
        if not self._running:
            return []
        entries, self._first = self._running.popleft()
        return entries

    def predictions(self) -> list[Prediction]:
        """Of the frames that `next` gave; what the predictor raises comes out here."""
        first, self._first = self._first, None
        found = first.result() if first else []
        self._predictor._check_open()
        return found

    def _begin(self, entries: list[Entry]) -> Future[list[Prediction]] | None:
        shots = [entry for entry in entries if isinstance(entry, Shot)]
        pairs = [(shot.taken.source, shot.taken.frame) for shot in shots]
        if not pairs:
            return None
        if self._workers:
            return self._workers.submit(partial(self._run, pairs))
        done: Future[list[Prediction]] = Future()
        done.set_result(self._run(pairs))
        return done

    def _run(self, pairs: Frames) -> list[Prediction]:
        return self._predictor.run(pairs, self._request, time.perf_counter())

    def stop(self) -> None:
        """Finish what is in the graph, drop the rest, end the threads."""
        if self._workers:
            self._workers.close(cancel=True)


class _Log:
    """Logs events; of unreadable frames without another event between them the 1st, 2nd, 4th..."""

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}

    def __call__(self, event: StreamEvent) -> None:
        if event.kind != "unreadable":
            self._in_a_row.pop(event.source, None)
            quiet = event.kind in ("end", "changed")
            log.log(logging.INFO if quiet else logging.WARNING, "%s", event)
            return
        count = self._in_a_row[event.source] = self._in_a_row.get(event.source, 0) + 1
        if count & (count - 1) == 0:
            log.warning("%s: frame %d: %s (%d)", event.source, event.index, event.message, count)


def _check_seconds(name: str, value: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise InputError(f"{name}: expected seconds above 0, got {value!r}")
