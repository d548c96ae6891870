"""Where the results of `fastad predict` go: JSON lines and image files, never half written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from fastad.atomic import PartialFile, unwritable, write_whole
from fastad.prediction import Prediction, save_image


class LineFile:
    """One JSON document per line, to stdout or to a file that appears when it is complete.

    Owns the file; leaving the ``with`` block renames it, leaving by an exception removes it.

    Raises:
        EngineError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._partial = PartialFile(path) if path else None
        self._file: BinaryIO | None = None

    def __enter__(self) -> LineFile:
        if self._partial:
            self._file = self._partial.__enter__()
        return self

    def write(self, line: str) -> None:
        """Write one line.

        Raises:
            EngineError: the disk is full.
        """
        try:
            if self._file:
                self._file.write(line.encode() + b"\n")
            else:
                print(line, flush=True)  # whoever reads the pipe wants results as they come
        except BrokenPipeError:
            raise
        except OSError as error:
            name = self._partial.path if self._partial else "standard output"
            raise unwritable(name, error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._partial:
            self._partial.__exit__(kind, error, trace)


class ImageFolders:
    """Folders for overlays, maps and masks, where no two images of ``paths`` share a name.

    Args:
        paths: All images that will be written.
        overlays: Folder for heat maps over the image, ``.png``; None writes none.
        maps: Folder for anomaly maps, float32 ``.npy``.
        masks: Folder for masks, ``.png`` of 0 and 255.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        overlays: Path | None = None,
        maps: Path | None = None,
        masks: Path | None = None,
    ) -> None:
        self.overlays, self.maps, self.masks = overlays, maps, masks
        self._names = unique_names(paths)

    def write(self, prediction: Prediction) -> dict[str, str]:
        """Write what was asked for; returns the path of each file by its kind.

        Raises:
            EngineError: a folder cannot be written.
            InputError: a mask was asked for and the engine is not calibrated.
        """
        assert prediction.path is not None
        name = self._names[prediction.path]
        written: dict[str, Path] = {}
        if self.overlays:
            written["overlay"] = prediction.save(self.overlays / f"{name}.png")
        if self.maps:
            anomaly_map = prediction.anomaly_map
            written["map"] = write_whole(
                self.maps / f"{name}.npy",
                lambda file: np.save(file, anomaly_map, allow_pickle=False),
            )
        if self.masks:
            mask = prediction.pred_mask.astype(np.uint8) * 255
            written["mask"] = save_image(mask, self.masks / f"{name}.png")
        return {kind: str(path) for kind, path in written.items()}


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name without suffix for each path: its last three folders and stem, counted if taken.

    The folders are part of the name because defect folders repeat the same file names.

    >>> list(unique_names([Path("/a/cut/1.png"), Path("/a/cut/1.bmp")]).values())
    ['a_cut_1', 'a_cut_1-2']
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        parts = path.resolve().with_suffix("").parts
        stem = "_".join(part for part in parts[-4:] if part != path.resolve().anchor)
        name, count = stem, 1
        while name.casefold() in taken:  # some file systems do not tell A from a
            count += 1
            name = f"{stem}-{count}"
        taken.add(name.casefold())
        names[path] = name
    return names
