"""The resize equals Pillow bit for bit, on every instruction set, from any thread and process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastad import _native
from fastad.errors import InputError

_ext = _native._ext
LEVELS = _ext.simd_levels()
BILINEAR = Image.Resampling.BILINEAR
MODES = {1: "L", 3: "RGB", 4: "CMYK"}

SIZES = [  # (h, w), (H, W)
    ((480, 640), (224, 224)),  # a camera frame
    ((123, 517), (64, 80)),  # no size divides a vector
    ((37, 53), (150, 201)),  # upscaled in both directions
    ((90, 20), (31, 64)),  # down and up: Pillow 13 swaps the passes
    ((20, 90), (64, 31)),
    ((64, 65), (64, 32)),  # one pass leaves its axis alone
    ((65, 64), (32, 64)),
    ((40, 50), (40, 50)),  # a copy
    ((1, 1), (1, 1)),
    ((1, 1), (5, 7)),
    ((300, 1), (4, 3)),
    ((1, 300), (3, 4)),
    ((700, 900), (1, 1)),  # one output reads everything
    ((3, 5), (2, 2)),
]
BOXES = [  # x0, y0, x1, y1 in an image of 60 x 50
    (0.0, 0.0, 60.0, 50.0),
    (10.0, 8.0, 26.0, 20.0),  # whole pixels and as large as the output: a crop
    (10.0, 8.0, 42.0, 32.0),
    (0.3, 0.7, 59.2, 48.9),
    (17.13, 5.77, 18.02, 41.5),  # narrower than a pixel
    (59.5, 49.5, 60.0, 50.0),
    (0.1, 30.25, 0.9, 30.5),
]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _ext.simd_level()
    _ext.set_simd_level(request.param)
    yield request.param
    _ext.set_simd_level(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = _native.threads()
    _native.set_threads(2)
    yield
    _native.set_threads(before)


def noise(size: tuple[int, int], channels: int, seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    image[: size[0] // 3] = np.where(image[: size[0] // 3] < 128, 0, 255)  # sums at the clip limit
    return image


def as_pillow(image: np.ndarray) -> Image.Image:
    height, width, channels = image.shape
    return Image.frombytes(MODES[channels], (width, height), image.tobytes())


def as_rgb(result: np.ndarray) -> np.ndarray:
    return np.repeat(result[..., None], 3, 2) if result.ndim == 2 else result[..., :3]


def pillow(image: np.ndarray, size: tuple[int, int], box: Any = None) -> np.ndarray:
    """Pillow's two passes one by one: the order that Pillow up to 12 has for every shape."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box or (0, 0, width, height)
    rows = as_pillow(image).resize((size[1], height), BILINEAR, box=(x0, 0, x1, height))
    both = rows.resize((size[1], size[0]), BILINEAR, box=(0, y0, size[1], y1))
    return as_rgb(np.asarray(both))


def resized(image: np.ndarray, size: tuple[int, int], **options: Any) -> np.ndarray:
    out = np.full((1, *size, 3), 77, np.uint8)
    _native.resize_into([image], out, **options)
    return out[0]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("size", "to"), SIZES, ids=str)
def test_equals_pillow(level: str, size: tuple[int, int], to: tuple[int, int], channels: int):
    image = noise(size, channels)
    np.testing.assert_array_equal(resized(image, to), pillow(image, to))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("scale", range(1, 20, 2))
def test_equals_pillow_at_every_number_of_steps(level: str, scale: int, channels: int):
    image = noise((30, 21 * scale), channels)  # 2 * scale taps, of which a step takes 4
    np.testing.assert_array_equal(resized(image, (9, 21)), pillow(image, (9, 21)))


@pytest.mark.parametrize("seed", range(60))
def test_equals_pillow_at_random_sizes(level: str, seed: int):
    rng = np.random.default_rng(seed)
    height, width, *to = (int(side) for side in rng.integers(1, 130, 4))
    image = noise((height, width), int(rng.choice([1, 3, 4])), seed)
    xs, ys = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
    box = (float(xs[0]), float(ys[0]), float(xs[1]), float(ys[1])) if seed % 2 else None
    result = resized(image, (to[0], to[1]), boxes=[box])
    np.testing.assert_array_equal(result, pillow(image, (to[0], to[1]), box))


@pytest.mark.parametrize("box", [None, (3.5, 2.25, 600.0, 471.5)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equals_one_pillow_call(level: str, channels: int, box: Any):
    # Wider than tall to a square: every Pillow takes rows first.
    image = noise((480, 640), channels)
    expected = as_pillow(image).resize((224, 224), BILINEAR, box=box)
    np.testing.assert_array_equal(
        resized(image, (224, 224), boxes=[box]), as_rgb(np.asarray(expected))
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_equals_pillow_in_a_box(level: str, box: Any, channels: int):
    image = noise((50, 60), channels)
    np.testing.assert_array_equal(
        resized(image, (12, 16), boxes=[box]), pillow(image, (12, 16), box)
    )


@pytest.mark.parametrize("to", [(40, 50), (20, 30)], ids=["copy", "resize"])
@pytest.mark.parametrize("channels", [3, 4])
def test_swaps_red_and_blue(level: str, channels: int, to: tuple[int, int]):
    image = noise((40, 50), channels)
    np.testing.assert_array_equal(
        resized(image, to, swap_red_blue=True), pillow(image, to)[..., ::-1]
    )


def test_fourth_channel_has_no_influence(level: str):
    image = noise((40, 50), 4)
    opaque = image.copy()
    opaque[..., 3] = 255
    np.testing.assert_array_equal(resized(image, (20, 30)), resized(opaque, (20, 30)))


def test_two_dimensions_mean_one_channel(level: str):
    image = noise((40, 50), 1)
    np.testing.assert_array_equal(resized(image[..., 0], (20, 30)), pillow(image, (20, 30)))


VIEWS = {
    "column slice": lambda image: image[:, 7:61],
    "row slice": lambda image: image[5:44],
    "both ends cut": lambda image: image[3:-3, 11:-2],
    "every third row": lambda image: image[::3],
    "upside down": lambda image: image[::-1],
    "last row only": lambda image: image[-1:, -9:],
    "every second column": lambda image: image[:, ::2],
    "mirrored": lambda image: image[:, ::-1],
    "channels reversed": lambda image: image[..., ::-1],
    "one row repeated": lambda image: np.broadcast_to(image[:1], image.shape),
    "transposed": lambda image: image.transpose(1, 0, 2),
}


@pytest.mark.parametrize("to", [(17, 23), (60, 90)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_reads_views(level: str, view: Any, channels: int, to: tuple[int, int]):
    image = view(noise((50, 64), channels))
    np.testing.assert_array_equal(resized(image, to), pillow(np.ascontiguousarray(image), to))


def test_reads_nothing_after_the_last_row(level: str):
    # The array ends where an unreadable page begins.
    code = """
import ctypes, mmap, sys
import numpy as np
from fastad import _native
_native._ext.set_simd_level(sys.argv[1])
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 9 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 8 * page), page, 0) == 0
for channels in (1, 3, 4):
    for width in (1, 5, 16, 33, 100):
        size = 50 * width * channels
        pixels = np.frombuffer(memory, np.uint8, size, 8 * page - size)
        image = pixels.reshape(50, width, channels)
        for to in ((20, 9), (90, 120)):
            _native.resize_into([image], np.empty((1, *to, 3), np.uint8))
"""
    subprocess.run([sys.executable, "-c", code, level], check=True, timeout=240)


def test_writes_nothing_around_its_rows(level: str):
    memory = np.full((5, 30, 31, 3), 77, np.uint8)
    _native.resize_into([noise((50, 60), 3)] * 3, memory[1:4])
    assert (memory[[0, 4]] == 77).all()


@pytest.mark.usefixtures("two_threads")
def test_batch_of_mixed_images(level: str):
    shapes = [((480, 640), 3), ((31, 7), 1), ((224, 224), 4), ((1, 1), 3), ((600, 100), 1)]
    images = [noise(size, channels, i) for i, (size, channels) in enumerate(shapes)]
    boxes = [None, (0.5, 1.5, 6.5, 30.0), None, None, (0.0, 100.25, 99.0, 580.0)]
    out = np.zeros((5, 224, 224, 3), np.uint8)
    _native.resize_into(images, out, boxes=boxes)
    expected = [pillow(image, (224, 224), box) for image, box in zip(images, boxes, strict=True)]
    np.testing.assert_array_equal(out, np.stack(expected))


def test_empty_batch_is_no_work():
    guarded = np.full((2, 8, 8, 3), 7, np.uint8)
    _native.resize_into([], guarded[1:1])
    assert (guarded == 7).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_thread_count_changes_no_bit(two_threads: None, count: int):
    _native.set_threads(count)
    assert _native.threads() == count
    image = noise((720, 960), 3)
    np.testing.assert_array_equal(resized(image, (256, 256)), pillow(image, (256, 256)))


@pytest.mark.usefixtures("two_threads")
def test_eight_threads_at_once_get_their_own_answers():
    images = [noise((300 + 40 * i, 500), 3, i) for i in range(8)]
    expected = [pillow(image, (96, 128)) for image in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal(resized(images[i], (96, 128)), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    _native.set_threads(4)  # while calls are in flight
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_forked_child_makes_its_own_workers_while_the_parent_resizes():
    image = noise((480, 640), 3)
    expected = pillow(image, (224, 224))
    resized(image, (224, 224))  # so that there are workers to lose
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            resized(image, (224, 224))

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        children = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                equal = np.array_equal(resized(image, (224, 224)), expected)
                os._exit(0 if equal and has_workers() else 3)
            children.append(child)
        codes = [exit_code(child) for child in children]
    finally:
        stop.set()
        busy.join()
    assert codes == [0] * 5


def has_workers() -> bool:
    """Whether this process has more threads than the one that forked; True where unknown."""
    tasks = Path("/proc/self/task")
    return not tasks.exists() or len(list(tasks.iterdir())) > 1


def exit_code(child: int, limit_s: float = 60.0) -> int:
    """Exit code of a forked child; 9 after ending one that hangs."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 9


def test_simd_levels_start_with_portable_code_and_end_with_the_default():
    code = "from fastad._native import _ext; print(_ext.simd_level())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert LEVELS[0] == "scalar"
    assert done.stdout.strip() == LEVELS[-1]


def test_rejects_unknown_simd_level():
    with pytest.raises(ValueError, match="no level mmx"):
        _ext.set_simd_level("mmx")


IMAGE = np.zeros((40, 50, 3), np.uint8)
OUT = np.zeros((1, 8, 9, 3), np.uint8)
READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False
REFUSALS = {
    "float image": ([IMAGE / 255.0], OUT, None, r"images\[0\]: expected uint8 .* got float64"),
    "not an array": ([[[1]]], OUT, None, r"images\[0\]: expected uint8 .* got list"),
    "1-D image": ([IMAGE[0, :, 0]], OUT, None, r"images\[0\]: expected uint8 \[H, W\]"),
    "two channels": ([IMAGE[..., :2]], OUT, None, r"1, 3 or 4 channels last"),
    "channels first": ([IMAGE.transpose(2, 0, 1)], OUT, None, r"needs transpose\(1, 2, 0\)"),
    "empty image": ([IMAGE[:0]], OUT, None, r"images\[0\]: expected sides of 1"),
    "count": ([IMAGE, IMAGE], OUT, None, r"images: expected 1, one per row of out, got 2"),
    "float out": ([IMAGE], OUT.astype(np.float32), None, r"out: expected uint8 .* got float32"),
    "gray out": ([IMAGE], OUT[..., :1], None, r"out: expected uint8 \[B, H, W, 3\]"),
    "empty out": ([IMAGE], OUT[:, :0], None, r"out: expected sides of 1"),
    "strided out": ([IMAGE], OUT[:, :, ::2], None, r"out: expected a C-contiguous"),
    "read-only out": ([IMAGE], READ_ONLY, None, r"out: expected a C-contiguous, writable"),
    "shared memory": ([OUT[0]], OUT, None, r"images\[0\]: expected memory apart from out"),
    "box count": ([IMAGE], OUT, [], r"boxes: expected 1, one per image, got 0"),
    "box length": ([IMAGE], OUT, [(0, 0, 5)], r"boxes\[0\]: expected \(x0, y0, x1, y1\)"),
    "box outside": ([IMAGE], OUT, [(0, 0, 50.1, 40)], r"x1 <= 50 .* clip it"),
    "box negative": ([IMAGE], OUT, [(-0.1, 0, 5, 5)], r"boxes\[0\]: expected 0 <= x0"),
    "box empty": ([IMAGE], OUT, [(5, 5, 5, 9)], r"boxes\[0\]: expected 0 <= x0 < x1"),
    "box NaN": ([IMAGE], OUT, [(0, 0, float("nan"), 5)], r"boxes\[0\]: expected 0 <= x0"),
}


@pytest.mark.parametrize(
    ("images", "out", "boxes", "message"), REFUSALS.values(), ids=REFUSALS.keys()
)
def test_rejects(images: Any, out: Any, boxes: Any, message: str):
    with pytest.raises(InputError, match=message):
        _native.resize_into(images, out, boxes=boxes)


@pytest.mark.parametrize("count", [0, -1, 257, 1.5, "2"])
def test_rejects_thread_counts(count: Any):
    with pytest.raises(InputError, match="count: expected an integer from 1 to 256"):
        _native.set_threads(count)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("ModuleNotFoundError(name='fastad._ext')", "EngineError"),
        ("ImportError('undefined symbol')", "ImportError"),
        ("ModuleNotFoundError(name='other')", "ModuleNotFoundError"),
    ],
    ids=["absent", "does not load", "needs something absent"],
)
def test_import_tells_absent_from_broken(failure: str, expected: str):
    code = f"""
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fastad._ext":
            raise {failure}
sys.meta_path.insert(0, Finder())
try:
    import fastad._native
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == expected
