"""What a stream can read, and how: each source is an iterator of decoded frames.

========================================  =========  ==================================
source                                    kind       read by
========================================  =========  ==================================
folder, pattern, image files              finite     Pillow
any iterable of frames, a batch           finite     as `fastad.predictor.Predictor.predict` would
video file                                finite     PyAV
``rtsp://``, camera number, /dev/video0   live       PyAV
========================================  =========  ==================================
"""

from __future__ import annotations

import glob
import math
import os
import re
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastad.camera.address import without_password
from fastad.camera.events import Nothing, Taken, Unreadable
from fastad.errors import FastadError, InputError, UnsupportedError
from fastad.images import IMAGE_SUFFIXES, expand
from fastad.levels import ValueRange
from fastad.preprocess import Color, Source, collect

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

OPEN_S = 5.0  # an RTSP handshake took 0.05 to 1.1 s on loopback; cameras on a busy network more
# The delay of a network camera is mostly in the receiver: with these the first frame came after
# 0.05 s instead of 0.94 s, and each 39 ms after it was sent (720p, loopback, two cores).
RTSP = {
    "rtsp_transport": "tcp",
    "flags": "low_delay",
    "probesize": "32768",
    "analyzeduration": "0",
    # Sound that goes on would keep a reader from noticing that the pictures stopped.
    "allowed_media_types": "video",
}
EXPECTED = (
    "a folder, a pattern, an image or video file, a camera number, an rtsp:// address, an iterable "
    "of frames, or a list of these"
)

Item = Taken | Unreadable | Nothing


class LostError(Exception):
    """A live source, or the rest of a file, cannot be read; the message says why."""


class Images:
    """Image files, or the frames of an iterable; arrays of an iterable are copied.

    The copy (1 ms for 1080p) is there because a grabber may fill the same buffer again while the
    frame waits.
    """

    live = False

    def __init__(
        self,
        name: str,
        items: Iterable[object],
        color: Color,
        value_range: ValueRange | None,
        *,
        steady: bool,
    ) -> None:
        self.name, self.steady = name, steady
        self._items, self._color, self._value_range = items, color, value_range

    def frames(self) -> Generator[Item]:
        """Each frame, or why it could not be read; errors of the iterable itself pass through."""
        for item in self._items:
            try:
                sources, _ = collect(item, self._color, self._value_range)
            except FastadError as error:
                yield Unreadable(str(error))
                continue
            for source in sources:
                yield _taken(source)


class Video:
    """A video file, a V4L2 camera or a network camera, read by PyAV.

    A file that is cut off is known by the number of frames that it announces: AVI, MP4 and MOV do.

    Args:
        name: For results and messages.
        address: What FFmpeg opens.
        live: A camera: no end, newest frames wanted.
        stall_s: Seconds without data after which a live source counts as lost.
        value_range: Of gray videos with more than 8 bits.
        device: FFmpeg's name of the input device, or None.
    """

    steady = True

    def __init__(
        self,
        name: str,
        address: str,
        *,
        live: bool,
        stall_s: float,
        value_range: ValueRange | None,
        device: str | None = None,
    ) -> None:
        self.name, self.live = name, live
        self._address, self._device = address, device
        # While this many seconds pass a reader cannot be stopped: FFmpeg has no other way out.
        self._timeout = (max(stall_s, OPEN_S), stall_s) if live else None
        self._value_range = value_range

    def open(self) -> InputContainer:
        """The opened container, with a video stream.

        Raises:
            LostError: it cannot be opened, or holds no video.
        """
        import av

        try:
            container = av.open(
                self._address,
                format=self._device,
                options=RTSP if self._address.startswith("rtsp") else {},
                timeout=self._timeout,
                metadata_errors="replace",  # a damaged file's title need not be text
            )
        except (av.FFmpegError, OSError) as error:
            raise LostError(f"cannot be opened: {_reason(error)}") from None
        if not container.streams.video:
            container.close()
            raise LostError("holds no video")
        return container

    def frames(self) -> Generator[Item]:
        """Each frame, or why it could not be decoded; holds the container until it is closed.

        A live source also tells of data without a picture, so that its reader can be stopped then.

        Raises:
            LostError: it cannot be opened or read further.
        """
        import av
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()  # keeps its tables from frame to frame
        with self.open() as container:
            stream = container.streams.video[0]
            # Frame threads delay a camera by one frame for each of them.
            stream.thread_type = "SLICE" if self.live else "AUTO"
            seen, count, end = False, 0, 0
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except (av.FFmpegError, OSError) as error:
                    raise LostError(f"cannot be read further: {_reason(error)}") from None
                if packet is None:
                    break
                if packet.size:  # the last one is empty, it only flushes the decoder
                    count += 1
                    end = max(end, (packet.pts or packet.dts or 0) + (packet.duration or 0))
                began = time.perf_counter()
                try:
                    decoded = packet.decode()
                except av.FFmpegError as error:
                    # Whoever joins a camera between two key frames cannot decode at first.
                    message = f"cannot be decoded: {_reason(error)}"
                    yield Unreadable(message) if seen or not self.live else Nothing(message)
                    continue
                decode_ms = (time.perf_counter() - began) * 1000 / max(len(decoded), 1)
                if self.live and not decoded:
                    yield Nothing()
                for picture in decoded:
                    seen = True
                    yield self._taken(picture, reformatter, decode_ms)
            if count < stream.frames and end < _announced_end(container, stream):
                raise LostError(f"is cut off: it announces {stream.frames} frames, {count} came")

    def _taken(
        self, picture: VideoFrame, reformatter: VideoReformatter, decode_ms: float
    ) -> Taken | Unreadable:
        if picture.is_corrupt:  # FFmpeg fills the damaged part with what it guesses
            return Unreadable("is damaged")
        import av

        began = time.perf_counter()
        try:
            if not picture.format.name.startswith("gray"):
                picture = reformatter.reformat(picture, format="rgb24")
            pixels = picture.to_ndarray()
        except (av.FFmpegError, ValueError) as error:  # a color space that FFmpeg only names
            why = _reason(error) if isinstance(error, av.FFmpegError) else error
            return Unreadable(f"cannot be converted to RGB: {why}")
        try:
            sources, _ = collect(pixels, "rgb", self._value_range)
        except FastadError as error:
            return Unreadable(str(error))
        source = replace(sources[0], name=self.name)
        taken = _taken(source, time_s=picture.time, copy=False)
        if isinstance(taken, Taken):
            spent_ms = (time.perf_counter() - began) * 1000
            taken = replace(taken, decode_ms=decode_ms + spent_ms)
        return taken


AnySource = Images | Video


def _announced_end(container: InputContainer, stream: VideoStream) -> float:
    """When the last announced frame ends, in units of the stream's time base.

    Fewer frames may come than are announced although none is missing: the edit list of an MP4
    leaves some out, and an AVI announces those that only repeat the one before. FFmpeg's duration
    respects the former, but of a truncated AVI it is a guess from the size of the file.
    """
    if "mp4" in container.format.name or not stream.average_rate or not stream.time_base:
        return stream.duration or math.inf
    return float(stream.frames / stream.average_rate / stream.time_base)


def open_sources(
    source: object,
    color: Color = "rgb",
    value_range: ValueRange | None = None,
    stall_s: float = 2.0,
) -> list[AnySource]:
    """What ``source`` stands for, checked before any frame is read.

    A list or tuple is several sources, unless all it holds are images: then it is one.

    Raises:
        InputError: it is nothing that can be streamed, is missing, or is no video.
        UnsupportedError: it needs PyAV, which is not installed, or a camera of another system.
    """
    collect([], color, value_range)  # refuses a wrong color or range
    several = isinstance(source, list | tuple)
    items: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
    if not items:
        raise InputError(f"source: expected {EXPECTED}, got an empty list")
    images = [_is_image(item) for item in items]
    if several and all(images):
        return [Images("source", items, color, value_range, steady=False)]
    found: list[AnySource] = []
    for i, item in enumerate(items):
        name = f"source[{i}]" if several else "source"
        if images[i] and not isinstance(item, str | os.PathLike):
            way_out = "put images into a list of their own" if several else "use predict for one"
            raise InputError(
                f"{name}: expected {EXPECTED}, got one image ({type(item).__name__}); {way_out}"
            )
        found.append(_open(item, name, color, value_range, stall_s))
    names = [each.name for each in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"source: expected each source once, got {', '.join(twice)} twice")
    return found


def _open(
    item: object, name: str, color: Color, value_range: ValueRange | None, stall_s: float
) -> AnySource:
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
        return _camera(int(item), value_range, stall_s)
    if isinstance(item, str | os.PathLike):
        return _named(os.fspath(item), value_range, stall_s)
    if not isinstance(item, Iterable) or isinstance(item, bytes | bytearray | Mapping):
        raise InputError(f"{name}: expected {EXPECTED}, got {type(item).__name__}")
    return Images(name, item, color, value_range, steady=True)


def _named(text: str, value_range: ValueRange | None, stall_s: float) -> AnySource:
    """A path, a pattern, a number in a string, or an address."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if scheme:
        if scheme[1].lower() != "rtsp":
            raise UnsupportedError(
                f"{without_password(text)}: expected an rtsp:// address; open it with a library "
                "that knows the camera, and pass its frames as an iterable"
            )
        name = without_password(text)
        _require_av(name)
        address = "rtsp" + text[scheme.end(1) :]  # FFmpeg knows it in small letters only
        return Video(name, address, live=True, stall_s=stall_s, value_range=value_range)
    path = Path(text)
    if path.is_char_device():
        _require_av(text)
        return Video(text, text, live=True, stall_s=stall_s, value_range=value_range, device="v4l2")
    if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        _require_av(text)
        video = Video(text, text, live=False, stall_s=stall_s, value_range=value_range)
        try:
            video.open().close()
        except LostError as error:
            raise InputError(f"{text}: expected an image or a video; it {error}") from None
        return video
    if text.isdecimal() and not path.exists():
        return _camera(int(text), value_range, stall_s)
    if not path.exists() and not glob.has_magic(text):
        raise InputError(f"{text}: no such file or folder; expected {EXPECTED}")
    return Images(text, expand([text]), "rgb", value_range, steady=False)


def _camera(number: int, value_range: ValueRange | None, stall_s: float) -> Video:
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(
            f"camera {number}: cameras are opened by number on Linux only (V4L2); pass the frames "
            "of your camera's library as an iterable"
        )
    device = Path(f"/dev/video{number}")
    if not device.exists():
        there = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none"
        raise InputError(f"camera {number}: no {device}; cameras of this machine: {there}")
    _require_av(f"camera {number}")
    return Video(
        f"camera {number}",
        str(device),
        live=True,
        stall_s=stall_s,
        value_range=value_range,
        device="v4l2",
    )


def _require_av(name: str) -> None:
    try:
        import av  # noqa: F401  # only whether it can be
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise UnsupportedError(
            f'{name}: videos and cameras need PyAV; pip install "fastad[camera]", or pass frames '
            "as an iterable"
        ) from None


def _is_image(item: object) -> bool:
    """Whether ``item`` is one image rather than something that gives many."""
    if isinstance(item, str | os.PathLike):
        path = Path(item)
        return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    if isinstance(item, Image.Image):
        return True
    array: Any = item
    return (hasattr(item, "__array__") or hasattr(item, "__dlpack__")) and array.ndim < 4


def _taken(source: Source, time_s: float | None = None, copy: bool = True) -> Taken | Unreadable:
    began = time.perf_counter()
    if copy and isinstance(source.content, np.ndarray):
        source = replace(source, content=source.content.copy())
    try:
        frame = source.frame()
    except FastadError as error:
        return Unreadable(str(error))
    return Taken(source, frame, time_s, (time.perf_counter() - began) * 1000)


def _reason(error: OSError | Exception) -> str:
    if type(error).__name__ == "ExitError":  # what FFmpeg calls its timeout
        return "no data came in time"
    # The whole text of an FFmpeg error repeats the address, with the password.
    return getattr(error, "strerror", None) or type(error).__name__
