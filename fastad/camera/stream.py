"""`stream`: results for as long as a source gives frames, the newest frame of a camera first.

Each source has a reader thread that decodes into a bounded `Mailbox`. While a batch is in the graph
the next one is resized, and both go on while the caller uses the results before; only the newest
frame of a camera is taken when it is asked for, in the caller's thread. A slow caller costs a
camera's older frames, which are counted, and makes files wait.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Unpack

from fastad import tiling
from fastad.camera.events import Entry, Shot, StreamEvent, StreamResult
from fastad.camera.readers import Batches, Reader
from fastad.camera.source import open_sources
from fastad.errors import InputError
from fastad.pending import Workers
from fastad.prediction import Prediction
from fastad.request import Options, Request, check_options

if TYPE_CHECKING:
    from fastad.look import Aim, Frames
    from fastad.predictor import Predictor

log = logging.getLogger(__name__)

QUEUE = 8  # frames; 50 MB of 1080p

OnEvent = Callable[[StreamEvent], object]


def stream(
    predictor: Predictor,
    source: object,
    *,
    every: bool = False,
    queue: int = QUEUE,
    batch: int | None = None,
    stall_s: float = 2.0,
    reconnect_s: float | None = 2.0,
    on_event: OnEvent | None = None,
    events: bool = False,
    **options: Unpack[Options],
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
    ``stall_s`` if that is more; one that waits inside an iterable, or for a V4L2 camera whose
    driver hangs, ends with the next frame.

    Args:
        predictor: An open predictor.
        source: A folder, a pattern, an image or video file, an ``rtsp://`` address, the number of
            a camera (V4L2) also as a string, or an iterable of what `predict` takes as one image
            (or a batch). A list or tuple of these is several sources; one that holds images only
            is one source. PyAV reads videos and cameras.
        every: Also a live source queues its frames, and drops the oldest of a full queue.
        queue: Frames of each source that may wait or run ahead of the caller, for finite sources
            and with ``every``; at least one waits beside those that run.
        batch: Frames that run together at most, of those that wait already; None takes the number
            of sources.
        stall_s: Seconds without a frame after which a live source counts as stalled.
        reconnect_s: Longest pause between two attempts to reconnect; None ends a lost source.
        on_event: Called with each `StreamEvent`, in the caller's thread and in order with the
            results. None logs them.
        events: Yield the events among the results instead.
        options: As in `predict`. ``color`` is that of the arrays of iterables; ``value_range`` is
            for gray videos with more than 8 bits too; a frame that ``region`` or ``ignore`` does
            not fit is an ``unreadable`` event.

    Yields:
        `StreamResult`, in order for each source; with ``events`` also `StreamEvent`.

    Raises:
        InputError: an argument that cannot be used, a source that does not exist, or a file that
            is no video.
        UnsupportedError: the source needs PyAV, which is not installed.
        EngineError: while running, the runtime fails. What an iterable raises comes out as it is.
            In a forked child each ``next`` is the InputError of any call there.
    """
    for name, value in (("queue", queue), ("batch", 1 if batch is None else batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected a whole number of frames from 1, got {value!r}")
    _check_seconds("stall_s", stall_s)
    if reconnect_s is not None:
        _check_seconds("reconnect_s", reconnect_s)
    if events and on_event:
        raise InputError("events: expected either events=True or on_event, got both")
    predictor.check_open()
    request = check_options(predictor.manifest, 4, **options)  # of whom calls `Predictor.stream`
    sources = open_sources(source, request.color, request.value_range, stall_s)
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
    batches = Batches(readers, bell, size, stall_s)
    tell = None if events else on_event or _Log()
    return _results(predictor, batches, request, tell, ahead)


def _results(
    predictor: Predictor,
    batches: Batches,
    request: Request,
    tell: OnEvent | None,
    ahead: int,
) -> Generator[StreamResult | StreamEvent]:
    predictor.check_open()  # before a source is opened
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
                predictor.check_open()  # the caller had its turn, and may have closed it or forked
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
        self, predictor: Predictor, batches: Batches, request: Request, ahead: int
    ) -> None:
        self._predictor, self._batches, self._request = predictor, batches, request
        self._fitted = _Fitted(request.aim, predictor.manifest.spec.input.size)
        self._ahead = ahead
        self._workers = Workers("fastad stream", ahead + 1, ahead + 1) if ahead else None
        self._running: deque[tuple[list[Entry], Future[list[Prediction]] | None]] = deque()
        self._first: Future[list[Prediction]] | None = None

    def next(self) -> list[Entry]:
        """Entries of the next batch; empty after the end."""
        # A forked child has neither readers nor workers, and would wait for them for ever.
        self._predictor.check_open()
        while len(self._running) <= self._ahead:
            came = self._batches.next(wait=not self._running)
            entries = [self._fitted(entry) for entry in came]
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
        return first.result() if first else []

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


class _Fitted:
    """Puts an event in place of each frame that the area or the tiles of a call do not fit.

    The predictor refuses such a batch as a whole, and the good frames of it would be lost.
    """

    def __init__(self, aim: Aim, model_size: tuple[int, int]) -> None:
        self._aim, self._model_size = aim, model_size
        self._sizes: dict[str, tuple[int, int]] = {}  # of each source, the last that fits
        self._dropped: Counter[str] = Counter()  # of each source, for its next result

    def __call__(self, entry: Entry) -> Entry:
        limited = self._aim.inspected is not None or self._aim.tiling is not None
        if not limited or not isinstance(entry, Shot):
            return entry
        self._dropped[entry.name] += entry.dropped
        try:
            self._check(entry)
        except InputError as error:
            return StreamEvent("unreadable", entry.name, entry.index, str(error))
        return replace(entry, dropped=self._dropped.pop(entry.name))

    def _check(self, shot: Shot) -> None:
        area, size, name = self._aim.inspected, shot.taken.frame.size, shot.taken.source.name
        if self._sizes.get(shot.name) == size:
            return
        if self._aim.tiling:
            counted = area.pixels(size, name) if area is not None else None
            tiling.cut(size, self._model_size, self._aim.tiling, counted, name)
        elif area is not None:
            area.on_map(size, self._model_size, name)
        self._sizes[shot.name] = size


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
