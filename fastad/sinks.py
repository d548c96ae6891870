"""Where the results of `fastad predict` go: JSON lines and image files, never half written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

import numpy as np

from fastad.errors import EngineError, InputError
from fastad.prediction import Prediction, save_image


class LineFile:
    """One JSON document per line, to stdout or to a file that appears when it is complete.

    Owns the file; leaving the ``with`` block renames it, leaving by an exception removes it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._partial = path and path.with_name(f".{path.name}.partial")
        self._file: TextIO = sys.stdout

    def __enter__(self) -> LineFile:
        if self._partial:
            try:
                self._file = self._partial.open("w", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        return self

    def write(self, line: str) -> None:
        """Write one line.

        Raises:
            EngineError: the disk is full.
        """
        try:
            self._file.write(line + "\n")
            if not self._partial:
                self._file.flush()  # whoever reads the pipe wants results as they come
        except BrokenPipeError:
            raise
        except OSError as error:
            raise EngineError(f"{self.path}: cannot be written ({error.strerror})") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not (self._partial and self.path):
            return
        try:
            self._file.close()
            if kind is None:
                self._partial.replace(self.path)
        except OSError as failure:
            raise EngineError(f"{self.path}: cannot be written ({failure.strerror})") from failure
        finally:
            self._partial.unlink(missing_ok=True)


def write_images(
    prediction: Prediction, *, overlays: Path | None, maps: Path | None, masks: Path | None
) -> None:
    """Write what was asked for, named after the image's file and its folder.

    Raises:
        InputError: a folder cannot be written.
    """
    if overlays:
        prediction.save(overlays / f"{_name(prediction)}.png")
    if masks:
        save_image(prediction.pred_mask.astype(np.uint8) * 255, masks / f"{_name(prediction)}.png")
    if maps:
        _save_map(prediction.anomaly_map, maps / f"{_name(prediction)}.npy")


def _name(prediction: Prediction) -> str:
    # The folder is part of the name: defect folders of one category repeat the same file names.
    assert prediction.path is not None
    parts = prediction.path.resolve().with_suffix("").parts[-3:]
    return "_".join(part.strip(os.sep) for part in parts if part.strip(os.sep))


def _save_map(anomaly_map: np.ndarray[tuple[int, ...], np.dtype[np.float32]], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, anomaly_map, allow_pickle=False)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
