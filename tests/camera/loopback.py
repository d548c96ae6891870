"""What the camera tests read: small videos, and an RTSP server of some sixty lines on loopback.

The level of every frame's gray is its number times `STEP`, so that a test can tell frames apart
after lossy coding.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

STEP = 4
H, W = 48, 64


def picture(number: int, size: tuple[int, int] = (H, W)) -> NDArray[np.uint8]:
    """Frame ``number`` of a clip, uint8 RGB [H, W, 3]; numbers repeat after 60."""
    return np.full((*size, 3), 8 + number % 60 * STEP, np.uint8)


def number_of(pixels: NDArray[np.uint8]) -> int:
    """Which frame these pixels show."""
    return round((float(pixels.mean()) - 8) / STEP)


def write_video(
    path: Path,
    frames: int,
    codec: str = "mpeg4",
    rate: int = 30,
    gap: int = 0,
    colorspace: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode a clip; ``gap`` is how many frames its second half is late."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.bit_rate, stream.gop_size = 4_000_000, 10
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.colorspace = colorspace or stream.codec_context.colorspace
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = i + gap * (2 * i >= frames), Fraction(1, rate)
            frame.colorspace = colorspace or frame.colorspace
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encoded_clip(frames: int, size: tuple[int, int]) -> tuple[list[bytes], bytes]:
    """One MPEG-4 access unit per frame, and the decoder's configuration."""
    stream: Any
    with av.open(io.BytesIO(), "w", format="mp4") as container:  # for its global header
        stream = container.add_stream("mpeg4", rate=30, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.bit_rate, stream.gop_size = 4_000_000, 10
        stream.time_base = Fraction(1, 30)
        units = [
            bytes(packet)
            for i in range(frames)
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
            )
        ]
        units += [bytes(packet) for packet in stream.encode()]
        return units, bytes(stream.codec_context.extradata)


class RtspServer:
    """Serves one looping clip over TCP to any number of readers until `stop`; it can freeze.

    Owns its sockets and threads. With ``user`` it demands that name and ``secret`` as password;
    with ``sound`` a second track goes on while the pictures are frozen; ``units`` replace the
    coded frames.
    """

    def __init__(
        self,
        port: int = 0,
        rate: float = 30.0,
        size: tuple[int, int] = (H, W),
        user: str = "",
        sound: bool = False,
        units: list[bytes] | None = None,
    ) -> None:
        self._units, self._config = encoded_clip(60, size)
        self._units = units or self._units
        self._rate, self._user, self._sound = rate, user, sound
        self._running, self._flowing = threading.Event(), threading.Event()
        self._running.set()
        self._flowing.set()
        self.sent = 0
        self._writing = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"rtsp://127.0.0.1:{self.port}/line"
        self._threads = [threading.Thread(target=self._accept, name="rtsp listener")]
        self._threads[0].start()

    def freeze(self) -> None:
        """Send nothing more and leave every connection open."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Go on."""
        self._flowing.set()

    def stop(self) -> None:
        """Die as a camera does that loses its power: no farewell."""
        self._running.clear()
        self._flowing.set()
        for each in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> RtspServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _accept(self) -> None:
        while self._running.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), name="rtsp client")
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        gone, tracks = threading.Event(), 0
        lines = [self._send, self._send_sound]
        senders = [threading.Thread(target=each, args=(connection, gone)) for each in lines]
        try:
            with contextlib.suppress(OSError, ValueError):
                for method, headers in requests(connection):
                    connection.sendall(self._answer(method, headers, tracks))
                    tracks += method == "SETUP"
                    if method == "PLAY":
                        for sender in senders[:tracks]:
                            sender.start()
        finally:
            gone.set()
            for sender in senders:
                if sender.is_alive():
                    sender.join()
            connection.close()

    def _answer(self, method: str, headers: dict[str, str], track: int) -> bytes:
        token = base64.b64encode(f"{self._user}:secret".encode()).decode()
        if self._user and headers.get("authorization") != f"Basic {token}":
            return reply("401 Unauthorized", headers, {"WWW-Authenticate": 'Basic realm="line"'})
        if method == "OPTIONS":
            return reply("200 OK", headers, {"Public": "DESCRIBE, SETUP, PLAY, TEARDOWN"})
        if method == "DESCRIBE":
            sdp = (
                "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=line\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
                "m=video 0 RTP/AVP 96\r\na=rtpmap:96 MP4V-ES/90000\r\n"
                f"a=fmtp:96 profile-level-id=1;config={self._config.hex()}\r\n"
                f"a=control:{self.url}/track\r\n"
            )
            if self._sound:
                sdp += f"m=audio 0 RTP/AVP 0\r\na=control:{self.url}/sound\r\n"
            return reply("200 OK", headers, {"Content-Type": "application/sdp"}, sdp)
        channels = f"{2 * track}-{2 * track + 1}"
        transport = {"Transport": f"RTP/AVP/TCP;unicast;interleaved={channels}"}
        return reply("200 OK", headers, {"Session": "1"} | (transport if method == "SETUP" else {}))

    def _send(self, connection: socket.socket, gone: threading.Event) -> None:
        """RTP packets of at most 1400 bytes, the last of each frame marked (RFC 6416)."""
        began, sequence = time.monotonic(), itertools.count()
        with contextlib.suppress(OSError):
            for i in itertools.count():
                self._flowing.wait()
                if gone.wait(max(0.0, began + i / self._rate - time.monotonic())):
                    return
                unit, stamp = self._units[i % len(self._units)], int(i * 90000 / self._rate)
                for at in range(0, len(unit), 1400):
                    last = at + 1400 >= len(unit)
                    head = struct.pack(
                        "!BBHII", 0x80, 96 | last << 7, next(sequence) & 0xFFFF, stamp, 1
                    )
                    self._frame(connection, 0, head + unit[at : at + 1400])
                self.sent += 1

    def _send_sound(self, connection: socket.socket, gone: threading.Event) -> None:
        """Silence in G.711, twenty milliseconds a packet."""
        with contextlib.suppress(OSError):
            for i in itertools.count():
                if gone.wait(0.02):
                    return
                head = struct.pack("!BBHII", 0x80, 0, i & 0xFFFF, i * 160, 2)
                self._frame(connection, 2, head + b"\x7f" * 160)

    def _frame(self, connection: socket.socket, channel: int, packet: bytes) -> None:
        with self._writing:
            connection.sendall(struct.pack("!cBH", b"$", channel, len(packet)) + packet)


def requests(connection: socket.socket) -> Iterator[tuple[str, dict[str, str]]]:
    """Method and headers of each RTSP request; the receiver's RTCP reports are passed over."""
    with connection.makefile("rb") as file:
        while first := file.read(1):
            if first == b"$":
                file.read(struct.unpack("!xH", file.read(3))[0])
                continue
            method = (first + file.readline()).decode().split()[0]
            headers = {}
            while line := file.readline().decode().strip():
                key, _, value = line.partition(":")
                headers[key.lower()] = value.strip()
            yield method, headers


def reply(status: str, request: dict[str, str], headers: dict[str, str], body: str = "") -> bytes:
    """One RTSP answer."""
    lines = {"CSeq": request.get("cseq", "0"), "Content-Length": str(len(body))} | headers
    head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    return f"RTSP/1.0 {status}\r\n{head}\r\n{body}".encode()
