"""Frames that an area does not fit: an event in their place, and every other frame is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_engine import CALIBRATION, fake_predictor
from loopback import picture

from fastad.camera import stream as module
from fastad.camera.events import StreamEvent, StreamResult, Taken
from fastad.errors import FastadWarning
from fastad.preprocess import Source

LARGE, SMALL = (40, 40), (20, 20)
AREA = [(0, 0, 30, 30)]


def looked_at(
    *sources: Any, sizes: list[int] | None = None, **options: Any
) -> dict[str, list[str]]:
    """Of each source what a stream gave, in order: the number of a result, or kind and number."""
    predictor, runtime = fake_predictor((32, 32))
    found: dict[str, list[str]] = {}
    settings: dict[str, Any] = {"region": AREA, "events": True} | options
    for each in predictor.stream(list(sources), **settings):
        kind = f"{each.kind} " if isinstance(each, StreamEvent) else ""
        found.setdefault(each.source, []).append(f"{kind}{each.index}")
    if sizes is not None:
        sizes += runtime.counts
    return found


def clip(*sizes: tuple[int, int]) -> Iterator[Any]:
    return (picture(i, size) for i, size in enumerate(sizes))


ONE_SMALL = ["0", "1", "changed 2", "unreadable 2", "changed 3", "3", "4", "end 5"]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"region": None, "ignore": AREA}])
def test_a_frame_that_an_area_does_not_fit_is_an_event(
    patient: None, batch: int, options: dict[str, Any]
) -> None:
    frames = clip(LARGE, LARGE, SMALL, LARGE, LARGE)
    found = looked_at(frames, batch=batch, queue=20, **options)
    assert found == {"source[0]": ONE_SMALL}


def test_the_other_frames_of_its_batch_are_seen(patient: None) -> None:
    sizes: list[int] = []
    mixed = iter([picture(0, LARGE), "nowhere.png", picture(2, SMALL), picture(3, LARGE)])
    found = looked_at(mixed, clip(*[LARGE] * 3), batch=8, queue=20, sizes=sizes)
    assert found == {
        "source[0]": ["0", "unreadable 1", "changed 2", "unreadable 2", "changed 3", "3", "end 4"],
        "source[1]": ["0", "1", "2", "end 3"],
    }
    assert sum(sizes) == 5


def test_a_source_that_fits_nowhere_leaves_the_others(patient: None) -> None:
    found = looked_at(clip(SMALL, SMALL), clip(LARGE, LARGE), queue=20)
    assert found["source[0]"] == ["unreadable 0", "unreadable 1", "end 2"]
    assert found["source[1]"] == ["0", "1", "end 2"]


@pytest.mark.parametrize(("options", "kind"), [({}, "unreadable "), ({"tile": 32}, "")])
def test_an_area_too_thin_for_the_map_is_an_event(options: dict[str, Any], kind: str) -> None:
    line = np.zeros((400, 400), np.bool_)
    line[200] = True  # a twelfth of a pixel of the whole map, and a pixel of a tile's
    found = looked_at(clip((400, 400), (400, 400)), region=line, **options)
    assert found == {"source[0]": [f"{kind}0", f"{kind}1", "end 2"]}


def test_a_frame_of_too_many_tiles_is_an_event(patient: None) -> None:
    frames = clip(LARGE, (1500, 1500), LARGE)
    found = looked_at(frames, region=None, tile=16, overlap=0.9, batch=3, queue=20)
    changes = [each for each in found["source[0]"] if not each.startswith("changed")]
    assert changes == ["0", "unreadable 1", "2", "end 3"]


def test_the_event_says_what_does_not_fit() -> None:
    predictor, _ = fake_predictor((32, 32))
    event = next(predictor.stream(clip(SMALL), region=AREA, events=True))
    assert isinstance(event, StreamEvent)
    assert "region[0]: spans x 0..30 and y 0..30, beyond" in event.message
    assert "[20, 20]" in event.message


class Camera:
    """A live source that shows six frames, of which the fourth is small, and goes away."""

    live, steady, name = True, True, "camera"

    def frames(self) -> Iterator[Taken]:
        for number in range(6):
            source = Source(picture(number, SMALL if number == 3 else LARGE), self.name)
            yield Taken(source, source.frame(), None, 0.0)


def test_what_was_dropped_before_it_counts_for_the_next_result(
    patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_sources", lambda *_: [Camera()])
    predictor, _ = fake_predictor((32, 32))
    results = predictor.stream(
        0, every=True, queue=4, reconnect_s=None, stall_s=60.0, region=AREA, events=True
    )
    found = [each for each in results if isinstance(each, StreamResult)]
    # The queue holds three beside the one that runs: 3, which does not fit, 4 and 5.
    assert [(each.index, each.dropped) for each in found] == [(4, 3), (5, 0)]


@pytest.mark.parametrize("method", ["predict", "iterate", "submit", "stream"])
def test_the_warning_of_tiles_points_at_the_call(method: str) -> None:
    predictor, _ = fake_predictor((32, 32), calibration=CALIBRATION)
    images = picture(0, LARGE) if method in ("predict", "submit") else [picture(0, LARGE)]
    with predictor, pytest.warns(FastadWarning, match="tile: the threshold") as caught:
        getattr(predictor, method)(images, tile=32)
    assert [each.filename for each in caught] == [__file__]
