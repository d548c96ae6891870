"""Streams of finite sources: order, back-pressure, events, and readers that always go away."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interrupts
import numpy as np
import pytest
from gated import LONG_S, comes_true, threads_named
from loopback import H, W, number_of, picture, write_video
from numpy.typing import NDArray
from PIL import Image
from textures import Textures

from fastad import Prediction, Predictor, load
from fastad.camera.events import StreamEvent, StreamResult
from fastad.camera.readers import CLOSE_S
from fastad.camera.stream import stream
from fastad.errors import InputError

# Batches of other sizes sum in another order, as in test_predictor.py.
BATCH_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.avi", 20)


def readers() -> list[str]:
    return threads_named("fastad reader")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def shown(result: StreamResult) -> int:
    return number_of(result.prediction.orig_img)


def test_a_folder_gives_what_predict_gives(predictor: Predictor, textures: Textures) -> None:
    folder = textures.images()[0].parent
    paths = sorted(folder.glob("*.png"))
    expected = predictor.predict(list(paths), category="grain")
    assert isinstance(expected, list)
    found = list(stream(predictor, folder, category="grain"))
    assert [each.prediction.path for each in found] == paths
    assert [each.index for each in found] == list(range(len(paths)))
    for each, known in zip(found, expected, strict=True):
        assert each.raw_score == pytest.approx(known.raw_score, rel=BATCH_TOLERANCE)
        assert each.pred_label == known.pred_label
        assert each.prediction.threshold == known.threshold
        assert each.dropped == 0 and each.age_ms > 0 and each.time_s is None


def test_a_video_gives_every_frame_to_a_slow_caller(predictor: Predictor, clip: Path) -> None:
    found = []
    for result in stream(predictor, clip, queue=2):
        time.sleep(0.005)
        found.append(result)
    assert [shown(each) for each in found] == list(range(20))
    assert [each.dropped for each in found] == [0] * 20
    assert found[-1].time_s == pytest.approx(19 / 30, abs=1e-6)
    assert found[0].source == str(clip)
    assert found[0].prediction.speed["decode"] > 0


def test_results_are_plain_json(predictor: Predictor, clip: Path) -> None:
    result = next(iter(stream(predictor, clip)))
    facts = result.to_dict()
    assert facts["source"] == str(clip) and facts["index"] == 0 and facts["dropped"] == 0
    assert abs(facts["received_s"] - time.time()) < 60
    assert facts["raw_score"] == result.prediction.raw_score
    event = StreamEvent("end", "a", 3, "ended after 3 frames")
    assert event.to_dict() == {
        "event": "end",
        "source": "a",
        "index": 3,
        "message": "ended after 3 frames",
    }


def test_several_sources_run_in_batches_and_keep_their_order(
    predictor: Predictor, clip: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run = [], predictor.runtime.run

    def counted(images: NDArray[np.uint8]) -> Any:
        sizes.append(len(images))
        return run(images)

    monkeypatch.setattr(predictor.runtime, "run", counted)
    sources = [clip, (picture(i) for i in range(15)), [picture(i) for i in range(10)]]
    found = list(stream(predictor, sources, queue=30))
    for name, count in ((str(clip), 20), ("source[1]", 15), ("source[2]", 10)):
        assert [shown(each) for each in found if each.source == name] == list(range(count))
    assert sizes == [3] * 15  # after ten rounds two sources, after fifteen one


def test_batch_bounds_what_runs_together(
    predictor: Predictor, clip: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run = [], predictor.runtime.run
    monkeypatch.setattr(
        predictor.runtime, "run", lambda images: (sizes.append(len(images)), run(images))[1]
    )
    assert len(list(stream(predictor, clip, batch=3, queue=30))) == 20
    assert sorted(sizes) == [2, *[3] * 6]


def mixed(predictor: Predictor, **options: Any) -> Any:
    frames = [
        picture(0),
        picture(1, (H, W + 2)),
        "nowhere.png",
        picture(2).astype(np.float32) / 255,
    ]
    return stream(predictor, iter(frames), **options)


EXPECTED_KINDS = ["result", "changed", "result", "unreadable", "changed", "result", "end"]


def test_events_come_in_order_between_the_results(predictor: Predictor) -> None:
    found = list(mixed(predictor, events=True))
    kinds = [each.kind if isinstance(each, StreamEvent) else "result" for each in found]
    assert kinds == EXPECTED_KINDS
    events = [each for each in found if isinstance(each, StreamEvent)]
    assert [event.index for event in events] == [1, 2, 3, 4]
    assert [each.index for each in found if isinstance(each, StreamResult)] == [0, 1, 3]
    assert "uint8 [48, 66, 3]" in events[0].message
    assert "nowhere.png" in events[1].message
    assert "float32" in events[2].message
    assert events[3].message == "ended after 4 frames"


def test_events_go_to_a_callback_and_results_to_the_loop(predictor: Predictor) -> None:
    order: list[str] = []
    for result in mixed(predictor, on_event=lambda event: order.append(event.kind)):
        assert isinstance(result, StreamResult)
        order.append("result")
    assert order == EXPECTED_KINDS


def test_events_are_logged_by_default(
    predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastad.camera.stream"):
        assert len(list(mixed(predictor))) == 3
    levels = [(record.levelname, record.getMessage().split(":")[0]) for record in caplog.records]
    assert levels == [("INFO", "source"), ("WARNING", "source"), *[("INFO", "source")] * 2]


def test_a_flood_of_unreadable_frames_is_no_flood_of_messages(
    predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(stream(predictor, itertools.repeat("nowhere.png", 100))) == []
    assert len(caplog.records) == 7  # 1, 2, 4, 8, 16, 32, 64
    assert "(64)" in caplog.text


def test_a_folder_of_mixed_sizes_is_no_event(predictor: Predictor, tmp_path: Path) -> None:
    for i, size in enumerate([(20, 30), (30, 20)]):
        Image.fromarray(picture(i, size)).save(tmp_path / f"{i}.png")
    found = list(stream(predictor, tmp_path, events=True))
    assert [getattr(each, "kind", "result") for each in found] == ["result", "result", "end"]


def test_an_error_of_the_iterable_comes_after_the_frames_before_it(predictor: Predictor) -> None:
    def grab() -> Iterator[NDArray[np.uint8]]:
        yield picture(0)
        raise RuntimeError("grabber lost its trigger")

    results = stream(predictor, grab())
    assert shown(next(results)) == 0
    with pytest.raises(RuntimeError, match="lost its trigger"):
        next(results)
    assert readers() == []


def test_a_cut_off_video_is_an_event_and_then_the_end(predictor: Predictor, tmp_path: Path) -> None:
    half = write_video(tmp_path / "half.avi", 60)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    found = list(stream(predictor, half, events=True))
    assert [getattr(each, "kind", "result") for each in found[-2:]] == ["unreadable", "end"]
    assert isinstance(found[0], StreamResult)


def test_an_iterable_runs_ahead_no_further_than_the_queue(predictor: Predictor) -> None:
    pulled = itertools.count()
    results = stream(predictor, (picture(next(pulled)) for _ in itertools.count()), queue=3)
    for _ in range(5):
        next(results)
    time.sleep(0.3)
    # Five were given out, three wait, one is in the reader's hand, and `next` itself counts.
    assert next(pulled) <= 5 + 3 + 1
    results.close()


def leave_by_close(predictor: Predictor, source: object) -> None:
    results = stream(predictor, source)
    next(results)
    results.close()


def leave_by_break(predictor: Predictor, source: object) -> None:
    for _ in stream(predictor, source):
        break


def leave_by_exception(predictor: Predictor, source: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in stream(predictor, source):
            raise KeyboardInterrupt


def leave_by_end(predictor: Predictor, source: object) -> None:
    assert list(stream(predictor, source))


def leave_unread(predictor: Predictor, source: object) -> None:
    stream(predictor, source)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files in /proc")
@pytest.mark.parametrize(
    "leave", [leave_by_close, leave_by_break, leave_by_exception, leave_by_end, leave_unread]
)
def test_leaving_leaves_no_thread_and_no_file(
    leave: Callable[[Predictor, object], None], predictor: Predictor, clip: Path
) -> None:
    leave(predictor, clip)  # PyAV and the runtime open what they keep
    gc.collect()
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        leave(predictor, clip)
    assert threading.active_count() == threads
    assert open_files() == files
    assert readers() == []


def test_closing_does_not_wait_for_an_iterable_that_hangs(predictor: Predictor) -> None:
    free = threading.Event()

    def grab() -> Iterator[NDArray[np.uint8]]:
        yield picture(0)
        free.wait(LONG_S)

    results = stream(predictor, grab())
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < CLOSE_S + LONG_S / 2  # a hang, on a busy machine too
    free.set()
    assert comes_true(lambda: readers() == [])


PROGRAM = """
import sys, threading, itertools
import numpy as np
import fastad
from fastad.camera.stream import stream

def grab():
    for i in itertools.count():
        yield np.zeros((48, 64, 3), np.uint8)
        if i == 2 and sys.argv[2] == "waits":
            threading.Event().wait()

predictor = fastad.load(sys.argv[1], threads=1)
results = stream(predictor, [grab(), sys.argv[3]])
for i, _ in enumerate(results):
    print(i, flush=True)
    if sys.argv[2] == "exits" and i == 3:
        break
"""


def program(engine: Path, how: str, clip: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(engine), how, str(clip)]
    pipes = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipes, stderr=pipes, text=True, preexec_fn=interrupts.listen
    )


def test_a_program_ends_although_a_module_holds_a_stream(texture_engine: Path, clip: Path) -> None:
    child = program(texture_engine, "exits", clip)
    out, err = child.communicate(timeout=2 * LONG_S)
    assert (child.returncode, out.split(), err) == (0, ["0", "1", "2", "3"], "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_control_c_ends_a_program_that_waits_for_a_frame(texture_engine: Path, clip: Path) -> None:
    child = program(texture_engine, "waits", clip)
    assert child.stdout
    for _ in range(23):  # three frames of the iterable and twenty of the clip; then it waits
        assert child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=CLOSE_S + LONG_S)
    assert child.returncode != 0
    assert err.rstrip().endswith("KeyboardInterrupt")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "queue": ({"queue": 0}, "queue: expected a whole number"),
    "batch": ({"batch": 1.5}, "batch: expected a whole number"),
    "stall": ({"stall_s": 0}, "stall_s: expected seconds above 0"),
    "reconnect": ({"reconnect_s": float("nan")}, "reconnect_s: expected seconds"),
    "threshold": ({"threshold": float("inf")}, "threshold: expected a finite number"),
    "category": ({"category": "wood"}, "category: expected one of grain, stripes"),
    "color": ({"color": "yuv"}, "color: expected one of"),
    "range": ({"value_range": (5, 5)}, "value_range: expected two finite"),
    "events": ({"events": True, "on_event": print}, "either events=True or on_event"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejects_at_the_call(case: str, predictor: Predictor, clip: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        stream(predictor, clip, **options)
    assert readers() == []


def test_a_closed_predictor_refuses(texture_engine: Path, clip: Path) -> None:
    opened = load(texture_engine, threads=1)
    results = stream(opened, clip)
    assert isinstance(next(results).prediction, Prediction)
    opened.close()
    with pytest.raises(InputError, match="closed"):
        next(results)
    with pytest.raises(InputError, match="closed"):
        stream(opened, clip)
    assert readers() == []


def test_a_predictor_closed_before_the_first_result_opens_no_source(
    opened: Predictor,
) -> None:
    pulled = itertools.count()
    results = stream(opened, (picture(next(pulled)) for _ in range(3)))
    opened.close()
    with pytest.raises(InputError, match="closed"):
        next(results)
    assert next(pulled) == 0


def test_a_predictor_closed_within_a_batch_refuses_the_rest(
    opened: Predictor, patient: None
) -> None:
    results = stream(opened, (picture(i) for i in range(2)), batch=2)
    assert next(results).index == 0
    opened.close()
    with pytest.raises(InputError, match="closed"):
        next(results)
