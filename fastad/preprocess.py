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

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastad import _native
from fastad.errors import InputError, UnsupportedError
from fastad.images import check_file, decode, read_image
from fastad.levels import ValueRange, check_value_range, to_uint8, undeclared

Color = Literal["rgb", "bgr", "gray"]

_HOST_DEVICES = {1, 3, 11}  # DLPack: CPU, and host memory pinned by CUDA or ROCm
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
            return Frame(decode(self.content, self.value_range, self.name))
        pixels = _array_pixels(self.content, self.value_range, self.name)
        return Frame(pixels, swap_red_blue=self.color == "bgr" and pixels.ndim == 3)


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
        return to_uint8(array, value_range, name)
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


def _source(item: object, name: str, color: Color, value_range: ValueRange | None) -> Source:
    """One checked image."""
    if isinstance(item, str | os.PathLike):
        path = Path(item)
        check_file(path, name)
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
        raise undeclared(array, name)


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
