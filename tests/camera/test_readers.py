"""Batches of what the readers left: every source has its turn, and a forked child is let go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator

import pytest
from gated import LONG_S
from loopback import picture

from fastad.camera.events import Shot, StreamEvent, Taken
from fastad.camera.readers import Batches, Reader
from fastad.preprocess import Source


class Still:
    """A source of three frames."""

    live, steady = False, True

    def __init__(self, name: str) -> None:
        self.name = name

    def frames(self) -> Generator[Taken]:
        for i in range(3):
            source = Source(picture(i), self.name)
            yield Taken(source, source.frame(), None, 0.0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, "a b c a b c a b c"), (2, "ab bc ca ab c"), (4, "abca bcab c")],
)
def test_no_source_is_always_served_first(size: int, expected: str) -> None:
    bell = threading.Condition()
    readers = [Reader(Still(name), 3, bell, None) for name in "abc"]
    for reader in readers:
        for item in reader.source.frames():
            assert reader.mailbox.put(item)
    batches = Batches(readers, bell, size, 1.0)
    served = []
    while entries := batches.next(wait=False):
        served.append("".join(entry.name for entry in entries if isinstance(entry, Shot)))
    assert " ".join(served) == expected


def test_a_silent_camera_is_noticed_while_another_has_frames() -> None:
    bell = threading.Condition()
    sources = [Still("busy"), Still("silent")]
    for source in sources:
        source.live = True
    busy, _ = readers = [Reader(source, 1, bell, None) for source in sources]
    batches = Batches(readers, bell, 1, 0.05)
    for reader in readers:
        reader.mailbox.begin()
    (item, *_) = busy.source.frames()
    found: list[str] = []
    deadline = time.monotonic() + LONG_S
    while not found:
        assert time.monotonic() < deadline
        busy.mailbox.put(item)
        came = [each for each in batches.next() if isinstance(each, StreamEvent)]
        found = [str(each) for each in came if each.source == "silent"]
    assert "no frame for" in found[0]


FORK = """
import faulthandler, os, threading
from fastad.camera.readers import Batches, Reader

class Silent:
    live, steady, name = False, True, "silent"

    def frames(self):
        threading.Event().wait()
        yield

def hold():
    with bell:
        held.set()
        threading.Event().wait()

bell, held = threading.Condition(), threading.Event()
batches = Batches([Reader(Silent(), 1, bell, None)], bell, 1, 1.0)
batches.start()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)  # nobody else ends it if it hangs
    batches.stop()
    os._exit(7)
os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_a_forked_child_does_not_wait_for_what_a_reader_held() -> None:
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 7, done.stderr
