"""The result: what each field means, made only when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from textures import H, Textures, W

from fastad.errors import EngineError, InputError
from fastad.prediction import Prediction, save_image
from fastad.predictor import Predictor
from fastad.preprocess import Source, collect

SCALE = (1.0, 5.0)  # masks start above its middle, 3


def prediction(model_map: NDArray[np.float32], image: object = None, **changes: Any) -> Prediction:
    """A result over an image of the map's size, unless another is given."""
    if image is None:
        image = np.full((*model_map.shape, 3), 100, np.uint8)
    source: Source = collect(image, changes.pop("color", "rgb"))[0][0]
    settings: dict[str, Any] = {
        "raw_score": 2.5,
        "pred_score": 0.75,
        "threshold": 2.0,
        "category": None,
        "map_scale": SCALE,
        "speed": {"decode": 0.0, "preprocess": 1.0, "inference": 2.0, "postprocess": 0.25},
    }
    shape = source.frame().size
    return Prediction(source=source, orig_shape=shape, model_map=model_map, **(settings | changes))


@pytest.fixture
def two_defects() -> NDArray[np.float32]:
    """Map [10, 12]: a weak 2 x 3 defect and a strong diagonal of two pixels."""
    values = np.ones((10, 12), np.float32)
    values[1:3, 2:5] = 3.5
    values[6, 8], values[7, 9] = 4.0, 9.0
    return values


def test_maps_of_model_size_are_the_graphs_own(two_defects: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(prediction(two_defects).anomaly_map, two_defects)


def test_maps_have_the_size_of_the_original_image(two_defects: NDArray[np.float32]) -> None:
    found = prediction(two_defects, np.zeros((30, 24, 3), np.uint8))
    assert (found.anomaly_map.shape, found.anomaly_map.dtype) == ((30, 24), np.float32)
    # Bilinear: nothing above or below what the graph said, and its own mean on average.
    assert found.anomaly_map.min() == 1.0
    assert found.anomaly_map.max() <= 9.0
    assert found.anomaly_map.mean() == pytest.approx(two_defects.mean(), rel=0.02)


def test_mask_is_the_upper_half_of_the_scale(two_defects: NDArray[np.float32]) -> None:
    two_defects[0, 0] = 3.0  # exactly the middle is normal
    found = prediction(two_defects)
    assert found.pred_mask.dtype == np.bool_
    np.testing.assert_array_equal(found.pred_mask, two_defects > 3.0)
    np.testing.assert_array_equal(found.mask_at(3.9), two_defects > 3.9)


def test_regions_are_connected_defects_strongest_first(two_defects: NDArray[np.float32]) -> None:
    strong, weak = prediction(two_defects).regions
    assert (strong.box, strong.area_px, strong.peak, strong.mean) == ((8, 6, 10, 8), 2, 9.0, 6.5)
    assert (weak.box, weak.area_px, weak.peak, weak.mean) == ((2, 1, 5, 3), 6, 3.5, 3.5)


def test_nothing_of_image_size_is_made_before_it_is_asked_for(
    two_defects: NDArray[np.float32],
) -> None:
    found = prediction(two_defects)
    assert not {"anomaly_map", "pred_mask", "regions"} & set(vars(found))
    assert found.anomaly_map is found.anomaly_map
    assert "pred_mask" not in vars(found)


@pytest.mark.parametrize(("raw", "label"), [(1.9, False), (2.0, False), (2.1, True)])
def test_label_is_above_the_threshold(
    two_defects: NDArray[np.float32], raw: float, label: bool
) -> None:
    assert prediction(two_defects, raw_score=raw).pred_label is label


def test_to_dict_is_plain_json(two_defects: NDArray[np.float32]) -> None:
    assert prediction(two_defects, category="grain").to_dict() == {
        "path": None,
        "category": "grain",
        "raw_score": 2.5,
        "pred_score": 0.75,
        "threshold": 2.0,
        "pred_label": True,
        "orig_shape": [10, 12],
        "regions": [
            {"box": [8, 6, 10, 8], "area_px": 2, "peak": 9.0, "mean": 6.5},
            {"box": [2, 1, 5, 3], "area_px": 6, "peak": 3.5, "mean": 3.5},
        ],
        "speed": {"decode": 0.0, "preprocess": 1.0, "inference": 2.0, "postprocess": 0.25},
    }


def test_to_json_is_one_line_of_to_dict(predictor: Predictor, textures: Textures) -> None:
    path = textures.images()[0]
    found = predictor.predict(path, category="grain")
    assert isinstance(found, Prediction)
    assert "\n" not in found.to_json()
    read = json.loads(found.to_json())
    assert read == found.to_dict()
    assert (read["path"], read["orig_shape"]) == (str(path), [H, W])


def test_a_painted_defect_is_found_where_it_is(predictor: Predictor, textures: Textures) -> None:
    """The road of sizes: model map, original map, mask and boxes speak of the same place."""
    frame = np.array(Image.open(textures.root / "grain" / "test" / "good" / "00.png"))
    frame[20:60, 50:90] = 0
    found = predictor.predict(frame, category="grain")
    assert isinstance(found, Prediction)
    y, x = np.unravel_index(int(found.anomaly_map.argmax()), found.anomaly_map.shape)
    assert 20 <= y < 60
    assert 50 <= x < 90


def test_uncalibrated_results_say_what_is_missing(two_defects: NDArray[np.float32]) -> None:
    found = prediction(two_defects, threshold=None, pred_score=None, map_scale=None)
    assert found.pred_label is None
    with pytest.raises(InputError, match=r"fastad calibrate.*mask_at\(value\)"):
        _ = found.pred_mask
    assert found.to_dict()["regions"] is None
    assert found.mask_at(3.0).sum() == 8
    assert found.plot().shape == (10, 12, 3)
    assert "no threshold" in repr(found)


COLORS = {
    "rgb": lambda rgb: rgb,
    "bgr": lambda rgb: rgb[..., ::-1],
    "bgr with alpha": lambda rgb: np.dstack([rgb[..., ::-1], rgb[..., 0]]),
    "float": lambda rgb: rgb / 255,
    "pil": Image.fromarray,
}


@pytest.mark.parametrize("form", COLORS)
def test_plot_shows_the_image_in_its_colors(form: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    cold = np.ones((10, 12), np.float32)  # the low end of the scale: nothing is painted over
    color = "bgr" if form.startswith("bgr") else "rgb"
    found = prediction(cold, COLORS[form](rgb), color=color)
    np.testing.assert_array_equal(found.orig_img, rgb)
    np.testing.assert_array_equal(found.plot(), rgb)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_drawing_on_the_original_cannot_change_the_callers_frame(color: str) -> None:
    frame = np.zeros((10, 12, 3), np.uint8)
    found = prediction(np.ones((10, 12), np.float32), frame, color=color)
    with pytest.raises(ValueError, match="read-only"):
        found.orig_img[:] = 7
    frame[:] = 7  # it stays the caller's


def test_plot_of_a_gray_image_is_rgb() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (10, 12), np.uint8)
    found = prediction(np.ones((10, 12), np.float32), gray)
    np.testing.assert_array_equal(found.plot(), np.repeat(gray[..., None], 3, axis=2))


def test_colors_span_the_calibrated_scale_unless_asked_otherwise(
    two_defects: NDArray[np.float32],
) -> None:
    faint = (two_defects - 1) / 100 + 1
    assert (prediction(faint).plot() == 100).mean() > 0.9
    stretched = prediction(faint).plot(per_image_scale=True)
    assert tuple(stretched[7, 9]) != (100, 100, 100)


def test_plot_outlines_the_mask(two_defects: NDArray[np.float32]) -> None:
    plot = prediction(two_defects).plot()
    assert tuple(plot[1, 2]) == (255, 0, 255)
    assert tuple(plot[0, 0]) == (100, 100, 100)


def test_plot_leaves_the_callers_array_alone(two_defects: NDArray[np.float32]) -> None:
    frame = np.full((10, 12, 3), 100, np.uint8)
    prediction(two_defects, frame).plot()
    assert (frame == 100).all()


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "new/folder/a.bmp"])
def test_save_writes_the_plot(two_defects: NDArray[np.float32], tmp_path: Path, name: str) -> None:
    found = prediction(two_defects)
    assert found.save(tmp_path / name) == tmp_path / name
    read = np.array(Image.open(tmp_path / name))
    assert read.shape == (10, 12, 3)
    if not name.endswith("JPG"):
        np.testing.assert_array_equal(read, found.plot())
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


@pytest.mark.parametrize("name", ["a", "a.txt", ".png", "a.npy"])
def test_save_refuses_names_of_no_image_format(
    two_defects: NDArray[np.float32], tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match=r"ends in \.png, \.jpg"):
        prediction(two_defects).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_leaves_nothing_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"file/a\.png: cannot be written"):
        save_image(np.zeros((4, 4), np.uint8), tmp_path / "file" / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_changed_or_went_is_named(
    two_defects: NDArray[np.float32], tmp_path: Path
) -> None:
    path = tmp_path / "frame.png"
    Image.new("RGB", (12, 10)).save(path)
    found = prediction(two_defects, path)
    Image.new("RGB", (20, 20)).save(path)
    with pytest.raises(InputError, match=r"frame\.png: was \[10, 12\] .* is \[20, 20\] now"):
        found.plot()
    path.unlink()
    with pytest.raises(InputError, match=r"frame\.png"):
        found.plot()
    assert found.anomaly_map.shape == (10, 12)
