"""`load` an engine file and `predict`: from an image to a verdict on one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import NoReturn

import numpy as np

from fastad import calibration
from fastad.engine.base import Runtime
from fastad.engine.container import read_engine
from fastad.engine.select import open_runtime
from fastad.errors import FastadError, InputError
from fastad.prediction import Prediction
from fastad.preprocess import Color, Frame, Source, ValueRange, collect, to_batch
from fastad.spec import Manifest, Threshold

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
        device: ``auto`` or ``cpu``.
        runtime: ``auto``, ``openvino`` or ``onnxruntime``.
        precision: ``auto`` (fp32), ``fp32`` or ``bf16`` (no accuracy gate: compare first).
        threads: Cores to use; None takes all.

    Raises:
        EngineError: the file is missing, damaged, or of a newer format.
        InputError: a name that does not exist.
        UnsupportedError: this machine cannot serve the request; the message says why.
    """
    with read_engine(path) as engine:
        manifest = engine.manifest
        graph = bytes(engine.member(manifest.variants[0].member))
    return Predictor(manifest, open_runtime(graph, runtime, precision, device, threads))


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
            InputError: an image or argument that cannot be used; nothing was run for it.
        """
        sources, single = self._collect(images, color, value_range)
        found = list(self._iterate(sources, threshold, category, None))
        return found[0] if single else found

    __call__ = predict

    def iterate(
        self,
        images: Sequence[object],
        *,
        threshold: float | None = None,
        color: Color = "rgb",
        category: str | None = None,
        value_range: ValueRange | None = None,
        on_unreadable: Unreadable | None = None,
    ) -> Iterator[Prediction]:
        """Like `predict` on a list, one result at a time: memory holds one batch only.

        Args:
            images: As in `predict`.
            threshold: As in `predict`.
            color: As in `predict`.
            category: As in `predict`.
            value_range: As in `predict`.
            on_unreadable: Called with each image that cannot be decoded and its error; the image
                is left out. None raises the error instead.
        """
        sources, _ = self._collect(list(images), color, value_range)
        return self._iterate(sources, threshold, category, on_unreadable)

    def _collect(
        self, images: object, color: Color, value_range: ValueRange | None
    ) -> tuple[list[Source], bool]:
        if self._closed:
            raise InputError("predictor: it is closed; call fastad.load again")
        return collect(images, color, value_range or self.manifest.spec.input.value_range)

    def _iterate(
        self,
        sources: list[Source],
        threshold: float | None,
        category: str | None,
        on_unreadable: Unreadable | None,
    ) -> Iterator[Prediction]:
        applied = self.threshold_for(category, threshold)
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
                yield from self._run(frames, threshold, applied, category, began)

    def _run(
        self,
        frames: list[tuple[Source, Frame]],
        threshold: float | None,
        applied: Threshold | None,
        category: str | None,
        began: float,
    ) -> list[Prediction]:
        batch = to_batch([frame for _, frame in frames], self.manifest.spec.input.size)
        prepared = time.perf_counter()
        maps, scores = self.runtime.run(batch)
        ran = time.perf_counter()
        scale = self.manifest.calibration.map_scale if self.manifest.calibration else None
        value = applied.value if applied else threshold
        per_image = 1000.0 / len(frames)
        speed = {
            "preprocess": (prepared - began) * per_image,
            "inference": (ran - prepared) * per_image,
            "postprocess": 0.0,
        }
        found = []
        for (source, frame), model_map, raw in zip(frames, maps, scores.tolist(), strict=True):
            found.append(
                Prediction(
                    raw_score=raw,
                    pred_score=calibration.pred_score(raw, applied) if applied else None,
                    threshold=value,
                    category=category,
                    source=source,
                    orig_shape=frame.size,
                    model_map=model_map,
                    map_scale=scale,
                    speed=speed,
                )
            )
        speed["postprocess"] = (time.perf_counter() - ran) * per_image
        return found

    def threshold_for(self, category: str | None, value: float | None = None) -> Threshold | None:
        """The calibrated threshold of a category (or pooled), moved to ``value`` if given.

        None without calibration.

        Raises:
            InputError: the engine does not know the category, or ``value`` is not finite.
        """
        if value is not None and not np.isfinite(value):
            raise InputError(f"threshold: expected a finite number, got {value}")
        known = self.manifest.spec.categories
        if category is not None and category not in known:
            raise InputError(f"category: expected one of {', '.join(known)}, got {category!r}")
        fitted = self.manifest.calibration
        if fitted is None:
            return None
        own = fitted.per_category.get(category, fitted.pooled) if category else fitted.pooled
        return own if value is None else calibration.at(own, value)

    def warmup(self, batch: int = 1) -> None:
        """Run once on black images, so that the first real image meets a warm runtime."""
        H, W = self.manifest.spec.input.size
        self.runtime.run(np.zeros((batch, H, W, 3), np.uint8))

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
