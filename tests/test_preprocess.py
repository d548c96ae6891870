from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastad.errors import InputError, UnsupportedError
from fastad.images import read_image
from fastad.preprocess import Frame, collect, to_batch

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (23, 37, 3), np.uint8)
GRAY = COLOR[..., 0].copy()
WIDE = RNG.integers(0, 4096, (23, 37), np.uint16)


def as_pillow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Pillow's two passes in the order that all its versions had before 13."""
    bilinear = Image.Resampling.BILINEAR
    columns = image.convert("RGB").resize((size[1], image.height), bilinear)
    return np.asarray(columns.resize((size[1], size[0]), bilinear))


def images_by_mode() -> dict[str, Image.Image]:
    rgb = Image.fromarray(COLOR)
    alpha = Image.fromarray(GRAY[::-1])
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    gray_alpha = Image.fromarray(GRAY)
    gray_alpha.putalpha(alpha)
    return {
        "1": Image.fromarray(GRAY > 128),
        "L": Image.fromarray(GRAY),
        "LA": gray_alpha,
        "P": rgb.quantize(32),
        "RGB": rgb,
        "RGBA": rgba,
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
    }


@pytest.mark.parametrize("size", [(16, 16), (23, 37), (64, 20), (5, 90)], ids=str)
@pytest.mark.parametrize("mode", images_by_mode())
def test_each_mode_equals_pillow_convert_and_resize(mode: str, size: tuple[int, int]) -> None:
    image = images_by_mode()[mode]
    sources, _ = collect([image])
    batch = to_batch([sources[0].frame()], size)
    np.testing.assert_array_equal(batch[0], as_pillow(image, size))


# Pillow 13 goes horizontally first only when the height does not shrink much more than the width.
@pytest.mark.parametrize("size", [(16, 16), (23, 37), (64, 20)], ids=str)
def test_a_frame_equals_pillow_in_one_call(size: tuple[int, int]) -> None:
    expected = Image.fromarray(COLOR).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(to_batch(frames_of(COLOR), size)[0], np.asarray(expected))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("RGB", "bmp"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("YCbCr", "jpg"),
    ],
)
def test_each_file_equals_pillow_convert_and_resize(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    images_by_mode()[mode].save(path)
    with Image.open(path) as image:
        expected = as_pillow(image, (16, 12))
    np.testing.assert_array_equal(to_batch([Frame(read_image(path))], (16, 12))[0], expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_files_stay_grey(tmp_path: Path, mode: str) -> None:
    images_by_mode()[mode].save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (23, 37)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    images_by_mode()["RGBA"].save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), COLOR)


def test_palette_transparency_is_dropped_without_a_warning(tmp_path: Path) -> None:
    image = images_by_mode()["P"]
    image.save(tmp_path / "a.png", transparency=bytes(range(32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOR).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), COLOR)


def frames_of(images: object, **kwargs: Any) -> list[Frame]:
    return [source.frame() for source in collect(images, **kwargs)[0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_round_x_times_255(dtype: type) -> None:
    values = RNG.random((9, 11, 3)).astype(dtype)
    expected = np.rint(values.astype(np.promote_types(dtype, np.float32)) * 255)
    np.testing.assert_array_equal(frames_of(values)[0].pixels, expected.astype(np.uint8))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_uint8_survives_the_way_through_float(dtype: type) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(frames_of((levels / 255).astype(dtype))[0].pixels, levels)


def test_a_dark_float_image_is_not_stretched() -> None:
    assert frames_of(np.full((4, 4), 0.01, np.float32))[0].pixels.max() == 3


@pytest.mark.parametrize("value", [1.001, -0.001, float("nan"), float("inf"), 200.0])
def test_rejects_floats_outside_0_to_1(value: float) -> None:
    image = np.full((4, 4, 3), 0.5, np.float32)
    image[1, 2, 0] = value
    with pytest.raises(InputError, match=r"image: expected float32 in 0\.\.1"):
        frames_of(image)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int32, np.uint32, np.complex64, object])
def test_rejects_dtypes_without_a_range(dtype: type) -> None:
    with pytest.raises(InputError, match="image: expected uint8"):
        collect(np.zeros((4, 4, 3), dtype))


def test_rejects_uint16_arrays_without_a_range() -> None:
    with pytest.raises(InputError, match=r"from \d+ to \d+.*value_range="):
        collect(WIDE)


@pytest.mark.parametrize("array", [GRAY, GRAY / 255], ids=["uint8", "float"])
def test_value_range_leaves_arrays_of_a_fixed_range_alone(array: np.ndarray) -> None:
    np.testing.assert_array_equal(frames_of(array, value_range=(0, 4095))[0].pixels, GRAY)


@pytest.mark.parametrize(
    "shape", [(5,), (3, 8, 9), (8, 9, 2), (2, 3, 8, 9), (1, 2, 8, 9, 3)], ids=str
)
def test_rejects_shapes_that_are_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[H, W\], \[H, W, C\]"):
        collect(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (0, 4, 4, 3)], ids=str)
def test_rejects_empty_arrays(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="the image is empty"):
        collect(np.zeros(shape, np.uint8))


def test_rejects_empty_pil_images() -> None:
    with pytest.raises(InputError, match=r"images\[0\]: the image is empty"):
        collect([Image.new("RGB", (0, 4))])


def test_bgr_arrays_come_out_rgb() -> None:
    batch = to_batch(frames_of(COLOR[..., ::-1], color="bgr"), (23, 37))
    np.testing.assert_array_equal(batch[0], COLOR)


def test_color_does_not_touch_files_and_pil_images(tmp_path: Path) -> None:
    Image.fromarray(COLOR).save(tmp_path / "a.png")
    frames = frames_of([tmp_path / "a.png", Image.fromarray(COLOR)], color="bgr")
    np.testing.assert_array_equal(to_batch(frames, (23, 37)), np.stack([COLOR, COLOR]))


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("shape", [(23, 37), (23, 37, 1)], ids=str)
def test_one_channel_is_repeated_in_each_color(shape: tuple[int, ...], color: str) -> None:
    batch = to_batch(frames_of(GRAY.reshape(shape), color=color), (23, 37))
    np.testing.assert_array_equal(batch[0], np.repeat(GRAY[..., None], 3, axis=2))


def test_gray_demands_one_channel() -> None:
    with pytest.raises(InputError, match='color="gray" expects one channel'):
        collect(COLOR, color="gray")


def test_rejects_unknown_colors() -> None:
    with pytest.raises(InputError, match=r"color: expected one of \['rgb', 'bgr', 'gray'\]"):
        collect(COLOR, color="RGB")  # type: ignore[arg-type]  # no Color: that is the test


@pytest.mark.parametrize("scale", [1, 255], ids=["uint8", "float"])
def test_fourth_channel_of_an_array_is_dropped(scale: int) -> None:
    rgba = np.dstack([COLOR, GRAY]) if scale == 1 else np.dstack([COLOR, GRAY]) / scale
    np.testing.assert_array_equal(to_batch(frames_of(rgba), (23, 37))[0], COLOR)


def test_uint8_camera_frames_are_not_copied() -> None:
    bgra = np.dstack([COLOR, GRAY])
    assert np.shares_memory(frames_of(bgra, color="bgr")[0].pixels, bgra)


def test_halves_round_to_even() -> None:
    # 510 levels over 255: every odd level lies in the middle.
    levels = np.array([[1, 3, 5, 7, 509, 511]], np.uint16)
    sources, _ = collect(levels, value_range=(0, 510))
    np.testing.assert_array_equal(sources[0].frame().pixels, [[0, 2, 2, 4, 254, 255]])


@pytest.mark.parametrize(
    "value_range", [(5, 5), (1, 0), (0, float("nan")), (0, float("inf")), (1,)]
)
def test_rejects_value_ranges_that_are_none(value_range: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="value_range: expected two finite"):
        collect(WIDE, value_range=value_range)


def test_uint16_color_arrays_are_mapped_channel_by_channel() -> None:
    wide = COLOR.astype(np.uint16) * 257
    np.testing.assert_array_equal(frames_of(wide, value_range=(0, 65535))[0].pixels, COLOR)


def test_strided_and_read_only_arrays_are_read_right() -> None:
    view = COLOR[2:20:3, ::-2]
    view.flags.writeable = False
    np.testing.assert_array_equal(to_batch(frames_of(view), view.shape[:2])[0], view)


def test_torch_tensors_are_channels_first() -> None:
    torch = pytest.importorskip("torch")
    chw = torch.from_numpy(COLOR).permute(2, 0, 1)
    np.testing.assert_array_equal(frames_of(chw)[0].pixels, COLOR)
    assert collect(chw)[1] is True


def test_torch_batches_with_gradients_count_as_lists() -> None:
    torch = pytest.importorskip("torch")
    batch = (torch.from_numpy(np.stack([COLOR, COLOR[::-1]])).permute(0, 3, 1, 2) / 255).float()
    batch = torch.nn.Parameter(batch)
    sources, single = collect(batch)
    assert (len(sources), single) == (2, False)
    np.testing.assert_array_equal(sources[1].frame().pixels, COLOR[::-1])


def test_rejects_channels_last_tensors() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"tensors: \[C, H, W\].*transpose"):
        collect(torch.from_numpy(COLOR))


@pytest.mark.parametrize("dtype", ["bfloat16", "int64", "bool"])
def test_rejects_tensor_dtypes_without_a_range(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="image: expected uint8"):
        collect(torch.zeros(3, 4, 4, dtype=getattr(torch, dtype)))


class DlpackOnly:
    """What a library offers that knows nothing but the exchange protocol."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)):
        self.array, self.device_id = array, device

    def __dlpack__(self, **kwargs: object) -> object:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_id


def test_dlpack_arrays_are_channels_last() -> None:
    np.testing.assert_array_equal(frames_of(DlpackOnly(COLOR))[0].pixels, COLOR)


def test_rejects_device_memory_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"images\[0\]: a tensor on .*\.cpu\(\)"):
        collect([DlpackOnly(COLOR, device=(2, 0))])


def test_mixed_lists_keep_their_order_sizes_and_orders_of_channels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(COLOR[:11]).save(path)
    images = [path, COLOR[..., ::-1], str(path), GRAY, Image.fromarray(COLOR), COLOR[:5, :, ::-1]]
    sources, single = collect(images, color="bgr")
    batch = to_batch([source.frame() for source in sources], (17, 13))
    rgb = [COLOR[:11], COLOR, COLOR[:11], GRAY, COLOR, COLOR[:5]]
    expected = np.stack([as_pillow(Image.fromarray(image), (17, 13)) for image in rgb])
    np.testing.assert_array_equal(batch, expected)
    assert single is False
    assert [source.path for source in sources] == [path, None, path, None, None, None]


@pytest.mark.parametrize("images", [COLOR, GRAY, Image.fromarray(COLOR)], ids=["HWC", "HW", "PIL"])
def test_one_image_is_single(images: object) -> None:
    assert collect(images)[1] is True


@pytest.mark.parametrize(
    "images", [[COLOR], (COLOR,), COLOR[None], []], ids=["list", "tuple", "NHWC", "empty"]
)
def test_lists_and_batches_are_not_single(images: Any) -> None:
    sources, single = collect(images)
    assert (len(sources), single) == (int(len(images) > 0), False)


@pytest.mark.parametrize(
    "item", [None, 3, b"a.png", {"a": 1}, iter([])], ids=lambda each: type(each).__name__
)
def test_rejects_other_types_by_position(item: object) -> None:
    with pytest.raises(InputError, match=r"images\[1\]: expected a path, a PIL image"):
        collect([COLOR, item])


def test_rejects_a_batch_inside_a_list() -> None:
    with pytest.raises(InputError, match=r"images\[0\]: expected one image"):
        collect([COLOR[None]])


def test_refuses_the_last_item_before_decoding_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("would fail if it were decoded")
    with pytest.raises(InputError, match=r"images\[1\]: .*missing\.png: no such file"):
        collect([tmp_path / "a.png", tmp_path / "missing.png"])


def test_a_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder.*expand"):
        collect(tmp_path)


def test_paths_are_decoded_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    sources, _ = collect([tmp_path / "a.png"] * 1000)
    with pytest.raises(InputError, match=r"a\.png: is not an image"):
        sources[999].frame()


def test_a_frame_at_model_size_comes_out_byte_for_byte() -> None:
    np.testing.assert_array_equal(to_batch(frames_of(COLOR), COLOR.shape[:2])[0], COLOR)


def test_batch_is_written_into_the_buffer_given() -> None:
    buffer = np.zeros((4, 8, 8, 3), np.uint8)
    out = to_batch(frames_of([COLOR, GRAY]), (8, 8), buffer[1:3])
    assert np.shares_memory(out, buffer)
    np.testing.assert_array_equal(buffer[1:3], to_batch(frames_of([COLOR, GRAY]), (8, 8)))
    assert not buffer[0].any()
    assert not buffer[3].any()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((1, 8, 16, 3), np.uint8)[:, :, ::2],
    ],
    ids=["dtype", "length", "strides"],
)
def test_rejects_a_buffer_that_does_not_fit(out: np.ndarray) -> None:
    with pytest.raises(
        InputError, match=r"out: expected writable C-contiguous uint8 \[1, 8, 8, 3\]"
    ):
        to_batch(frames_of(COLOR), (8, 8), out)


def test_rejects_a_size_without_pixels() -> None:
    with pytest.raises(InputError, match=r"size: expected \(H, W\)"):
        to_batch(frames_of(COLOR), (0, 8))


def test_import_brings_no_framework() -> None:
    code = (
        "import sys, fastad.preprocess, fastad.training.folder\n"
        "print([m for m in ('torch', 'onnxruntime', 'openvino', 'cv2') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
