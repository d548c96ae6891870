"""Tiles: where they lie, how their maps join, what they cost."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from fake_engine import CALIBRATION, fake_predictor
from numpy.typing import NDArray

from fastad import _native
from fastad.errors import FastadWarning, InputError
from fastad.predictor import BATCH, Prediction, Predictor
from fastad.tiling import Cut, Tiling, check_tiling, cut


def one(found: Prediction | list[Prediction]) -> Prediction:
    assert isinstance(found, Prediction)
    return found


def picture(H: int, W: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def lay(size: tuple[int, int], model: tuple[int, int], tile: int, overlap: float = 0.25) -> Cut:
    return cut(size, model, Tiling((tile, tile), overlap), None, "image")


def reference(maps: list[NDArray[np.float32]], into: Cut) -> NDArray[np.float64]:
    """The weighted mean, pixel by pixel, in float64."""
    total, weights = np.zeros(into.map_size), np.zeros(into.map_size)
    for model_map, tile in zip(maps, into.tiles(), strict=True):
        rows, columns = tile.place
        h, w = rows.stop - rows.start, columns.stop - columns.start
        for y in range(h):
            for x in range(w):
                weight = min(y + 0.5, h - y - 0.5) * min(x + 0.5, w - x - 0.5)
                total[rows.start + y, columns.start + x] += weight * float(model_map[y, x])
                weights[rows.start + y, columns.start + x] += weight
    return total / weights


LAYOUTS = [  # image (H, W), model (H, W), tile (H, W), overlap
    ((100, 140), (32, 32), (32, 32), 0.25),  # full resolution
    ((100, 140), (32, 32), (64, 64), 0.5),  # tiles shrink
    ((50, 90), (32, 48), (20, 30), 0.0),  # tiles grow, nothing shared
    ((20, 200), (32, 32), (40, 40), 0.3),  # lower than a tile
    ((67, 71), (32, 32), (66, 64), 0.9),  # hardly larger than a tile
]


@pytest.mark.parametrize(("size", "model", "tile", "overlap"), LAYOUTS)
def test_every_pixel_is_seen_and_weights_sum_to_one(
    size: tuple[int, int], model: tuple[int, int], tile: tuple[int, int], overlap: float
) -> None:
    into = cut(size, model, Tiling(tile, overlap), None, "image")
    seen = np.zeros(size, np.bool_)
    weights = np.zeros(into.map_size)
    for each in into.tiles():
        assert [part.stop - part.start for part in each.pixels] == [
            min(n, t) for n, t in zip(size, tile, strict=True)
        ]
        assert all(part.start >= 0 for part in each.pixels)
        seen[each.pixels] = True
        weights[each.place] += each.rows * each.columns
    assert seen.all()
    np.testing.assert_allclose(weights, 1.0, rtol=0, atol=1e-6)  # a few float32 ulp of 1
    assert all(n <= side for n, side in zip(into.map_size, size, strict=True))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("tile", [16, 50, 64, 100])
def test_neighbours_share_what_was_asked_for(tile: int, overlap: float) -> None:
    into = lay((64, 333), (32, 32), tile, overlap)
    columns = sorted({each.pixels[1].start for each in into.tiles()})
    map_pixel_px = max(1.0, tile / 32)
    for left, right in itertools.pairwise(columns):
        assert left + tile - right >= tile * overlap - map_pixel_px
    assert columns[-1] == 333 - tile


@pytest.mark.parametrize(("size", "model", "tile", "overlap"), LAYOUTS)
def test_the_stitched_map_is_the_weighted_mean_of_the_tiles(
    size: tuple[int, int], model: tuple[int, int], tile: tuple[int, int], overlap: float
) -> None:
    predictor, runtime = fake_predictor(model)
    image = picture(*size)
    found = one(predictor.predict(image, tile=tile, overlap=overlap))
    into = cut(size, model, Tiling(tile, overlap), None, "image")
    maps = [m[..., 0].astype(np.float32) for batch in runtime.batches for m in batch]
    first = next(into.tiles())
    shape = (len(first.rows), first.columns.size)
    resized = [_native.resize_map(m, shape) for m in maps]
    # Float32 of some overlapping terms up to 255; the largest difference seen is 5e-5.
    np.testing.assert_allclose(found.model_map, reference(resized, into), rtol=0, atol=2e-4)
    assert found.raw_score == max(float(m.max()) for m in maps)
    assert found.anomaly_map.shape == size


def test_at_full_resolution_the_map_is_that_of_the_pixels() -> None:
    predictor, _ = fake_predictor((32, 32))
    image = picture(100, 140)
    found = one(predictor.predict(image, tile=32))
    np.testing.assert_allclose(found.anomaly_map, image[..., 0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("tile", [20, 32, 45, 64])
def test_a_constant_map_shows_no_seams(tile: int) -> None:
    predictor, _ = fake_predictor((32, 32))
    found = one(predictor.predict(np.full((150, 210, 3), 200, np.uint8), tile=tile))
    np.testing.assert_allclose(found.model_map, 200.0, rtol=1e-6)


def test_tiles_of_shrunk_images_lie_where_the_image_shows_them() -> None:
    """A bright square of a large image is found at its place, to a pixel of the map."""
    predictor, _ = fake_predictor((32, 32))
    image = np.zeros((500, 700, 3), np.uint8)
    image[300:340, 410:470] = 255
    found = one(predictor.predict(image, tile=128))
    ys, xs = np.nonzero(found.mask_at(127.5))
    edges = np.array([ys.min(), ys.max() + 1, xs.min(), xs.max() + 1])
    assert np.abs(edges - [300, 340, 410, 470]).max() <= 4  # 128 / 32 pixels


def test_an_image_that_one_tile_covers_is_seen_as_without_tiles() -> None:
    predictor, runtime = fake_predictor((32, 32))
    image = picture(20, 40)
    tiled, whole = one(predictor.predict(image, tile=40)), one(predictor.predict(image))
    np.testing.assert_array_equal(tiled.model_map, whole.model_map)
    assert tiled.raw_score == whole.raw_score
    np.testing.assert_array_equal(runtime.batches[0], runtime.batches[1])


def test_one_side_means_a_square() -> None:
    assert check_tiling(48, 0.25) == check_tiling((48, 48), 0.25) == Tiling((48, 48), 0.25)
    assert check_tiling(None, 0.25) is None


def test_tiles_run_in_batches() -> None:
    predictor, runtime = fake_predictor((32, 32))
    predictor.predict(np.zeros((32 * 3, 32 * 7, 3), np.uint8), tile=32, overlap=0)
    assert runtime.counts == [BATCH, BATCH, 21 - 2 * BATCH]


def test_tiles_are_views_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, _ = fake_predictor((32, 32))
    image = picture(100, 140)
    given: list[NDArray[np.uint8]] = []
    resize_into = _native.resize_into

    def spy(images: list[NDArray[np.uint8]], *others: Any, **named: Any) -> None:
        given.extend(images)
        resize_into(images, *others, **named)

    monkeypatch.setattr(_native, "resize_into", spy)
    predictor.predict(image, tile=32)
    assert len(given) == 24
    assert all(np.shares_memory(pixels, image) for pixels in given)


@pytest.mark.parametrize("tile", [224, 128])
@pytest.mark.parametrize("dotted", [False, True])
def test_a_large_image_takes_one_batch_and_one_map(dotted: bool, tile: int) -> None:
    predictor, _ = fake_predictor((224, 224), keep=False)
    image = np.zeros((3000, 4096, 3), np.uint8)
    ignore = np.zeros((3000, 4096), np.bool_) if dotted else None
    if ignore is not None:
        ignore[::20, ::20] = True  # no tile counts whole
    predictor.predict(image[:300], tile=tile)
    tracemalloc.start()
    try:
        found = one(predictor.predict(image, tile=tile, ignore=ignore))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.model_map.shape == (3000, 4096)
    stitched, tiles = 4 * 3000 * 4096, BATCH * 224 * 224
    masks = 2 * 3000 * 4096 if dotted else 0  # the caller's, copied, and what counts
    # A batch has bytes in and floats out, the ones before are freed as they are replaced; the rest
    # is the weights of a batch and the products of one tile.
    assert peak < stitched + masks + tiles * 2 * (3 + 4) + (3 << 20)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "count"),
    [((512, 512), 16, 0.9, 247_009), ((3000, 4096), 16, 0.5, 191_114)],
)
def test_refuses_more_tiles_than_anybody_waits_for(
    size: tuple[int, int], tile: int, overlap: float, count: int
) -> None:
    predictor, runtime = fake_predictor((32, 32))
    with pytest.raises(InputError, match=rf"takes {count} tiles .* use larger tiles or less over"):
        predictor.predict(np.zeros((*size, 3), np.uint8), tile=tile, overlap=overlap)
    assert runtime.counts == []


def test_tiles_are_made_as_they_run() -> None:
    """Nearly as many as are accepted, and the first costs no memory for the others."""
    tracemalloc.start()
    try:
        tiles = lay((3000, 4096), (224, 224), 16, 0.25).tiles()
        next(tiles)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in tiles) == 250 * 341 - 1
    assert peak < 1 << 20


def test_tiles_are_dropped_as_they_have_run() -> None:
    predictor, runtime = fake_predictor((32, 32), keep=False)
    image = np.zeros((600, 600, 3), np.uint8)
    predictor.predict(image, tile=200)
    runtime.counts.clear()
    tracemalloc.start()
    try:
        predictor.predict(image, tile=16, overlap=0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(runtime.counts) == 74 * 74
    assert peak < 4 * 600 * 600 + (1 << 20)  # held together, the tiles take some 6 MB


@pytest.mark.parametrize("tile", [(24, 32), (48, 64), (20, 20)])
def test_tiles_and_regions_go_together(tile: tuple[int, int]) -> None:
    """Per pixel as without a region, per tile the rule on what counts of it."""
    predictor, runtime = fake_predictor((24, 32))
    image = picture(130, 170)
    counted = np.zeros((130, 170), np.bool_)
    counted[30:71, 40:90] = True
    plain = one(predictor.predict(image, tile=tile))
    all_tiles = sum(runtime.counts)
    found = one(predictor.predict(image, tile=tile, region=counted))
    assert 0 < sum(runtime.counts) - all_tiles < all_tiles
    np.testing.assert_array_equal(found.anomaly_map, np.where(counted, plain.anomaly_map, 0))
    if tile == (24, 32):  # full resolution: each pixel of a tile is a pixel of the image
        assert found.raw_score == float(image[..., 0][counted].max())


EDGES = {  # box (x0, y0, x1, y1) in the middle of 3 x 3 tiles of 96 x 128 pixels; tiles run
    "left and above": ((128, 96, 140, 108), 4),
    "right and below": ((244, 180, 256, 192), 4),
    "one pixel inside": ((129, 97, 255, 191), 9),
    "out of reach": ((140, 108, 244, 180), 1),
}


@pytest.mark.parametrize("name", EDGES)
def test_tiles_beside_a_region_run_as_far_as_their_maps_reach_into_it(name: str) -> None:
    """A map of a quarter of the resolution: bilinear resizing reaches two pixels across edges."""
    predictor, runtime = fake_predictor((24, 32))
    image, (box, count) = picture(288, 384), EDGES[name]
    plain = one(predictor.predict(image, tile=(96, 128), overlap=0))
    before = sum(runtime.counts)
    found = one(predictor.predict(image, tile=(96, 128), overlap=0, region=[box]))
    assert sum(runtime.counts) - before == count
    x0, y0, x1, y1 = box
    expected = np.zeros((288, 384), np.float32)
    expected[y0:y1, x0:x1] = plain.anomaly_map[y0:y1, x0:x1]
    np.testing.assert_array_equal(found.anomaly_map, expected)


def test_at_full_resolution_no_tile_beside_a_region_runs() -> None:
    predictor, runtime = fake_predictor((24, 32))
    image = picture(72, 96)
    found = one(predictor.predict(image, tile=(24, 32), overlap=0, region=[(32, 24, 64, 48)]))
    assert runtime.counts == [1]
    expected = np.zeros((72, 96), np.float32)
    expected[24:48, 32:64] = image[24:48, 32:64, 0]
    np.testing.assert_array_equal(found.anomaly_map, expected)


def test_colors_reach_tiles() -> None:
    predictor, _ = fake_predictor((32, 32))
    image = picture(50, 70)
    found = one(predictor.predict(image[..., ::-1], color="bgr", tile=32))
    expected = one(predictor.predict(image, tile=32))
    np.testing.assert_array_equal(found.model_map, expected.model_map)


@pytest.mark.parametrize("images", [3, 11])
def test_iterating_tiled_images_decodes_one_at_a_time(images: int) -> None:
    predictor, runtime = fake_predictor((32, 32))
    running = predictor.iterate([picture(64, 64, i) for i in range(images)], tile=32, overlap=0)
    next(running)
    assert runtime.counts == [4]
    assert len(list(running)) == images - 1


def test_streams_look_in_tiles() -> None:
    predictor, _ = fake_predictor((32, 32))
    frames = [picture(40, 90, i) for i in range(3)]
    region = [(10, 5, 80, 30)]
    found: list[Any] = list(predictor.stream(frames, tile=32, overlap=0.5, region=region))
    for frame, result in zip(frames, found, strict=True):
        expected = one(predictor.predict(frame, tile=32, overlap=0.5, region=region))
        assert result.prediction.raw_score == expected.raw_score
        np.testing.assert_array_equal(result.prediction.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 8}, "tile: expected .* at least 16, got 8"),
        ({"tile": (64, 0)}, r"tile: expected .* got \(64, 0\)"),
        ({"tile": (64, 64, 3)}, r"tile: expected .* got \(64, 64, 3\)"),
        ({"tile": 64.0}, r"tile: expected .* got 64\.0"),
        ({"tile": True}, "tile: expected .* got True"),
        ({"tile": "64"}, "tile: expected .* got '64'"),
        ({"tile": 64, "overlap": 1.0}, r"overlap: expected a share in 0\.\.0\.9, got 1\.0"),
        ({"tile": 64, "overlap": -0.1}, r"overlap: expected .* got -0\.1"),
        ({"tile": 64, "overlap": float("nan")}, "overlap: expected .* got nan"),
        ({"tile": 64, "overlap": "a half"}, "overlap: expected .* got 'a half'"),
    ],
)
@pytest.mark.parametrize("method", ["predict", "iterate", "stream"])
def test_refuses_tiles_at_the_call(method: str, arguments: dict[str, Any], message: str) -> None:
    predictor, runtime = fake_predictor((32, 32))
    with pytest.raises(InputError, match=message):
        getattr(predictor, method)([picture(40, 40)], **arguments)
    assert runtime.counts == []


def test_warns_that_the_threshold_is_one_of_whole_images() -> None:
    predictor, _ = fake_predictor((32, 32), calibration=CALIBRATION)
    with pytest.warns(FastadWarning, match=r"tile: .* calibrated on whole images.* pass threshold"):
        found = one(predictor.predict(picture(64, 64), tile=32))
    assert found.threshold == CALIBRATION.pooled.value


@pytest.mark.parametrize("arguments", [{"threshold": 3.0}, {"tile": None}])
def test_is_silent_with_an_own_threshold_or_no_tiles(arguments: dict[str, Any]) -> None:
    predictor, _ = fake_predictor((32, 32), calibration=CALIBRATION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(picture(64, 64), **{"tile": 32, **arguments})


def test_a_trained_model_finds_a_small_defect_in_a_large_image(predictor: Predictor) -> None:
    rng = np.random.default_rng(5)
    levels = np.clip(rng.normal(110, 18, (300, 400)), 0, 255)
    image = (levels[..., None] * [1.0, 0.85, 0.7]).astype(np.uint8)
    image[200:220, 310:328] = 0
    found = one(predictor.predict(image, tile=(64, 64), threshold=1.0))
    y, x = np.unravel_index(int(found.anomaly_map.argmax()), found.anomaly_map.shape)
    assert 190 <= y < 230
    assert 300 <= x < 338
