"""What a stream can read: every kind of source, damaged ones, and refusals before any work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from gated import LONG_S, comes_true
from loopback import H, W, number_of, picture, write_video
from numpy.typing import NDArray
from PIL import Image

from fastad.camera.events import EVENTS, Mailbox, Nothing, Shot, StreamEvent, Taken, Unreadable
from fastad.camera.source import AnySource, LostError, open_sources
from fastad.errors import InputError, UnsupportedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images and a clip of 25 frames."""
    path = tmp_path_factory.mktemp("sources")
    for i in range(3):
        Image.fromarray(picture(i)).save(path / f"{i}.png")
    write_video(path / "clip.avi", 25)
    return path


def only(source: object, **options: Any) -> AnySource:
    (found,) = open_sources(source, **options)
    return found


def numbers(items: list[Any]) -> list[int]:
    return [number_of(item.frame.pixels) for item in items if isinstance(item, Taken)]


SOURCES = {
    "folder": lambda at: at,
    "pattern": lambda at: str(at / "*.png"),
    "list of files": lambda at: sorted(at.glob("*.png")),
    "list of arrays": lambda at: [picture(i) for i in range(3)],
    "generator": lambda at: (picture(i) for i in range(3)),
    "batch": lambda at: np.stack([picture(i) for i in range(3)]),
    "generator of batches": lambda at: iter([np.stack([picture(i) for i in range(3)])]),
    "PIL images": lambda at: (Image.fromarray(picture(i)) for i in range(3)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_finite_sources_give_each_frame_in_order(kind: str, folder: Path) -> None:
    source = only(SOURCES[kind](folder))
    assert not source.live
    assert numbers(list(source.frames())) == [0, 1, 2]


def test_a_video_gives_each_frame_with_its_time(folder: Path) -> None:
    source = only(folder / "clip.avi")
    found = [item for item in source.frames() if isinstance(item, Taken)]
    assert numbers(found) == list(range(25))
    assert [item.time_s for item in found] == pytest.approx([i / 30 for i in range(25)], abs=1e-6)
    assert found[0].frame.size == (H, W)
    assert source.name == str(folder / "clip.avi")


def test_a_list_of_sources_is_several(folder: Path) -> None:
    found = open_sources([folder, str(folder / "clip.avi"), iter([picture(0)])])
    assert [source.name for source in found] == [str(folder), f"{folder}/clip.avi", "source[2]"]


def test_a_buffer_that_is_filled_again_keeps_earlier_frames() -> None:
    buffer = np.empty((H, W, 3), np.uint8)

    def grab() -> Iterator[NDArray[np.uint8]]:
        for i in range(3):
            buffer[:] = picture(i)
            yield buffer

    assert numbers(list(only(grab()).frames())) == [0, 1, 2]


def test_color_belongs_to_arrays_and_not_to_videos(folder: Path) -> None:
    red = np.zeros((H, W, 3), np.uint8)
    red[..., 0] = 200
    (array,) = only(iter([red]), color="bgr").frames()
    assert isinstance(array, Taken) and array.frame.swap_red_blue
    video = next(only(folder / "clip.avi", color="bgr").frames())
    assert isinstance(video, Taken) and not video.frame.swap_red_blue


def gray_video(path: Path, levels: list[int]) -> Path:
    """A lossless video of 12-bit gray."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = W, H, "gray12le"
        for level in levels:
            image = np.full((H, W), level, np.uint16)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray12le")))
        container.mux(stream.encode())
    return path


def test_deep_gray_video_takes_the_declared_range(tmp_path: Path) -> None:
    path = gray_video(tmp_path / "deep.mkv", [0, 1000, 2000])
    found = list(only(path, value_range=(0.0, 2000.0)).frames())
    assert all(isinstance(item, Taken) for item in found)
    assert [int(item.frame.pixels[0, 0]) for item in found if isinstance(item, Taken)] == [
        0,
        128,
        255,
    ]


def test_deep_gray_video_without_a_range_is_not_guessed(tmp_path: Path) -> None:
    found = list(only(gray_video(tmp_path / "deep.mkv", [1000])).frames())
    assert [type(item) for item in found] == [Unreadable]
    assert isinstance(found[0], Unreadable) and "value_range" in found[0].message


def test_frames_that_cannot_be_used_are_told_and_the_next_ones_come(folder: Path) -> None:
    wrong: list[object] = [picture(0), "nowhere.png", np.full((4, 4), 2.0), None, picture(1)]
    found = list(only(iter(wrong)).frames())
    assert [type(item) for item in found] == [Taken, *[Unreadable] * 3, Taken]
    assert "nowhere.png" in str(found[1])
    assert "0..1" in str(found[2])


def test_an_error_of_the_iterable_is_its_own() -> None:
    def grab() -> Iterator[NDArray[np.uint8]]:
        yield picture(0)
        raise RuntimeError("grabber lost its trigger")

    frames = only(grab()).frames()
    next(frames)
    with pytest.raises(RuntimeError, match="lost its trigger"):
        next(frames)


def test_damaged_frames_of_a_video_are_told_and_never_passed_on(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 60)
    data = bytearray(path.read_bytes())
    # Inside the frames' data: headers lie in front, the index behind.
    for i in np.random.default_rng(0).integers(6000, len(data) - 2000, 40):
        data[i] ^= 0xFF
    path.write_bytes(data)
    found: list[Any] = []
    try:
        for item in only(path).frames():
            found.append(item)
    except LostError as error:
        found.append(Unreadable(str(error)))
    assert any(isinstance(item, Unreadable) for item in found)
    shown = numbers(found)
    assert len(shown) > 10
    assert shown == sorted(set(shown))  # what FFmpeg made up is not among them


def test_a_video_that_is_cut_off_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LostError, match="announces 60 frames"):
        list(only(path).frames())


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_clip_for_the_web_that_is_cut_off_says_so(share: float, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 60, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(LostError, match="announces 60 frames"):
        list(only(path).frames())


def test_a_whole_video_is_not_called_cut_off(folder: Path) -> None:
    assert len(list(only(folder / "clip.avi").frames())) == 25


def test_a_gap_in_time_is_no_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "gap.avi", 20, gap=5)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 25
    assert numbers(list(only(path).frames())) == list(range(20))


def test_what_an_edit_list_leaves_out_is_no_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 20)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # behind the name: version and flags, count, then the duration
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") // 2).to_bytes(4, "big")
    path.write_bytes(data)
    assert numbers(list(only(path).frames())) == list(range(10))


def test_a_frame_in_a_color_space_without_a_conversion_is_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 3, colorspace=8)  # YCgCo
    found = list(only(path).frames())
    assert [type(item) for item in found] == [Unreadable] * 3
    assert "cannot be converted to RGB: Operation not supported" in str(found[0])


REFUSED = {
    "empty list": ([], "empty list"),
    "one image": (picture(0), "one image .*use predict"),
    "one PIL image": (Image.fromarray(picture(0)), "one image .*use predict"),
    "number with a point": (1.5, "got float"),
    "truth": (True, "got bool"),
    "bytes": (b"frames", "got bytes"),
    "mapping": ({"a": 1}, "got dict"),
    "missing": ("nowhere/at/all.mp4", "no such file"),
    "pattern without images": ("nowhere/*.png", "no images"),
    "frames among sources": (["rtsp://127.0.0.1/a", picture(0)], "images into a list of their own"),
    "twice": (["rtsp://127.0.0.1/a", "rtsp://127.0.0.1/a"], "each source once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejects(case: str) -> None:
    source, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        open_sources(source)


def test_rejects_a_file_that_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a video" * 100)
    with pytest.raises(InputError, match=r"clip\.mp4: expected an image or a video"):
        open_sources(path)


def test_rejects_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images here"):
        open_sources(tmp_path)


@pytest.mark.parametrize("camera", [9999, "9999"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="V4L2 is Linux's")
def test_rejects_a_camera_that_is_not_there(camera: object) -> None:
    with pytest.raises(InputError, match=r"no /dev/video9999; cameras of this machine"):
        open_sources(camera)


def test_rejects_addresses_it_cannot_serve() -> None:
    with pytest.raises(UnsupportedError, match=r"http://10\.0\.0\.5/mjpeg: expected an rtsp://"):
        open_sources("http://line:secret@10.0.0.5/mjpeg")


@pytest.mark.parametrize("kind", ["video", "address"])
def test_without_pyav_the_way_out_is_named(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    source = {"video": str(folder / "clip.avi"), "address": "rtsp://127.0.0.1/a"}[kind]
    with pytest.raises(UnsupportedError, match=r'pip install "fastad\[camera\]"'):
        open_sources(source)


def test_images_need_no_pyav(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert numbers(list(only(folder).frames())) == [0, 1, 2]


def test_names_keep_passwords_to_themselves() -> None:
    assert only("rtsp://line:secret@10.0.0.5:554/1").name == "rtsp://10.0.0.5:554/1"
    assert only("rtsp://line:se/cr@t@10.0.0.5:554/1").name == "rtsp://10.0.0.5:554/1"
    with pytest.raises(UnsupportedError, match=r"^http://10\.0\.0\.5/1: expected an rtsp"):
        open_sources("http://line:sec/ret@10.0.0.5/1")


@pytest.mark.parametrize(
    ("behind", "shown"),
    [
        ("/user=line&password=se@c/ret&channel=1", "/user=line&password=***&channel=1"),
        ("/user=line_password=secret_channel=1", "/user=line_password=***_channel=1"),
        ("/ch1?user=line&PWD=sec@ret", "/ch1?user=line&PWD=***"),
        ("/ch1@2", "/ch1@2"),
    ],
)
@pytest.mark.parametrize("host", ["10.0.0.5", "cam-1.line.lan:8554", "[fe80::1]:554"])
def test_names_keep_passwords_among_parameters_to_themselves(
    host: str, behind: str, shown: str
) -> None:
    assert only(f"rtsp://{host}{behind}").name == f"rtsp://{host}{shown}"


def mailbox(capacity: int, live: bool) -> tuple[Mailbox, threading.Condition]:
    bell = threading.Condition()
    return Mailbox("box", capacity, live=live, steady=True, bell=bell), bell


def taken(number: int, size: tuple[int, int] = (H, W)) -> Taken:
    (item,) = only(iter([picture(number, size)])).frames()
    assert isinstance(item, Taken)
    return item


def test_a_live_mailbox_holds_the_newest_frames_and_counts_the_others() -> None:
    box, bell = mailbox(2, live=True)
    for i in range(5):
        assert box.put(taken(i))
    with bell:
        first, second, none = box.take(), box.take(), box.take()
    assert isinstance(first, Shot) and isinstance(second, Shot) and none is None
    assert [(shot.index, shot.dropped) for shot in (first, second)] == [(3, 3), (4, 0)]


def test_a_silence_is_told_once_and_so_is_its_reason() -> None:
    box, bell = mailbox(2, live=True)
    box.begin()
    box.silent(1.0)
    assert box.silent_s() is None
    for reason in ("no data came in time", "Connection refused"):
        box.stall(reason)
    assert box.put(taken(0)) and box.put(Nothing("cannot be decoded"))
    box.silent(2.0)
    box.stall("no data came in time")
    assert box.put(taken(0))
    box.silent(3.0)
    for _ in range(2):
        box.put(Nothing("cannot be decoded"))
    with bell:
        found = [box.take() for _ in range(9)]
    events = [each for each in found if isinstance(each, StreamEvent)]
    assert [each.message for each in events if each.kind == "stall"] == [
        "no frame for 1.0 s",
        "no data came in time",
        "no frame for 2.0 s; the data cannot be decoded",
        "no frame for 3.0 s",
        "the data cannot be decoded",
    ]


def test_a_live_mailbox_that_nobody_reads_keeps_few_events() -> None:
    box, bell = mailbox(1, live=True)
    for i in range(3 * EVENTS):
        box.put(taken(0, (H + i % 2, W)))
        box.put(Unreadable("is damaged"))
    kept = []
    with bell:
        while entry := box.take():
            kept.append(entry)
    assert len(kept) == EVENTS + 1
    assert isinstance(kept[-1], StreamEvent)
    assert kept[-1].index == 6 * EVENTS - 1


def test_a_finite_mailbox_makes_its_reader_wait_and_closing_frees_it() -> None:
    box, _ = mailbox(2, live=False)
    answers: list[bool] = []
    feeder = threading.Thread(target=lambda: answers.extend(box.put(taken(i)) for i in range(3)))
    feeder.start()
    assert comes_true(lambda: answers == [True, True])
    feeder.join(0.2)
    assert feeder.is_alive()
    box.close()
    feeder.join(LONG_S)
    assert not feeder.is_alive() and answers == [True, True, False]
