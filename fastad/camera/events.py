"""What a stream gives: results, events, and the bounded mailbox in which both wait in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fastad.prediction import Prediction
from fastad.preprocess import Frame, Source

EventKind = Literal["end", "stall", "reconnect", "unreadable", "changed"]

EVENTS = 64  # events that wait for a reader who does not come; older ones are given up


@dataclass(frozen=True)
class StreamEvent:
    """Something that happened to a source, between two of its results.

    Attributes:
        kind: ``stall``: a live source gives no frames; the sentence says why, or a second event
            does once that is known. ``reconnect``: its frames are back. ``unreadable``: one frame,
            or the rest of a file, could not be decoded, or ``region``, ``ignore`` or ``tile`` does
            not fit the frame. ``changed``: frames have another size or type from here on. ``end``:
            the source gives no more, always the last of it.
        source: Name of the source, without the password of its address.
        index: Number of the next frame of the source, or of the one that is unreadable.
        message: One sentence for people.
    """

    kind: EventKind
    source: str
    index: int
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the kind is called ``event``, which no result has."""
        fields = asdict(self)
        return {"event": fields.pop("kind")} | fields

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


@dataclass(frozen=True, eq=False)
class StreamResult:
    """A `Prediction` and where in the stream it belongs.

    Attributes:
        prediction: Verdict, scores and map.
        source: Name of the source, as in `StreamEvent`.
        index: Number of the frame in its source from 0; dropped and unreadable ones count.
        time_s: Presentation time of a video frame, in seconds on the clock of its file or
            connection; None for images.
        received_s: Unix time at which the frame was received.
        dropped: Frames of this source that were given up since its previous result, because newer
            ones had come.
        age_ms: From the receipt of the frame to this result.
    """

    prediction: Prediction
    source: str
    index: int
    time_s: float | None
    received_s: float
    dropped: int
    age_ms: float

    @property
    def pred_label(self) -> bool | None:
        """The verdict: ``prediction.pred_label``."""
        return self.prediction.pred_label

    @property
    def pred_score(self) -> float | None:
        """The calibrated score: ``prediction.pred_score``."""
        return self.prediction.pred_score

    @property
    def raw_score(self) -> float:
        """The method's own value: ``prediction.raw_score``."""
        return self.prediction.raw_score

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: those of the prediction and the facts of the stream."""
        return self.prediction.to_dict() | {
            "source": self.source,
            "index": self.index,
            "time_s": self.time_s,
            "received_s": round(self.received_s, 3),
            "dropped": self.dropped,
            "age_ms": round(self.age_ms, 3),
        }


@dataclass(frozen=True, eq=False)
class Taken:
    """A decoded frame as its source gives it; ``decode_ms`` is what that cost."""

    source: Source
    frame: Frame
    time_s: float | None
    decode_ms: float


@dataclass(frozen=True)
class Unreadable:
    """A frame that could not be decoded, and why."""

    message: str


@dataclass(frozen=True)
class Nothing:
    """Data of a live source without a picture; ``message`` says why, where that is known."""

    message: str = ""


@dataclass(frozen=True, eq=False)
class Shot:
    """A frame that waits for the predictor; ``received`` is on the monotonic clock."""

    taken: Taken
    name: str
    index: int
    received_s: float
    received: float
    dropped: int = 0


Entry = Shot | StreamEvent | BaseException


class Mailbox:
    """Frames and events of one source between its reader thread and the predictor, in order.

    It never holds more than ``capacity`` frames and, of a live source, `EVENTS` events.

    Args:
        name: Of the source.
        capacity: Frames that may wait.
        live: A full box gives up its oldest frame. Otherwise it makes its reader wait.
        steady: Frames are expected to keep their size and type; a change is an event.
        bell: Guards every mailbox of a stream, and rings when something comes or goes.
    """

    def __init__(
        self, name: str, capacity: int, *, live: bool, steady: bool, bell: threading.Condition
    ) -> None:
        self.name, self.live = name, live
        self.closed = False
        self.ended = False
        self._capacity, self._steady, self._bell = capacity, steady, bell
        self._entries: deque[Entry] = deque()
        self._frames = self._index = 0
        self._lost = self._lost_in_all = 0
        self._stalled = self._explained = False
        self._hint = ""
        self._kind: tuple[Any, ...] | None = None
        self._last_s = 0.0

    def begin(self) -> None:
        """Start the clock that notices a stall."""
        self._last_s = time.monotonic()

    def put(self, item: Taken | Unreadable | Nothing) -> bool:
        """Add what was read; False when nobody wants more. Waits while a finite source is full."""
        received, received_s = time.monotonic(), time.time()
        with self._bell:
            if isinstance(item, Nothing):
                self._hint = item.message or self._hint
                if item.message and self._stalled and not self.closed:
                    self.stall(f"the data {item.message}")
                return not self.closed
            while not self.live and len(self._entries) >= self._capacity and not self.closed:
                self._bell.wait()
            if self.closed:
                return False
            if isinstance(item, Unreadable):
                self._event("unreadable", item.message)
                self._index += 1
                self._bell.notify_all()
                return True
            if self._frames >= self._capacity:
                self._give_up_oldest()
            if self._stalled:
                self._event("reconnect", f"frames again after {received - self._last_s:.1f} s")
            self._stalled, self._hint = False, ""
            self._note_kind(item)
            self._last_s = received
            self._entries.append(Shot(item, self.name, self._index, received_s, received))
            self._frames += 1
            self._index += 1
            self._bell.notify_all()
        return True

    def unreadable(self, message: str) -> None:
        """Note that the rest of a file cannot be read."""
        with self._bell:
            self._event("unreadable", message)

    def stall(self, reason: str) -> None:
        """Note why frames stay away: one event for the whole time, however often it is noted.

        A second one follows if `silent` was first.
        """
        with self._bell:
            if not (self._stalled and self._explained):
                self._stalled = self._explained = True
                self._event("stall", reason)
                self._bell.notify_all()

    def silent(self, seconds: float) -> None:
        """Note that a live source has given nothing for so long."""
        with self._bell:
            hint = f"; the data {self._hint}" if self._hint else ""
            self._stalled, self._explained = True, bool(hint)
            self._event("stall", f"no frame for {seconds:.1f} s{hint}")
            self._bell.notify_all()

    def fail(self, error: BaseException) -> None:
        """Hand an exception of the caller's own iterable, or a bug, to the reader of the stream."""
        with self._bell:
            self._entries.append(error)

    def end(self) -> None:
        """Say that nothing more will come."""
        with self._bell:
            lost = f", {self._lost_in_all} of them dropped" if self._lost_in_all else ""
            self._event("end", f"ended after {self._index} frames{lost}")
            self.ended = True
            self._bell.notify_all()

    def close(self) -> None:
        """Drop everything and refuse more."""
        with self._bell:
            self.closed = True
            self._entries.clear()
            self._bell.notify_all()

    def take(self) -> Entry | None:
        """The oldest entry, or None; the caller holds the bell."""
        if not self._entries:
            return None
        entry = self._entries.popleft()
        if isinstance(entry, Shot):
            entry = replace(entry, dropped=self._lost)
            self._lost = 0
            self._frames -= 1
        self._bell.notify_all()  # its reader may be waiting for room
        return entry

    def silent_s(self) -> float | None:
        """How long a live source has given nothing; None for others or if a stall was noted."""
        if not self.live or self._stalled or self.ended:
            return None
        return time.monotonic() - self._last_s

    def _give_up_oldest(self) -> None:
        # Events in front of it stay: a box holds few entries, so a search is cheap.
        oldest = next(i for i, entry in enumerate(self._entries) if isinstance(entry, Shot))
        del self._entries[oldest]
        self._frames -= 1
        self._lost += 1
        self._lost_in_all += 1

    def _note_kind(self, item: Taken) -> None:
        content = item.source.content
        dtype = getattr(content, "dtype", item.frame.pixels.dtype)
        kind = (str(dtype), list(item.frame.pixels.shape))
        if self._steady and self._kind not in (None, kind):
            now, before = ("{} {}".format(*of) for of in (kind, self._kind or kind))
            self._event("changed", f"frames are {now} from here on, they were {before}")
        self._kind = kind

    def _event(self, kind: EventKind, message: str) -> None:
        events = [i for i, entry in enumerate(self._entries) if isinstance(entry, StreamEvent)]
        if self.live and len(events) >= EVENTS:
            del self._entries[events[0]]
        self._entries.append(StreamEvent(kind, self.name, self._index, message))
