"""`load` an engine file and `predict`: from an image to a verdict on one page."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import numpy as np

from fastad import _native, calibration, forked
from fastad.engine.base import Runtime
from fastad.engine.container import read_engine
from fastad.engine.opening import open_engine
from fastad.errors import FastadError, InputError
from fastad.feed import Feed
from fastad.inspected import Area
from fastad.levels import ValueRange
from fastad.look import BATCH, Frames, Graph
from fastad.pending import Workers
from fastad.prediction import Prediction
from fastad.preprocess import Color, Source, collect
from fastad.request import Options, Request, check_options
from fastad.spec import Manifest, Threshold

if TYPE_CHECKING:
    from fastad.camera.events import StreamEvent, StreamResult

Unreadable = Callable[[Source, FastadError], None]


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    runtime: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    mode: str = "latency",
) -> Predictor:
    """Open an engine file for prediction.

    Args:
        path: A ``.engine`` file; its hashes are checked before anything in it is used.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (not yet run on hardware).
        runtime: ``auto``, ``openvino``, ``onnxruntime``, ``tensorrt`` or ``pytorch``; ``auto``
            takes a GPU where one can serve this engine.
        precision: ``auto`` takes the fastest of those that passed the accuracy gate at export, or
            ``fp32`` where there was none; logger ``fastad`` says which and why. By name: ``fp32``,
            ``bf16``, ``int8``, ``int8-bf16`` or ``fp16``, if the engine holds it.
        threads: Cores to use; None takes all. All predictors of the process resize on as many, 8
            at most, as the last ``load`` with a number said.
        mode: ``latency``: all cores work on one image, for the shortest time to its result.
            ``throughput``: each core works on an image of its own, for the most images per second
            of lists, streams, `Predictor.submit` and concurrent callers; one image alone then takes
            longer. Of a GPU it changes nothing: larger batches are its throughput.

    Raises:
        EngineError: the file is missing, damaged, or of a newer format, or its accuracy gate
            refused the precision.
        InputError: a name that does not exist.
        UnsupportedError: this machine cannot serve the request; the message says why.
    """
    with read_engine(path) as engine:
        opened = open_engine(engine, runtime, precision, device, threads, mode)
        if threads is not None:
            _native.set_threads(min(threads, _native.DEFAULT_THREADS))
        return Predictor(engine.manifest, opened)


class Predictor:
    """Turns images into `Prediction` objects. Thread-safe; owns its runtime until `close`.

    Not fork-safe, as no runtime is: its threads do not exist in a forked child, which would wait
    for them for ever. There every call is an `InputError` instead, and `close` does nothing. Call
    `fastad.load` in the child, or better start children by ``spawn``. A child that inherits a
    loaded ONNX Runtime has to leave by ``os._exit``, as those of multiprocessing do: ONNX Runtime's
    own clean-up hangs there. It cannot be pickled either.
    """

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self.manifest = manifest
        self.runtime = runtime
        self._feed = Feed(runtime, manifest.spec.input.size)
        forked.register(runtime)
        self._workers: Workers | None = None
        self._starting = threading.Lock()
        self._closed = False
        self._process = os.getpid()

    def predict(
        self,
        images: object,
        *,
        threshold: float | None = None,
        color: Color = "rgb",
        category: str | None = None,
        value_range: ValueRange | None = None,
        tile: tuple[int, int] | int | None = None,
        overlap: float = 0.25,
        region: Area | None = None,
        ignore: Area | None = None,
    ) -> Prediction | list[Prediction]:
        """Look at one image or many.

        Args:
            images: A path, PIL image, uint8 array [H, W], [H, W, C] or [B, H, W, C], float array
                in 0..1, torch tensor [C, H, W] or [B, C, H, W], or a list of these in any sizes.
            threshold: Decision threshold in units of the raw score, for this call.
            color: Channel order of arrays: ``rgb`` (default), ``bgr`` or ``gray``.
            category: Product class, for its own threshold; None applies the pooled one.
            value_range: Grey levels (low, high) of images with more than 8 bits; None takes the
                range the engine was trained with.
            tile: (H, W), or one side, of tiles in pixels of the original image: the model looks at
                each at its own input size, so the model's size means full resolution. The raw score
                is the largest of the tiles' own; an image that one tile covers is seen as without.
                Thresholds were calibrated on whole images, and a maximum over many tiles is higher:
                pass ``threshold=`` with it, which `find_threshold` finds with the same tile.
                Without one a `FastadWarning` says so. `fastad.tiling` states the memory.
            overlap: Least share, 0..0.9, of a tile that its neighbour sees too.
            region: What counts, all by default: a bool mask [H, W], the path of a mask image, or a
                list of boxes (x0, y0, x1, y1) and polygons [(x, y), ...], in pixels of the original
                image. All else is 0 on ``anomaly_map`` and in no mask or region, and the score is
                the method's own rule on what counts (`fastad.inspected.peak_and_share`). The
                network still sees it, and what changes there can colour the map beside it: paint
                it over with a constant before, for `find_threshold` too. Find a threshold for it:
                one smaller than the score's window scores higher. Tiles it does not reach are left.
            ignore: What does not count, in the same forms.

        Returns:
            One `Prediction` for one image; a list, in order, for a list or a batch.

        Raises:
            InputError: an argument that cannot be used, before anything ran; an image that cannot
                be decoded, or that the region or the tiles do not fit.
            EngineError: the runtime fails, or its score is not finite.
            UnsupportedError: a region, and an engine of an early version that does not record its
                score rule.
        """
        request = check_options(
            self.manifest,
            threshold=threshold,
            color=color,
            category=category,
            value_range=value_range,
            tile=tile,
            overlap=overlap,
            region=region,
            ignore=ignore,
        )
        sources, single = self._collect(images, request)
        found = list(self._iterate(sources, request, None))
        return found[0] if single else found

    __call__ = predict

    def iterate(
        self, images: object, *, on_unreadable: Unreadable | None = None, **options: Unpack[Options]
    ) -> Iterator[Prediction]:
        """Like `predict`, one result at a time: of a list of paths, memory holds one batch only.

        With tiles that is one image.

        Arguments are checked at the call; images are read as the results are asked for.

        Args:
            images: As in `predict`; one image gives one result.
            on_unreadable: Called with each image that cannot be decoded and its error; the image
                is left out. None raises the error instead.
            options: As in `predict`.
        """
        request = check_options(self.manifest, **options)
        sources, _ = self._collect(images, request)
        return self._iterate(sources, request, on_unreadable)

    def find_threshold(
        self,
        images: object,
        *,
        false_alarm_rate: float = 0.01,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> Threshold:
        """The ``threshold=`` for calls with these options, from normal images.

        An engine's own was found on whole images; tiles, a region or another camera change the raw
        scores. The rule, and what it promises of new normal images, are `fastad.calibration`'s.

        Args:
            images: Normal images that training never saw, as in `predict`.
            false_alarm_rate: Largest accepted share, in (0, 1), of normal images called anomalous;
                0.01 needs 99 images.
            progress: Called with the number of images done and of all.
            options: As in `predict`, without ``threshold``.

        Returns:
            Its ``value`` is the threshold, in units of the raw score.

        Raises:
            InputError: the images are too few for the rate, before any runs; else as `predict`.
        """
        if options.get("threshold") is not None:
            raise InputError("threshold: it is what is looked for; leave it out")
        # Any value does, and none would warn of tiles: scores do not depend on it.
        request = check_options(self.manifest, **(options | {"threshold": 0.0}))
        sources, _ = self._collect(images, request)
        calibration.check_count(len(sources), false_alarm_rate)
        scores = []
        for prediction in self._iterate(sources, request, None):
            scores.append(prediction.raw_score)
            if progress:
                progress(len(scores), len(sources))
        return calibration.threshold_at(np.array(scores), false_alarm_rate)

    def submit(self, image: object, **options: Unpack[Options]) -> Future[Prediction]:
        """Like `predict` of one image, done by a few threads: while one image runs, the next is
        decoded and resized.

        One thread for each run that the runtime takes at once, and one more; twice as many images
        may wait. Beyond that the call itself waits, so that memory stays bounded however fast
        images come; futures that you keep hold their image and its map. An image in memory must
        not be changed before its result is there.

        Args:
            image: As in `predict`, one image.
            options: As in `predict`.

        Returns:
            A future of its `Prediction`, or of what is wrong with this image; others go on. Images
            are begun in order. ``cancel()`` works until an image is begun. `close` finishes what
            was submitted.

        Raises:
            InputError: another argument that cannot be used, or the predictor is closed; or the
                queue is full and a future's callback asks, in one of the threads that empty it.
            UnsupportedError: as in `predict`.
        """
        request = check_options(self.manifest, **options)
        self._collect((), request)  # refuses colour and range; images answer in their futures
        return self._started().submit(partial(self._one, image, request))

    def _one(self, image: object, request: Request) -> Prediction:
        sources, single = self._collect(image, request)
        if not single:
            raise InputError(
                f"image: expected one image, got {len(sources)}; submit each by itself, or use "
                "predict"
            )
        (found,) = self._iterate(sources, request, None)
        return found

    def _started(self) -> Workers:
        with self._starting:
            if self._workers is None:
                self.check_open()
                threads = self._feed.turns + 1
                self._workers = Workers("fastad submit", threads, 2 * threads)
                # A predictor that is dropped instead of closed leaves no threads.
                weakref.finalize(self, self._workers.close, cancel=True).atexit = False
            return self._workers

    def stream(self, source: object, **options: Any) -> Generator[StreamResult | StreamEvent]:
        """Results of a video, a camera, ``rtsp://``, a folder or an iterable, as frames come.

        Args:
            source: One of these, or a list of several sources.
            options: Of `fastad.camera.stream.stream`, such as ``every``, ``color``, ``events``.

        Raises:
            UnsupportedError: videos and cameras need PyAV: ``pip install 'fastad[camera]'``.
            InputError: a source or option that cannot be used.
        """
        from fastad.camera.stream import stream

        return stream(self, source, **options)

    @property
    def runs_at_once(self) -> int:
        """How many batches the runtime takes at once; others wait for their turn."""
        return self._feed.turns

    def _collect(self, images: object, request: Request) -> tuple[list[Source], bool]:
        self.check_open()
        return collect(images, request.color, request.value_range)

    def _iterate(
        self, sources: list[Source], request: Request, on_unreadable: Unreadable | None
    ) -> Iterator[Prediction]:
        # Images that are decoded together.
        count = 1 if request.aim.tiling else max(BATCH, self._feed.turns)
        for start in range(0, len(sources), count):
            began = time.perf_counter()
            frames: Frames = []
            for source in sources[start : start + count]:
                try:
                    frames.append((source, source.frame()))
                except FastadError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(source, error)
            if frames:
                yield from self.run(frames, request, began)

    def run(self, frames: Frames, request: Request, began: float) -> list[Prediction]:
        """Results of decoded frames, for `fastad.camera`; ``began`` is when decoding started."""
        self.check_open()  # it may have been closed between two results
        decoded = time.perf_counter()
        graph = Graph(self._feed, self.manifest.spec)
        looks = graph.look(frames, request.aim)
        scale = self.manifest.calibration.map_scale if self.manifest.calibration else None
        applied = request.applied
        calibrated = [
            calibration.pred_score(look.raw_score, applied) if applied else None for look in looks
        ]
        per_image = 1000.0 / len(frames)
        graph_s = graph.preprocess_s + graph.waited_s + graph.inference_s
        speed = {
            "decode": (decoded - began) * per_image,
            "preprocess": graph.preprocess_s * per_image,
            "inference": graph.inference_s * per_image,
            "postprocess": (time.perf_counter() - decoded - graph_s) * per_image,
        }
        return [
            Prediction(
                raw_score=look.raw_score,
                pred_score=score,
                threshold=request.value,
                category=request.category,
                source=source,
                orig_shape=frame.size,
                model_map=look.model_map,
                map_scale=scale,
                speed=dict(speed),
                counted=look.counted,
            )
            for (source, frame), look, score in zip(frames, looks, calibrated, strict=True)
        ]

    def warmup(self, batch: int = 1) -> None:
        """Run once on black images, so that the first real image meets a warm runtime.

        Raises:
            InputError: ``batch`` is below 1, or the predictor is closed.
        """
        self.check_open()
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise InputError(f"batch: expected a whole number of at least 1, got {batch!r}")
        H, W = self.manifest.spec.input.size
        self.runtime.run(np.zeros((batch, H, W, 3), np.uint8))

    def check_open(self) -> None:
        """Refuse, with an `InputError`, what is closed or was loaded before a fork."""
        if self._closed:
            raise InputError("predictor: it is closed; call fastad.load again")
        if os.getpid() != self._process:
            raise InputError(
                "predictor: it was loaded before this process was forked, and its threads stayed "
                "behind; call fastad.load in this process, or start processes by spawn"
            )

    def close(self, *, cancel: bool = False) -> None:
        """Free the runtime; further predictions are errors.

        Images that were submitted are finished first; with ``cancel`` those that are not begun are
        cancelled, as they are when an exception leaves the ``with`` block.
        """
        if self._closed or os.getpid() != self._process:
            return
        with self._starting:
            workers = self._workers
            if workers is None:
                self._closed = True
        if workers:
            workers.close(cancel=cancel)  # refuses more, and its work needs the runtime open
        self._closed = True
        self.runtime.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=kind is not None)

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "predictor: it cannot be pickled, it owns a loaded runtime; pass the engine's path "
            "and call fastad.load in the other process"
        )
