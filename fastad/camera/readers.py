"""The threads that read sources into mailboxes, and the batches that are taken from them."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from contextlib import closing

from fastad.camera.events import Entry, Mailbox, Shot
from fastad.camera.source import AnySource, LostError

FIRST_PAUSE_S = 0.25  # before the first attempt to reconnect; each further pause is twice as long
CLOSE_S = 1.0  # how long closing waits for readers; one inside FFmpeg follows at its timeout


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


class Batches:
    """Takes what waits in the mailboxes, in turn; owns the readers between start and stop.

    In a forked child, which has no readers, `stop` does nothing, and `next` must not be called.
    """

    def __init__(
        self, readers: list[Reader], bell: threading.Condition, size: int, stall_s: float
    ) -> None:
        self._readers, self._bell, self._size, self._stall_s = readers, bell, size, stall_s
        self._first = 0
        self._process = os.getpid()

    def start(self) -> None:
        """Begin to read every source."""
        _running.add(self)
        for reader in self._readers:
            reader.start()

    def stop(self) -> None:
        """Stop all readers and wait up to `CLOSE_S` for them."""
        if os.getpid() != self._process:
            return  # a reader that stayed behind may have held the bell: it would stay locked
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
                until_s = self._until_stall()  # also while other sources have frames
                ended = all(reader.mailbox.ended for reader in self._readers)
                found = self._take()
                if found or ended or not wait:
                    return found
                self._bell.wait(until_s)

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
                box.silent(silent_s)
            elif silent_s is not None:
                until_s = min(until_s, self._stall_s - silent_s)
        return until_s


# Streams that run: the end of the program stops what a module still holds.
_running: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for batches in list(_running):
        batches.stop()
