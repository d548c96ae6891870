"""`load` an engine file and `predict`: from an image to a verdict on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fastad import calibration
from fastad.engine.base import Runtime
from fastad.engine.container import read_engine
from fastad.engine.opening import open_engine
from fastad.errors import EngineError, FastadError, InputError
from fastad.prediction import Prediction
from fastad.preprocess import Color, Frame, Source, ValueRange, collect, to_batch
from fastad.spec import Manifest, Threshold

if TYPE_CHECKING:
    from fastad.camera.events import StreamEvent, StreamResult

BATCH = 8  # images per run: larger batches gain nothing on CPUs and cost memory

Unreadable = Callable[[Source, FastadError], None]


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    runtime: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Predictor:
    """Open an engine file for prediction.

    Args:
        path: A ``.engine`` file; its hashes are checked before anything in it is used.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (not yet run on hardware).
        runtime: ``auto``, ``openvino``, ``onnxruntime``, ``tensorrt`` or ``pytorch``; ``auto``
            takes a GPU where one can serve this engine.
        precision: ``auto`` takes the fastest of those that passed the accuracy gate at export, or
            ``fp32`` where there was none; logger ``fastad`` says which and why. By name: ``fp32``,
            ``bf16``, ``int8`` or ``fp16``, if the engine holds it.
        threads: Cores to use; None takes all.

    Raises:
        EngineError: the file is missing, damaged, or of a newer format, or its accuracy gate
            refused the precision.
        InputError: a name that does not exist.
        UnsupportedError: this machine cannot serve the request; the message says why.
    """
    with read_engine(path) as engine:
        opened = open_engine(engine, runtime, precision, device, threads)
        return Predictor(engine.manifest, opened)


@dataclass(frozen=True)
class Request:
    """What one call of `Predictor.predict` asks for beside its images, checked."""

    applied: Threshold | None  # calibrated, moved to the caller's value if there is one
    value: float | None  # what decides; None if nothing does
    category: str | None


class Predictor:
    """Turns images into `Prediction` objects. Thread-safe; owns its runtime until `close`."""

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self.manifest = manifest
        self.runtime = runtime
        self._closed = False

    def predict(
        self,
        images: object,
        *,
        threshold: float | None = None,
        color: Color = "rgb",
        category: str | None = None,
        value_range: ValueRange | None = None,
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

        Returns:
            One `Prediction` for one image; a list, in order, for a list or a batch.

        Raises:
            InputError: an argument that cannot be used, before anything ran; or an image that
                cannot be decoded.
            EngineError: the runtime fails, or its score is not finite.
        """
        request = self.request(threshold=threshold, category=category)
        sources, single = self._collect(images, color, value_range)
        found = list(self._iterate(sources, request, None))
        return found[0] if single else found

    __call__ = predict

    def iterate(
        self,
        images: object,
        *,
        threshold: float | None = None,
        color: Color = "rgb",
        category: str | None = None,
        value_range: ValueRange | None = None,
        on_unreadable: Unreadable | None = None,
    ) -> Iterator[Prediction]:
        """Like `predict`, one result at a time: of a list of paths, memory holds one batch only.

        Arguments are checked at the call; images are read as the results are asked for.

        Args:
            images: As in `predict`; one image gives one result.
            threshold: As in `predict`.
            color: As in `predict`.
            category: As in `predict`.
            value_range: As in `predict`.
            on_unreadable: Called with each image that cannot be decoded and its error; the image
                is left out. None raises the error instead.
        """
        request = self.request(threshold=threshold, category=category)
        sources, _ = self._collect(images, color, value_range)
        return self._iterate(sources, request, on_unreadable)

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

    def _collect(
        self, images: object, color: Color, value_range: ValueRange | None
    ) -> tuple[list[Source], bool]:
        self._check_open()
        return collect(images, color, value_range or self.manifest.spec.input.value_range)

    def _iterate(
        self,
        sources: list[Source],
        request: Request,
        on_unreadable: Unreadable | None,
    ) -> Iterator[Prediction]:
        for start in range(0, len(sources), BATCH):
            began = time.perf_counter()
            frames: list[tuple[Source, Frame]] = []
            for source in sources[start : start + BATCH]:
                try:
                    frames.append((source, source.frame()))
                except FastadError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(source, error)
            if frames:
                yield from self.run(frames, request, began)

    def run(
        self, frames: list[tuple[Source, Frame]], request: Request, began: float
    ) -> list[Prediction]:
        """Results of decoded frames, for `fastad.camera`; ``began`` is when decoding started."""
        self._check_open()  # it may have been closed between two results
        decoded = time.perf_counter()
        batch = to_batch([frame for _, frame in frames], self.manifest.spec.input.size)
        prepared = time.perf_counter()
        maps, scores = self.runtime.run(batch)
        ran = time.perf_counter()
        for (source, _), raw in zip(frames, scores.tolist(), strict=True):
            if not math.isfinite(raw):  # no threshold holds back a NaN: it would pass as normal
                raise EngineError(
                    f"{source.name}: the raw score is {raw} on {self.runtime.name} "
                    f"{self.runtime.precision}; run `fastad verify` on the engine"
                )
        scale = self.manifest.calibration.map_scale if self.manifest.calibration else None
        applied = request.applied
        calibrated = [
            calibration.pred_score(raw, applied) if applied else None for raw in scores.tolist()
        ]
        per_image = 1000.0 / len(frames)
        speed = {
            "decode": (decoded - began) * per_image,
            "preprocess": (prepared - decoded) * per_image,
            "inference": (ran - prepared) * per_image,
            "postprocess": (time.perf_counter() - ran) * per_image,
        }
        return [
            Prediction(
                raw_score=raw,
                pred_score=score,
                threshold=request.value,
                category=request.category,
                source=source,
                orig_shape=frame.size,
                model_map=model_map,
                map_scale=scale,
                speed=dict(speed),
            )
            for (source, frame), model_map, raw, score in zip(
                frames, maps, scores.tolist(), calibrated, strict=True
            )
        ]

    def request(self, *, threshold: float | None = None, category: str | None = None) -> Request:
        """Check what a call asks for.

        Raises:
            InputError: an argument that cannot be used.
        """
        applied = self.threshold_for(category, threshold)
        return Request(applied, applied.value if applied else threshold, category)

    def threshold_for(self, category: str | None, value: float | None = None) -> Threshold | None:
        """The calibrated threshold of a category (or pooled), moved to ``value`` if given.

        None without calibration.

        Raises:
            InputError: the engine does not know the category, or ``value`` is not finite.
        """
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise InputError(f"threshold: expected a finite number, got {value!r}")
        known = self.manifest.spec.categories
        if category is not None and category not in known:
            raise InputError(f"category: expected one of {', '.join(known)}, got {category!r}")
        fitted = self.manifest.calibration
        if fitted is None:
            return None
        own = fitted.per_category.get(category, fitted.pooled) if category else fitted.pooled
        return own if value is None else calibration.at(own, value)

    def warmup(self, batch: int = 1) -> None:
        """Run once on black images, so that the first real image meets a warm runtime.

        Raises:
            InputError: ``batch`` is below 1, or the predictor is closed.
        """
        self._check_open()
        if batch < 1:
            raise InputError(f"batch: expected at least 1 image, got {batch}")
        H, W = self.manifest.spec.input.size
        self.runtime.run(np.zeros((batch, H, W, 3), np.uint8))

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("predictor: it is closed; call fastad.load again")

    def close(self) -> None:
        """Free the runtime; further predictions are errors."""
        if not self._closed:
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
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "predictor: it cannot be pickled, it owns a loaded runtime; pass the engine's path "
            "and call fastad.load in the other process"
        )
