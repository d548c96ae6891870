"""Image files: which ones a path stands for, and their pixels in the file's own channel order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastad.errors import FastadError, InputError
from fastad.levels import ValueRange, check_value_range, to_uint8

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_FOLDER = "is a folder, expected an image file; fastad.images.expand lists its images"
_MISSING = "no such file; fastad.images.expand takes patterns"


def read_image(
    path: str | os.PathLike[str], value_range: ValueRange | None = None
) -> NDArray[np.uint8]:
    """Read an image file as grey or RGB.

    Alpha is dropped. EXIF orientation is not applied: training reads files the same way, so a model
    sees at work what it saw then. Of several pages or frames the first is read. Files with 16 bits
    for each of three colours come as Pillow gives them, the upper 8 bits.

    Args:
        path: Any file that Pillow reads.
        value_range: Grey levels (low, high) that become 0 and 255, for files of 16-bit, 32-bit or
            float grey levels, which need it. Linear, rounded half to even, clipped. 8-bit files
            are left alone.

    Returns:
        uint8 [H, W] for grey files, [H, W, 3] RGB for all others. Read-only.

    Raises:
        InputError: the file is missing, is a folder, is no image, is damaged or truncated, is
            larger than Pillow's limit for trusted files, or needs a ``value_range``. The message
            names the path.
    """
    check_value_range(value_range)
    return _file_pixels(read_levels(path), value_range, os.fspath(path))


def read_levels(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read an image file in its own range: [H, W] uint8, uint16, int32, float32, or RGB uint8.

    Otherwise like `read_image`, with the same errors.
    """
    with _decoder_errors(os.fspath(path)), Image.open(path) as image:
        return _levels(image)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(H, W) of an image file from its header alone; errors as in `read_image`."""
    with _decoder_errors(os.fspath(path)), Image.open(path) as image:
        return image.height, image.width


def decode(image: Image.Image, value_range: ValueRange | None, name: str) -> NDArray[np.uint8]:
    """Pixels of an open image, as `read_image` gives those of a file; ``name`` is for errors."""
    with _decoder_errors(name):
        levels = _levels(image)
    return _file_pixels(levels, value_range, name)


def check_file(path: Path, name: str) -> None:
    """Refuse what is missing or a folder, before anything is read; ``name`` is the argument's."""
    if not path.is_file() and (path.is_dir() or not path.exists()):
        raise InputError(f"{name}: {path}: {_FOLDER if path.is_dir() else _MISSING}")


def expand(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files that paths, folders and glob patterns stand for.

    A folder stands for the images in it and below it, by suffix, in natural order (``2.png`` before
    ``10.png``); hidden entries and ``ground_truth`` folders, which hold masks, are left out, and
    each linked folder is visited once. A pattern stands for the matching images. A file that is
    named stands for itself, whatever its suffix.

    Raises:
        InputError: a path does not exist, or a folder or pattern holds no image.
    """
    if isinstance(sources, str | os.PathLike):
        raise InputError(f"sources: expected a list of paths, got one path; pass [{sources!r}]")
    found: list[Path] = []
    for source in sources:
        path, pattern = Path(source), os.fspath(source)
        if path.is_dir():
            images = _walk(path, set())
        elif path.exists():
            images = [path]
        elif glob.has_magic(pattern):
            # Path.glob takes no absolute pattern.
            matches = glob.glob(pattern, recursive=True)  # noqa: PTH207
            images = [path for path in map(Path, matches) if _is_image(path)]
        else:
            raise InputError(f"{path}: no such file or folder")
        if not images:
            raise InputError(f"{path}: no images here; accepted are {', '.join(IMAGE_SUFFIXES)}")
        found += sorted(images, key=natural_key)
    return found


def list_images(folder: Path) -> list[Path]:
    """Images directly in a folder, by suffix in any case, hidden ones left out, natural order."""
    return sorted((e for e in _entries(folder) if _is_image(e)), key=natural_key)


def natural_key(path: Path) -> tuple[tuple[tuple[str | int, ...], str], ...]:
    """Sort key that counts numbers as numbers.

    >>> [p.name for p in sorted([Path("10.png"), Path("9.png")], key=natural_key)]
    ['9.png', '10.png']
    """
    return tuple((_natural(part), part) for part in path.parts)


def _natural(part: str) -> tuple[str | int, ...]:
    # Text and numbers alternate, so that like is compared with like.
    pieces = re.split(r"([0-9]+)", part.casefold())
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _is_image(path: Path) -> bool:
    # A dangling link counts: reading it then says what is missing.
    named = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return named and not path.is_dir()


def _walk(folder: Path, seen: set[Path]) -> list[Path]:
    """Images in and below a folder; links may lead in circles."""
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    # Natural order here too: it decides by which of two links a folder is reached.
    entries = [
        e
        for e in sorted(_entries(folder), key=natural_key)
        if not e.name.startswith(".") and e.name != "ground_truth"
    ]
    below = [image for e in entries if e.is_dir() for image in _walk(e, seen)]
    return below + [e for e in entries if _is_image(e)]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Turn what a decoder throws at a bad file into one InputError that names it."""
    try:
        yield
    except FastadError:
        raise
    # Which class a damaged file raises depends on where the damage is: OSError, SyntaxError,
    # IndexError (python-pillow/Pillow#6430), struct.error (python-pillow/Pillow#6252) and others.
    except Exception as error:
        raise InputError(f"{name}: {_reason(Path(name), error)}") from None


def _reason(path: Path, error: Exception) -> str:
    if path.is_dir():
        return _FOLDER
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"is too large to trust: {error}; if you do, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    return f"is damaged or truncated: {error or type(error).__name__}"


def _levels(image: Image.Image) -> NDArray[Any]:
    """Pixels in the image's own range: grey of any dtype, or RGB uint8."""
    if image.mode in ("L", "RGB", "I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode in ("1", "LA"):
        return np.asarray(image.convert("L"))
    if image.mode in ("P", "PA") and "transparency" in image.info:
        # Through RGBA, because Pillow warns about transparency that RGB cannot hold.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _file_pixels(
    levels: NDArray[Any], value_range: ValueRange | None, name: str
) -> NDArray[np.uint8]:
    if levels.size == 0:
        raise InputError(f"{name}: the image is empty: {levels.dtype} {list(levels.shape)}")
    if levels.dtype == np.uint8:
        return levels
    return to_uint8(levels, value_range, name)
