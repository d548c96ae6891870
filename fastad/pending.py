"""Work that waits for a few threads: a bounded queue, and a future for each piece of it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastad.errors import InputError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Workers:
    """Does pieces of work on threads of its own, begun in the order of `submit`, until `close`.

    Its queue is bounded, which that of `concurrent.futures.ThreadPoolExecutor` is not: whoever
    submits faster than the threads work waits. A piece that was cancelled keeps its place until a
    thread comes by. Owns its threads; the end of the program closes it.

    Args:
        name: Of the threads.
        threads: Pieces in work at once.
        room: Pieces that may wait.
    """

    def __init__(self, name: str, threads: int, room: int) -> None:
        self._room = room
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        lock = threading.RLock()  # a finaliser may close it within any allocation
        self._came, self._went = threading.Condition(lock), threading.Condition(lock)
        self._closed = False
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name} {i}", daemon=True)
            for i in range(threads)
        ]
        self._left: set[threading.Thread] = set()  # will begin nothing more
        _open.add(self)
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of work; waits while the queue is full.

        Raises:
            InputError: it is closed, or closes meanwhile; or the queue is full and one of its own
                threads asks, in a callback of a future, which would wait for itself.
        """
        future: Future[T] = Future()
        with self._went:
            while len(self._waiting) >= self._room and not self._closed:
                if threading.current_thread() in self._threads:
                    raise InputError(
                        f"submit: {self._room} images wait already, and a callback cannot wait for "
                        "room in the thread that makes it; submit from a thread of your own"
                    )
                self._went.wait()
            if self._closed:
                raise InputError("predictor: it is closed; call fastad.load again")
            self._waiting.append((future, work))
            self._came.notify()
        return future

    def _serve(self) -> None:
        while True:
            with self._came:
                while not self._waiting and not self._closed:
                    self._came.wait()
                if not self._waiting:
                    self._leave()
                    return
                future, work = self._waiting.popleft()
                self._went.notify()
            try:
                _do(future, work)
            except BaseException:  # `Future` logs an Exception of a callback, and lets others out
                log.exception("exception calling callback for %r", future)
            del future, work  # an idle thread holds no image and no result

    def close(self, *, cancel: bool = False) -> None:
        """Refuse more, do what waits (or cancel it), and wait for the threads.

        In a forked child, where the threads do not exist, it does nothing. One of its own threads,
        in a callback of a future, waits for those that are not in such a call themselves.
        """
        if os.getpid() != self._process:
            return
        with self._came:
            self._closed = True
            dropped = list(self._waiting) if cancel else []
            if cancel:
                self._waiting.clear()
            self._came.notify_all()
            self._went.notify_all()
        for future, _ in dropped:
            future.cancel()
            future.set_running_or_notify_cancel()  # tells who waits for it
        if threading.current_thread() in self._threads:
            with self._went:
                self._leave()
                self._went.wait_for(lambda: len(self._left) == len(self._threads))
        else:
            for thread in self._threads:
                thread.join()

    def _leave(self) -> None:
        self._left.add(threading.current_thread())
        self._went.notify_all()


def _do(future: Future[T], work: Callable[[], T]) -> None:
    """Do a piece of work that was not cancelled; callbacks of its future run here."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(found)


# Daemon threads inside a runtime that is being taken down crash: they end before that.
_open: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_open):
        workers.close(cancel=True)
