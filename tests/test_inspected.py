"""Regions of interest and parts to ignore: what they leave of score, map and mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import fake_predictor
from numpy.typing import NDArray
from PIL import Image
from textures import H, Outcome, Textures, W

from fastad.errors import InputError, UnsupportedError
from fastad.inspected import Inspected, at_map, peak_and_share
from fastad.models import build
from fastad.prediction import Prediction
from fastad.predictor import Predictor

Mask = NDArray[np.bool_]
TINY = {"name": "mobilenetv3_small_050", "taps": [0, 1, 2]}


def one(found: Prediction | list[Prediction]) -> Prediction:
    assert isinstance(found, Prediction)
    return found


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def box_mask(size: tuple[int, int], x0: int, y0: int, x1: int, y1: int) -> Mask:
    mask = np.zeros(size, np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def rule(anomaly_map: NDArray[Any], counted: Mask, window: tuple[int, int]) -> float:
    """The documented rule, one window after the other in float64."""
    h, w = window
    sums, counts = [], []
    for y in range(anomaly_map.shape[0] - h + 1):
        for x in range(anomaly_map.shape[1] - w + 1):
            part = np.s_[y : y + h, x : x + w]
            sums.append(anomaly_map[part].astype(np.float64)[counted[part]].sum())
            counts.append(counted[part].sum())
    return float(max(sums) / max(counts))


WINDOWS = [(1, 1), (8, 8), (5, 12), (24, 32)]  # the last one is the whole map
AREAS = {
    "wide": box_mask((24, 32), 3, 2, 25, 20),
    "narrow": box_mask((24, 32), 10, 0, 13, 24),
    "two parts": box_mask((24, 32), 0, 0, 9, 9) | box_mask((24, 32), 20, 20, 32, 24),
    "all but one": ~box_mask((24, 32), 5, 5, 6, 6),
}


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_score_is_the_methods_rule_on_what_counts(window: tuple[int, int], area: str) -> None:
    predictor, _ = fake_predictor((24, 32), window)
    image = picture(24, 32)
    found = one(predictor.predict(image, region=AREAS[area]))
    expected = rule(image[..., 0], AREAS[area], window)
    # Whole numbers below 2^53 add up without rounding; a mean and a share are divided apart.
    assert found.raw_score == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_map_beyond_what_counts_cannot_change_the_score(window: tuple[int, int]) -> None:
    """Of the map, which the fake makes pixel by pixel: a network sees the whole image."""
    predictor, _ = fake_predictor((24, 32), window)
    image = picture(24, 32)
    changed = image.copy()
    changed[~AREAS["wide"]] = 255
    scores = {one(predictor.predict(i, region=AREAS["wide"])).raw_score for i in (image, changed)}
    assert len(scores) == 1


@pytest.mark.parametrize("tile", [None, 24])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_region_that_holds_a_window_never_raises_the_score(
    window: tuple[int, int], tile: int | None
) -> None:
    predictor, _ = fake_predictor((24, 32), window)
    image = picture(48, 64)
    mask = box_mask((48, 64), 0, 0, 64, 47)
    if window == (24, 32):
        mask = box_mask((48, 64), 0, 0, 64, 48)
    whole = one(predictor.predict(image, tile=tile)).raw_score
    # The fake's own score went through float32.
    assert one(predictor.predict(image, region=mask, tile=tile)).raw_score <= whole * (1 + 1e-6)


@pytest.mark.parametrize("tile", [None, (24, 32), (40, 40)])
@pytest.mark.parametrize("form", ["mask", "box", "polygon", "empty ignore"])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_whole_image_as_region_changes_no_bit(
    window: tuple[int, int], form: str, tile: tuple[int, int] | None
) -> None:
    predictor, _ = fake_predictor((24, 32), window)
    image = picture(50, 70)
    areas: dict[str, Any] = {
        "mask": {"region": np.ones((50, 70), np.bool_)},
        "box": {"region": [(0, 0, 70, 50)]},
        "polygon": {"region": [[(0, 0), (70, 0), (70, 50), (0, 50)]]},
        "empty ignore": {"ignore": np.zeros((50, 70), np.bool_)},
    }
    plain = one(predictor.predict(image, tile=tile))
    found = one(predictor.predict(image, tile=tile, **areas[form]))
    assert found.raw_score == plain.raw_score
    np.testing.assert_array_equal(found.model_map, plain.model_map)
    np.testing.assert_array_equal(found.anomaly_map, plain.anomaly_map)
    assert found.counted is None


def test_map_mask_and_regions_are_those_of_what_counts() -> None:
    predictor, _ = fake_predictor((24, 32))
    image = np.full((48, 64, 3), 10, np.uint8)
    image[10:20, 10:20] = image[30:40, 40:50] = 200
    counted = box_mask((48, 64), 0, 0, 45, 48)
    plain = one(predictor.predict(image))
    found = one(predictor.predict(image, region=counted))
    np.testing.assert_array_equal(found.anomaly_map, np.where(counted, plain.anomaly_map, 0))
    np.testing.assert_array_equal(found.mask_at(100.0), plain.mask_at(100.0) & counted)
    assert not found.mask_at(-1.0)[~counted].any()
    found._map_scale = (0.0, 200.0)
    assert sorted(region.box[:3] for region in found.regions) == [(10, 10, 20), (40, 30, 45)]
    # Colours span what counts: all of it else would be the low end.
    assert found.plot(per_image_scale=True).shape == (48, 64, 3)
    np.testing.assert_array_equal(found.plot(per_image_scale=True)[:, 45:], image[:, 45:])


@pytest.mark.parametrize("window", [(8, 8), (5, 12)])
def test_a_sliver_of_a_tile_does_not_weigh_as_a_window(window: tuple[int, int]) -> None:
    """The share is one of the image: a tile that shows a corner of the region has no own."""
    predictor, runtime = fake_predictor((24, 32), window)
    image, counted = picture(48, 64), box_mask((48, 64), 0, 0, 33, 48)
    found = one(predictor.predict(image, tile=(24, 32), overlap=0, region=counted))
    tiles = [(y, x) for y in (0, 24) for x in (0, 32)]
    assert sum(runtime.counts) == len(tiles)
    parts = [
        peak_and_share(
            image[y : y + 24, x : x + 32, 0].astype(np.float32),
            counted[y : y + 24, x : x + 32],
            window,
        )
        for y, x in tiles
    ]
    assert {share for _, share in parts} == {1.0, 1 / window[1]}
    assert found.raw_score == pytest.approx(max(peak for peak, _ in parts), rel=1e-6)


def test_ignore_takes_from_the_region() -> None:
    predictor, _ = fake_predictor((24, 32))
    image = picture(24, 32)
    counted = box_mask((24, 32), 2, 2, 30, 20) & ~box_mask((24, 32), 10, 10, 20, 20)
    found = one(predictor.predict(image, region=[(2, 2, 30, 20)], ignore=[(10, 10, 20, 20)]))
    assert found.counted is not None
    np.testing.assert_array_equal(found.counted, counted)


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_mask_image_counts_where_it_is_not_black(tmp_path: Path, mode: str) -> None:
    counted = box_mask((24, 32), 4, 5, 20, 21)
    path = tmp_path / "mask.png"
    Image.fromarray(counted.astype(np.uint8) * 255).convert(mode).save(path)
    pixels = Inspected(path, None).pixels((24, 32), "image")
    assert pixels is not None
    np.testing.assert_array_equal(pixels, counted)


@pytest.mark.parametrize(
    "corners",
    [
        [(2, 3), (28, 3), (28, 20), (2, 20)],
        [(1.2, 1.7), (30.1, 9.4), (12.6, 22.8)],
        [(0, 0), (31.7, 23.9), (31.7, 0), (0, 23.9)],  # crosses itself
        [(4, 4), (28, 4), (28, 20), (16, 8), (4, 20)],
    ],
)
def test_a_polygon_counts_the_pixel_centres_it_encloses(corners: list[tuple[float, float]]) -> None:
    expected = np.zeros((24, 32), np.bool_)
    for y, x in np.ndindex(24, 32):
        crossings = 0
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                crossings += x0 + (y + 0.5 - y0) * (x1 - x0) / (y1 - y0) <= x + 0.5
        expected[y, x] = crossings % 2
    assert 0 < expected.sum() < expected.size
    pixels = Inspected([corners], None).pixels((24, 32), "image")
    assert pixels is not None
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("scale", [(2, 2), (3, 5)])
def test_a_pixel_of_the_map_counts_if_half_its_area_does(scale: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).random((24 * scale[0], 32 * scale[1])) < 0.5
    share = pixels.reshape(24, scale[0], 32, scale[1]).mean((1, 3))
    np.testing.assert_array_equal(at_map(pixels, (24, 32)), share >= 0.5)


def test_images_of_other_sizes_take_shapes_again() -> None:
    predictor, _ = fake_predictor((24, 32))
    sizes = [(24, 32), (48, 64), (24, 32), (100, 90)]
    found = predictor.predict([picture(*size) for size in sizes], region=[(0, 0, 20, 10)])
    assert isinstance(found, list)
    for size, prediction in zip(sizes, found, strict=True):
        assert prediction.counted is not None
        np.testing.assert_array_equal(prediction.counted, box_mask(size, 0, 0, 20, 10))


def test_the_callers_mask_may_change_afterwards() -> None:
    predictor, _ = fake_predictor((24, 32))
    mask = box_mask((24, 32), 2, 2, 30, 20)
    running = predictor.iterate([picture(24, 32)], region=mask)
    mask[:] = False
    (found,) = running
    assert found.counted is not None
    assert found.counted.sum() == 28 * 18
    assert mask.flags.writeable  # only the result's is not


@pytest.mark.parametrize("tile", [None, (24, 32)])
def test_a_result_cannot_change_what_counts_of_later_ones(tile: tuple[int, int] | None) -> None:
    predictor, _ = fake_predictor((24, 32))
    images = [np.full((48, 64, 3), 9, np.uint8)] * 3
    region = [(32, 0, 64, 48)]
    first, *later = predictor.iterate(images, region=region, tile=tile, overlap=0)
    assert first.counted is not None
    with pytest.raises(ValueError, match="read-only"):
        first.counted[:] = False
    assert [result.anomaly_map.max() for result in later] == [9.0, 9.0]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"region": np.ones((24, 32), np.uint8)}, r"region: expected a bool mask .* uint8 .* mask > 0"),
    ({"region": np.ones((24, 32, 1), np.bool_)}, r"region: expected a bool mask \[H, W\]"),
    ({"ignore": "no.png"}, r"no\.png"),
    ({"region": []}, r"region: expected a bool mask .* got \[\]"),
    ({"region": 3}, "region: expected .* got 3"),
    ({"region": (1, 2, 3, 4)}, r"region\[0\]: expected a box .* got 1"),
    ({"ignore": [(5, 5, 5, 9)]}, r"ignore\[0\]: expected a box .* x0 < x1"),
    ({"region": [(0, 0, 9.5, 9)]}, r"region\[0\]: expected a box .* whole pixels"),
    ({"region": [(0, 0, float("inf"), 9)]}, r"region\[0\]: expected a box"),
    ({"region": [(0, 0, 4, 4), [(0, 0), (4, 4)]]}, r"region\[1\]: .* at least three \(x, y\)"),
    ({"region": [[(0, 0), (4, 4), (0, float("nan"))]]}, r"region\[0\]: expected"),
]


@pytest.mark.parametrize("method", ["predict", "iterate", "stream"])
@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refuses_areas_at_the_call(method: str, arguments: dict[str, Any], message: str) -> None:
    predictor, runtime = fake_predictor((24, 32))
    with pytest.raises(InputError, match=message):
        getattr(predictor, method)([picture(24, 32)], **arguments)
    assert runtime.counts == []


MISFITS: list[tuple[dict[str, Any], str]] = [
    (
        {"region": np.ones((32, 24), np.bool_)},
        r"region: expected a mask of the size of image, \[24, 32\] \(H, W\), got \[32, 24\]",
    ),
    ({"region": [(0, 0, 33, 10)]}, r"region\[0\]: spans x 0\.\.33 .* beyond image of \[24, 32\]"),
    ({"ignore": [[(-1, 0), (9, 0), (9, 9)]]}, r"ignore\[0\]: spans x -1\.\.9"),
    ({"region": np.zeros((24, 32), np.bool_)}, r"nothing of image, \[24, 32\] \(H, W\), counts"),
    ({"ignore": [(0, 0, 32, 24)]}, "nothing of image"),
    ({"region": [(0, 0, 9, 9)], "ignore": [(0, 0, 10, 10)]}, "nothing of image"),
    ({"region": [[(3.6, 3.6), (3.9, 3.6), (3.9, 3.9)]]}, "nothing of image"),  # holds no centre
]


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize(("arguments", "message"), MISFITS)
def test_refuses_areas_that_do_not_fit_before_the_graph_runs(
    arguments: dict[str, Any], message: str, tile: int | None
) -> None:
    predictor, runtime = fake_predictor((24, 32))
    with pytest.raises(InputError, match=message):
        predictor.predict(picture(24, 32), tile=tile, **arguments)
    assert runtime.counts == []


@pytest.mark.parametrize("tile", [None, 480])
def test_refuses_what_the_map_is_too_coarse_for(tile: int | None) -> None:
    predictor, runtime = fake_predictor((24, 32))
    image, line = np.zeros((960, 1280, 3), np.uint8), [(100, 0, 103, 960)]
    with pytest.raises(InputError, match=r"half of no pixel .* \[24, 32\].* smaller tile"):
        predictor.predict(image, region=line, tile=tile)
    assert runtime.counts == []
    assert one(predictor.predict(image, region=line, tile=(24, 32))).raw_score == 0.0


def test_refuses_engines_that_do_not_record_their_rule() -> None:
    predictor, runtime = fake_predictor((24, 32), window=None)
    with pytest.raises(UnsupportedError, match=r"did not record its score rule.* export it again"):
        predictor.predict(picture(24, 32), region=[(0, 0, 9, 9)])
    assert runtime.counts == []
    predictor.predict(picture(24, 32))
    predictor.predict(picture(64, 64), tile=32)


CONFIGS: dict[str, dict[str, Any]] = {
    "grad": {"backbone": TINY, "size": [64, 96], "fusion": "crad-s", "blocks": 1},
    "uniad": {
        **{"backbone": TINY, "size": [64, 96], "width": 16, "heads": 2, "ffn_width": 16},
        **{"encoder_layers": 1, "decoder_layers": 1, "window": [3, 3]},
    },
    "rd4ad": {
        **{"backbone": TINY, "size": [64, 96], "decoder_depths": [1, 1, 1]},
        **{"bottleneck_depth": 1},
    },
    "intra": {
        **{"size": [64, 96], "patch_px": 16, "window": 3, "width": 16, "heads": 2, "blocks": 1},
        **{"pools": [1, 2], "blur_px": 5, "quarter_turns": False},
    },
}
CONFIGS["uniad mean"] = {**CONFIGS["uniad"], "image_score": "mean"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_window_of_a_method_is_its_score_rule(name: str) -> None:
    """And methods take sizes that are not square."""
    torch.manual_seed(0)
    weights = {} if name == "intra" else {"weights": "random"}
    method = build(name.split()[0], CONFIGS[name], **weights).eval()
    image = torch.rand(2, 3, 64, 96)
    if hasattr(method, "adapt"):
        method.adapt(method.features(image))
    with torch.no_grad():
        maps, scores = method(image)
    assert maps.shape == (2, 64, 96)
    window = method.spec.score_window
    assert window is not None
    for anomaly_map, score in zip(maps.numpy(), scores.tolist(), strict=True):
        peak, share = peak_and_share(anomaly_map, np.ones((64, 96), np.bool_), window)
        assert share == 1.0
        # Matrix products in float32 sum in another order than the means.
        assert score == pytest.approx(peak, rel=1e-5)


def test_a_trained_engine_ignores_what_it_is_told_to(
    predictor: Predictor, textures: Textures
) -> None:
    path = textures.root / "grain" / "test" / "hole" / "00.png"
    defect = np.array(Image.open(textures.root / "grain/ground_truth/hole/00_mask.png")) > 0
    ys, xs = np.nonzero(defect)
    margin_px = 12
    box = (
        max(0, int(xs.min()) - margin_px),
        max(0, int(ys.min()) - margin_px),
        min(W, int(xs.max()) + 1 + margin_px),
        min(H, int(ys.max()) + 1 + margin_px),
    )
    plain = one(predictor.predict(path))
    around = one(predictor.predict(path, ignore=[box]))
    only = one(predictor.predict(path, region=[box]))
    assert around.raw_score < plain.raw_score
    # A part of an image is another sum of float32, and no window outside it counts.
    assert only.raw_score >= around.raw_score


def test_the_command_line_takes_tiles_and_areas(
    texture_engine: Path,
    predictor: Predictor,
    textures: Textures,
    tmp_path: Path,
    cli: Callable[..., Outcome],
) -> None:
    image, mask = textures.images()[0], tmp_path / "mask.png"
    counted = box_mask((H, W), 20, 10, 70, 50)
    Image.fromarray(counted.astype(np.uint8) * 255).save(mask)
    asked = ("--tile", "64x48", "--overlap", "0.5", "--region", mask, "--threshold", "1")
    done = cli("predict", texture_engine, image, *asked, "--device", "cpu", "--precision", "fp32")
    assert done.code == 0, done.err
    expected = predictor.predict(image, tile=(64, 48), overlap=0.5, region=counted, threshold=1.0)
    # Other threads, and perhaps another precision than the fixture's.
    assert json.loads(done.out)["raw_score"] == pytest.approx(one(expected).raw_score, rel=0.05)
    assert json.loads(cli("predict", texture_engine, image).out)["raw_score"] != pytest.approx(
        one(expected).raw_score, rel=1e-3
    )


@pytest.mark.parametrize("tile", ["64x", "64 x 64", "1x2x3", "-5", "big"])
def test_the_command_line_refuses_tiles_it_cannot_read(
    tile: str, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("predict", tmp_path / "no.engine", tmp_path, f"--tile={tile}")
    assert done.code == 1
    assert "--tile: expected pixels such as 512" in done.err
