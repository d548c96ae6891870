"""Image files: which ones are listed, what is read of them, and what is refused."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastad.errors import InputError
from fastad.images import expand, image_size, natural_key, read_image, read_levels

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (23, 37, 3), np.uint8)
GRAY = COLOR[..., 0].copy()
WIDE = RNG.integers(0, 4096, (23, 37), np.uint16)


@pytest.fixture
def broken_png(tmp_path: Path) -> Path:
    """A noise image, so that its compressed data is long enough to cut."""
    path = tmp_path / "broken.png"
    Image.fromarray(COLOR).save(path)
    return path


def save_wide(path: Path, kind: str) -> None:
    if kind == "png16":
        Image.fromarray(WIDE).save(path.with_suffix(".png"))
    elif kind == "tiff16":
        Image.fromarray(WIDE).save(path.with_suffix(".tif"))
    elif kind == "tiff16be":
        Image.frombytes("I;16B", (37, 23), WIDE.astype(">u2").tobytes()).save(
            path.with_suffix(".tif")
        )
    elif kind == "tiff32":
        Image.fromarray(WIDE.astype(np.int32)).save(path.with_suffix(".tif"))
    else:
        Image.fromarray(WIDE.astype(np.float32)).save(path.with_suffix(".tif"))


WIDE_KINDS = ["png16", "tiff16", "tiff16be", "tiff32", "float"]


@pytest.mark.parametrize("kind", WIDE_KINDS)
def test_wide_files_map_linearly_round_half_to_even_and_clip(tmp_path: Path, kind: str) -> None:
    save_wide(tmp_path / "a", kind)
    (path,) = expand([tmp_path])
    expected = np.clip(np.rint((WIDE.astype(np.float64) - 100) * 255 / 3900), 0, 255)
    np.testing.assert_array_equal(read_image(path, (100, 4000)), expected.astype(np.uint8))


@pytest.mark.parametrize("kind", WIDE_KINDS)
def test_wide_files_need_a_declared_range_and_show_theirs(tmp_path: Path, kind: str) -> None:
    save_wide(tmp_path / "a", kind)
    (path,) = expand([tmp_path])
    with pytest.raises(InputError, match=rf"from {WIDE.min()} to {WIDE.max()}.*value_range=\("):
        read_image(path)


def test_rejects_nan_in_a_float_file(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: expected finite"):
        read_image(tmp_path / "a.tif", (0, 1))


def test_value_range_leaves_8_bit_files_alone(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (0, 4095)), GRAY)


def test_levels_keep_the_files_own_range(tmp_path: Path) -> None:
    Image.fromarray(WIDE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_levels(tmp_path / "a.png"), WIDE)


def test_image_size_reads_the_header_only(broken_png: Path) -> None:
    broken_png.write_bytes(broken_png.read_bytes()[:60])
    assert image_size(broken_png) == (23, 37)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_rejects_truncated_files_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(COLOR).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"cut\.{suffix}: "):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_damage_anywhere_gives_pixels_or_an_input_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    Image.fromarray(COLOR).save(path)
    intact = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    with warnings.catch_warnings():
        # Pillow warns about damaged metadata that it survives.
        warnings.simplefilter("ignore")
        for _ in range(60):
            data = bytearray(intact)
            for _ in range(4):
                data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                assert read_image(path).dtype == np.uint8
            except InputError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused


def test_rejects_text_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(InputError, match=r"a\.png: is not an image"):
        read_image(tmp_path / "a.png")


def test_rejects_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r"a\.png: is not an image"):
        read_image(tmp_path / "a.png")


def test_rejects_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png: cannot be read: No such file"):
        read_image(tmp_path / "a.png")


def test_rejects_a_folder_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder.*expand"):
        read_image(tmp_path)


def test_rejects_a_decompression_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    (tmp_path / "bomb.png").write_bytes(bomb + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"bomb\.png: is too large to trust.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "bomb.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("10.png", "9.PNG", "sub/1.jpg", ".hidden/2.png", ".3.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_a_folder_expands_to_its_images_in_natural_order(tree: Path) -> None:
    found = [path.relative_to(tree).as_posix() for path in expand([tree])]
    assert found == ["9.PNG", "10.png", "sub/1.jpg"]


def test_links_in_circles_are_walked_once(tree: Path) -> None:
    try:
        (tree / "sub" / "again").symlink_to(tree, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert len(expand([tree])) == 3


def test_a_pattern_expands_to_images_only(tree: Path) -> None:
    found = [path.relative_to(tree).as_posix() for path in expand([str(tree / "**" / "*")])]
    assert found == ["9.PNG", "10.png", "sub/1.jpg"]


def test_a_file_whose_name_is_a_pattern_stands_for_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].png").touch()
    assert expand([str(tmp_path / "a[1].png")]) == [tmp_path / "a[1].png"]


def test_sources_keep_their_order(tree: Path) -> None:
    assert expand([tree / "sub", tree / "notes.txt"]) == [tree / "sub/1.jpg", tree / "notes.txt"]


@pytest.mark.parametrize("source", ["", "*.tif"], ids=["folder", "pattern"])
def test_rejects_folders_and_patterns_without_images(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path.name}.*no images here.*\.bmp, \.jpeg"):
        expand([str(tmp_path / source)])


def test_rejects_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        expand([tmp_path / "nowhere"])


def test_rejects_one_path_for_a_list() -> None:
    with pytest.raises(InputError, match="expected a list of paths"):
        expand("images")


def test_natural_order_counts_numbers() -> None:
    names = ["b.png", "A10.png", "a9.png", "a09.png", "1.png"]
    found = [path.name for path in sorted(map(Path, names), key=natural_key)]
    assert found == ["1.png", "a09.png", "a9.png", "A10.png", "b.png"]
