"""From anything that shows an image to uint8 RGB at model size, by Pillow's bilinear rule.

A file or a PIL image carries its own channel order. An array is RGB unless ``color`` says
otherwise, and its dtype alone decides its range:

============  ===============================================================
uint8         0..255
uint16        as declared: ``value_range=(low, high)`` in grey levels
float         0..1; anything outside is an error, never rescaled by guess
============  ===============================================================

numpy arrays are HW, HWC or NHWC. torch tensors follow their field's convention: HW, CHW or BCHW.
Nothing here imports torch.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastad import _native
from fastad.errors import FastadError, InputError, UnsupportedError

Color = Literal["rgb", "bgr", "gray"]
ValueRange = tuple[float, float]  # (low, high) in grey levels: black and white

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_HOST_DEVICES = {1, 3, 11}  # DLPack: CPU, and host memory pinned by CUDA or ROCm
_FOLDER = "is a folder, expected an image file; fastad.preprocess.expand lists its images"
_MISSING = "no such file; fastad.preprocess.expand takes patterns"
_ACCEPTED = "a path, a PIL image, an array or tensor, or a list of these"


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded image, ready for `to_batch`.

    ``pixels`` is uint8 [H, W], [H, W, 3] or [H, W, 4], the fourth channel without meaning. It may
    be a view of the caller's array, with any strides.
    """

    pixels: NDArray[np.uint8]
    swap_red_blue: bool = False  # pixels are BGR
    path: Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the original image."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True, eq=False)
class Source:
    """One image that was accepted and is not yet decoded: a path costs no pixels until `frame`."""

    content: Path | Image.Image | NDArray[Any]  # an array is [H, W] or [H, W, C]
    name: str  # errors name it
    color: Color = "rgb"
    value_range: ValueRange | None = None

    @property
    def path(self) -> Path | None:
        """The file, or None for an image from memory."""
        return self.content if isinstance(self.content, Path) else None

    def frame(self) -> Frame:
        """Decode to uint8.

        Raises:
            InputError: the file cannot be read (`read_image` says when), or a float array leaves
                the range 0..1.
        """
        if isinstance(self.content, Path):
            return Frame(read_image(self.content, self.value_range), path=self.content)
        if isinstance(self.content, Image.Image):
            with _decoder_errors(self.name):
                levels = _levels(self.content)
            return Frame(_file_pixels(levels, self.value_range, self.name))
        pixels = _array_pixels(self.content, self.value_range, self.name)
        return Frame(pixels, swap_red_blue=self.color == "bgr" and pixels.ndim == 3)


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


def collect(
    images: object,
    color: Color = "rgb",
    value_range: ValueRange | None = None,
) -> tuple[list[Source], bool]:
    """Check what was passed, image by image, before any is decoded.

    Args:
        images: A path, a PIL image, an array or tensor on the host, or a list or tuple of these in
            any mixture of kinds and sizes. NHWC arrays and BCHW tensors count as lists. Channels
            are 1, 3 or 4; the fourth is dropped.
        color: Channel order of arrays and tensors. "gray" demands one channel.
        value_range: Grey levels (low, high) that become 0 and 255 in uint16 arrays and in files of
            more than 8 bits. It leaves 8-bit files, uint8 and float arrays alone: their range is
            fixed.

    Returns:
        The sources in order, and whether a single image came in (so that one result goes out).

    Raises:
        InputError: something in ``images`` is no image, its shape or dtype is not accepted, it is
            empty, or a path is missing or a folder.
        UnsupportedError: a tensor is not in host memory.

    >>> sources, single = collect(np.zeros((4, 6, 3), np.uint8), color="bgr")
    >>> sources[0].frame().size, single
    ((4, 6), True)
    """
    if color not in get_args(Color):
        raise InputError(f"color: expected one of {list(get_args(Color))}, got {color!r}")
    check_value_range(value_range)
    if isinstance(images, list | tuple):
        named = [(item, f"images[{i}]") for i, item in enumerate(images)]
        return [_source(item, name, color, value_range) for item, name in named], False
    array = _as_array(images, "image")
    if array is not None and array.ndim == 4:
        # An empty batch says so here: as a list it would vanish.
        _check_array(array, "image", color, value_range)
        named = [(item, f"image[{i}]") for i, item in enumerate(array)]
        return [Source(item, name, color, value_range) for item, name in named], False
    return [_source(images, "image", color, value_range)], True


def to_batch(
    frames: Sequence[Frame],
    size: tuple[int, int],
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Resize frames straight into one batch: uint8 RGB [B, H, W, 3].

    Equal byte for byte to Pillow's ``convert("RGB").resize((W, H), BILINEAR)``, horizontal pass
    first. So does Pillow up to 12; Pillow 13 takes the vertical pass first where the height shrinks
    much more than the width, which moves some bytes by 1 (python-pillow/Pillow#9549). A frame that
    has the model's size already is copied.

    Args:
        frames: B decoded images of any sizes.
        size: (H, W) of the model.
        out: Buffer to fill, uint8 [B, H, W, 3], C-contiguous; a new one when None.

    Raises:
        InputError: ``size`` is not two positive numbers, or ``out`` has another shape or dtype.
    """
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size: expected (H, W), both at least 1, got {size}")
    shape = (len(frames), *size, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.dtype != np.uint8 or out.shape != shape or not out.flags.carray:
        raise InputError(
            f"out: expected writable C-contiguous uint8 {list(shape)}, got {_describe(out)}"
        )
    start = 0
    for swap, run in itertools.groupby(frames, key=lambda frame: frame.swap_red_blue):
        pixels = [frame.pixels for frame in run]
        stop = start + len(pixels)
        _native.resize_into(pixels, out[start:stop], swap_red_blue=swap)
        start = stop
    return out


def expand(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files that paths, folders and glob patterns stand for.

    A folder stands for the images in it and below it, by suffix, in natural order (``2.png`` before
    ``10.png``); hidden entries and ``ground_truth`` folders, which hold masks, are left out, and
    each linked folder is visited once. A pattern
    stands for the matching images. A file that is named stands for itself, whatever its suffix.

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
        raise InputError(f"{name}: the image is empty: {_describe(levels)}")
    if levels.dtype == np.uint8:
        return levels
    return _scaled(levels, value_range, name)


def _array_pixels(
    array: NDArray[Any], value_range: ValueRange | None, name: str
) -> NDArray[np.uint8]:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    # The resize passes over a fourth channel in place, which spares cameras a copy.
    if array.dtype == np.uint8:
        return array
    if array.ndim == 3:
        array = array[..., :3]
    if array.dtype.kind == "u":
        return _scaled(array, value_range, name)
    low, high = array.min(), array.max()
    # NaN fails both comparisons, and min and max hand it on.
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"{name}: expected {array.dtype} in 0..1, got {low:g}..{high:g}; divide by the range "
            "of your camera, or pass uint8 or uint16"
        )
    # float16 has too few bits for 255 levels and their halves.
    wide = np.promote_types(array.dtype, np.float32)
    scaled = np.multiply(array, wide.type(255), dtype=wide)
    pixels: NDArray[np.uint8] = np.rint(scaled, out=scaled).astype(np.uint8)
    return pixels


def _scaled(levels: NDArray[Any], value_range: ValueRange | None, name: str) -> NDArray[np.uint8]:
    """Grey levels to 0..255 by the declared range."""
    if value_range is None:
        raise _undeclared(levels, name)
    if levels.dtype.kind == "u":
        return np.take(_level_table(*value_range), levels)
    if not np.isfinite(levels).all():
        raise InputError(f"{name}: expected finite grey levels, got NaN or infinity")
    return _to_uint8(levels, *value_range)


def _undeclared(levels: NDArray[Any], name: str) -> InputError:
    return InputError(
        f"{name}: holds {levels.dtype} grey levels from {levels.min():g} to {levels.max():g}, and "
        "which of them are black and white must be declared: pass value_range=(low, high), for "
        "example (0, 4095) for a 12-bit camera"
    )


@lru_cache(maxsize=8)
def _level_table(low: float, high: float) -> NDArray[np.uint8]:
    return _to_uint8(np.arange(1 << 16), low, high)


def _to_uint8(levels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    # The product of integers is exact in float64, so that halves are halves when rint sees them.
    gray = (levels.astype(np.float64) - low) * 255 / (high - low)
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8)


def _source(item: object, name: str, color: Color, value_range: ValueRange | None) -> Source:
    """One checked image."""
    if isinstance(item, str | os.PathLike):
        path = Path(item)
        if not path.is_file() and (path.is_dir() or not path.exists()):
            raise InputError(f"{name}: {path}: {_FOLDER if path.is_dir() else _MISSING}")
        return Source(path, os.fspath(path), color, value_range)
    if isinstance(item, Image.Image):
        if 0 in item.size:
            raise InputError(f"{name}: the image is empty: {item.width} x {item.height} pixels")
        return Source(item, name, color, value_range)
    array = _as_array(item, name)
    if array is None:
        raise InputError(f"{name}: expected {_ACCEPTED}, got {type(item).__name__}")
    if array.ndim == 4:
        raise InputError(
            f"{name}: expected one image in each place of a list, got a batch {_describe(array)}"
        )
    _check_array(array, name, color, value_range)
    return Source(array, name, color, value_range)


def _as_array(item: object, name: str) -> NDArray[Any] | None:
    """A view in HW, HWC or NHWC; None when ``item`` is no array."""
    if isinstance(item, np.ndarray):
        return np.asarray(item)
    if isinstance(item, Image.Image) or not (
        hasattr(item, "__array__") or hasattr(item, "__dlpack__")
    ):
        return None
    tensor: Any = item
    bases = type(item).__mro__
    channels_first = any(c.__module__ == "torch" and c.__name__ == "Tensor" for c in bases)
    try:
        if hasattr(tensor, "__dlpack_device__"):
            device = tensor.__dlpack_device__()
            if device[0] not in _HOST_DEVICES:
                where = getattr(tensor, "device", f"DLPack device {device}")
                raise UnsupportedError(
                    f"{name}: a tensor on {where}; copy it with .cpu(), or keep it on the GPU with "
                    "predictor.runtime.run_device"
                )
        if channels_first:
            tensor = tensor.detach()
        array = np.asarray(tensor) if hasattr(tensor, "__array__") else np.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = getattr(item, "dtype", "unknown dtype")
        raise InputError(
            f"{name}: expected uint8, uint16 or float of up to 64 bits, got "
            f"{type(item).__name__} of {dtype}: {error}"
        ) from None
    return np.moveaxis(array, -3, -1) if channels_first and array.ndim in (3, 4) else array


def _check_array(
    array: NDArray[Any], name: str, color: Color, value_range: ValueRange | None
) -> None:
    """Refuse dtypes, shapes and declarations that leave something to guess."""
    kind, itemsize = array.dtype.kind, array.dtype.itemsize
    if not ((kind == "u" and itemsize <= 2) or (kind == "f" and itemsize <= 8)):
        raise InputError(
            f"{name}: expected uint8 (0..255), uint16 with value_range, or float (0..1), got "
            f"{_describe(array)}"
        )
    if array.ndim not in (2, 3, 4) or (array.ndim > 2 and array.shape[-1] not in (1, 3, 4)):
        raise InputError(
            f"{name}: expected [H, W], [H, W, C] or [N, H, W, C] with 1, 3 or 4 channels (tensors: "
            f"[C, H, W] or [B, C, H, W]), got {_describe(array)} read as channels last; transpose "
            "it"
        )
    if array.size == 0:
        raise InputError(f"{name}: the image is empty: {_describe(array)}")
    if color == "gray" and array.ndim > 2 and array.shape[-1] != 1:
        raise InputError(
            f'{name}: color="gray" expects one channel, got {_describe(array)}; pass "rgb" or "bgr"'
        )
    if kind == "u" and itemsize == 2 and value_range is None:
        raise _undeclared(array, name)


def check_value_range(value_range: ValueRange | None) -> None:
    """Refuse anything but None or two finite grey levels, the lower one first."""
    if value_range is None:
        return
    try:
        low, high = (float(level) for level in value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (low < high and math.isfinite(high - low)):
        raise InputError(
            f"value_range: expected two finite grey levels (low, high), low < high, "
            f"got {value_range!r}"
        )


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
