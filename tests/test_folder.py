from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastad.errors import InputError
from fastad.training.folder import Sample, load_images, read_mask, scan, split_holdout

RNG = np.random.default_rng(0)


def save(path: Path, height: int = 8, width: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def save_mask(path: Path, height: int = 8, width: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((height, width), np.uint8)
    mask[2:5, 3:9] = 255
    Image.fromarray(mask).save(path)
    return path


def save_category(folder: Path, train: int = 3) -> None:
    for i in range(train):
        save(folder / f"train/good/{i}.png")
    save(folder / "test/good/000.png")
    save(folder / "test/scratch/000.png")
    save(folder / "test/scratch/001.png")
    save(folder / "test/hole/000.jpg")
    save_mask(folder / "ground_truth/scratch/000_mask.png")
    save_mask(folder / "ground_truth/hole/000.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_category(tmp_path / "data/cable")
    save_category(tmp_path / "data/bottle", train=11)
    (tmp_path / "data/readme.txt").touch()
    return tmp_path / "data"


def test_mvtec_root_is_recognised(root: Path) -> None:
    found = scan(root)
    assert (found.layout, found.categories) == ("mvtec", ("bottle", "cable"))
    assert (len(found.train), len(found.test)) == (14, 8)
    assert not any(sample.is_anomalous for sample in found.train)


def test_one_category_is_recognised(root: Path) -> None:
    found = scan(root / "cable")
    assert (found.layout, found.categories) == ("category", ("cable",))
    cable = root / "cable"
    truth = cable / "ground_truth"
    assert found.test == (
        Sample(cable / "test/good/000.png", "cable", False),
        Sample(cable / "test/hole/000.jpg", "cable", True, "hole", truth / "hole/000.png"),
        Sample(
            cable / "test/scratch/000.png",
            "cable",
            True,
            "scratch",
            truth / "scratch/000_mask.png",
        ),
        Sample(cable / "test/scratch/001.png", "cable", True, "scratch", None),
    )


def test_one_category_has_its_folder_s_name_from_inside(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "cable" / "train")
    assert scan("..").categories == ("cable",)


def test_train_images_are_in_natural_order(root: Path) -> None:
    names = [sample.path.name for sample in scan(root, ["bottle"]).train]
    assert names == [f"{i}.png" for i in range(11)]


def test_categories_are_used_in_the_order_asked_for(root: Path) -> None:
    assert scan(root, ["cable", "bottle"]).categories == ("cable", "bottle")


def test_a_broken_category_that_is_not_used_does_no_harm(root: Path) -> None:
    shutil.rmtree(root / "cable" / "train")
    assert scan(root, ["bottle"]).categories == ("bottle",)


def test_images_directly_in_the_root_are_normal(tmp_path: Path) -> None:
    save(tmp_path / "nuts/10.PNG")
    save(tmp_path / "nuts/9.jpeg")
    save(tmp_path / "nuts/.hidden.png")
    (tmp_path / "nuts/notes.txt").touch()
    found = scan(tmp_path / "nuts")
    assert (found.layout, found.categories, found.test) == ("plain", ("nuts",), ())
    assert [sample.path.name for sample in found.train] == ["9.jpeg", "10.PNG"]


def test_plain_folder_with_defects_and_masks(tmp_path: Path) -> None:
    save(tmp_path / "nuts/good/1.png")
    bad = [save(tmp_path / f"nuts/bad/{name}.png") for name in ("1", "2", "3")]
    masks = [
        save_mask(tmp_path / "nuts/masks/1.png"),
        save_mask(tmp_path / "nuts/masks/2_mask.png"),
    ]
    found = scan(tmp_path / "nuts")
    assert [sample.path.parent.name for sample in found.train] == ["good"]
    assert found.test == tuple(
        Sample(path, "nuts", True, "bad", mask)
        for path, mask in zip(bad, [*masks, None], strict=True)
    )


def test_a_root_may_hold_plain_categories(tmp_path: Path) -> None:
    save(tmp_path / "a/good/1.png")
    save_category(tmp_path / "b")
    assert scan(tmp_path).categories == ("a", "b")


def test_another_mask_folder_can_be_named(root: Path) -> None:
    mask = save_mask(root / "cable/ground_truth_pixel/hole/000_mask.png")
    found = scan(root, ["cable"], mask_folder="ground_truth_pixel")
    assert [sample.mask_path for sample in found.test if sample.mask_path] == [mask]


def test_links_to_images_and_folders_are_followed(root: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked/train"
    linked.mkdir(parents=True)
    try:
        (linked / "good").symlink_to(root / "cable/train/good", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert len(scan(tmp_path / "linked").train) == 3


def test_a_dangling_link_is_named_when_read(tmp_path: Path) -> None:
    save(tmp_path / "nuts/1.png")
    try:
        (tmp_path / "nuts/2.png").symlink_to(tmp_path / "gone.png")
    except OSError:
        pytest.skip("this system makes no links")
    with pytest.raises(InputError, match=r"2\.png: cannot be read: No such file"):
        list(load_images(scan(tmp_path / "nuts").train, (8, 8)))


def test_good_in_capitals_is_no_defect(root: Path) -> None:
    (root / "cable/test/good").rename(root / "cable/test/Good")
    assert [s.is_anomalous for s in scan(root, ["cable"]).test].count(False) == 1


def break_missing(root: Path) -> Path:
    return root / "nowhere"


def break_file(root: Path) -> Path:
    return root / "readme.txt"


def break_empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def break_no_images(root: Path) -> Path:
    (root / "empty/deep").mkdir(parents=True)
    (root / "empty/a.gif").touch()
    return root / "empty"


def break_no_train(root: Path) -> Path:
    shutil.rmtree(root / "cable/train")
    return root / "cable"


def break_no_train_in_root(root: Path) -> Path:
    shutil.rmtree(root / "cable/train")
    return root


def break_empty_train(root: Path) -> Path:
    shutil.rmtree(root / "cable/train/good")
    (root / "cable/train/good").mkdir()
    return root


def break_train_is_flat(root: Path) -> Path:
    shutil.rmtree(root / "cable/train/good")
    save(root / "cable/train/0.png")
    return root


def break_train_has_defects(root: Path) -> Path:
    save(root / "cable/train/scratch/0.png")
    return root


def break_test_is_flat(root: Path) -> Path:
    save(root / "cable/test/7.png")
    return root


def break_test_is_a_file(root: Path) -> Path:
    shutil.rmtree(root / "cable/test")
    (root / "cable/test").touch()
    return root


def break_bad_is_empty(root: Path) -> Path:
    save(root / "plain/good/0.png")
    save(root / "plain/bad/deep/0.png")
    return root / "plain"


def break_good_and_loose(root: Path) -> Path:
    save(root / "plain/good/0.png")
    save(root / "plain/1.png")
    return root / "plain"


def break_mask_names(root: Path) -> Path:
    (root / "cable/ground_truth/hole/000.png").rename(root / "cable/ground_truth/hole/m0.png")
    return root


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"nowhere: expected a folder, it is missing; expected one of\n  <root>"),
        (break_file, r"readme\.txt: expected a folder, it is a file; expected one of\n  <root>"),
        (break_empty, r"empty: no images found, there is nothing; expected one of\n  <root>"),
        (break_no_images, r"empty: no images found, there is a\.gif, deep/; expected one of"),
        (break_no_train, r"cable.train: expected a folder, it is missing(.|\n)*train/good/"),
        (break_no_train_in_root, r"cable.train: expected a folder, it is missing"),
        (break_empty_train, r"train.good: category 'cable' has no normal images(.|\n)*train/good/"),
        (break_train_is_flat, r"cable.train: holds 0\.png beside good/(.|\n)*train/good/"),
        (break_train_has_defects, r"cable.train: holds scratch beside good/.*normal images only"),
        (break_test_is_flat, r"cable.test: 7\.png have no label(.|\n)*test/<defect>/"),
        (break_test_is_a_file, r"cable.test: expected a folder, it is a file"),
        (break_bad_is_empty, r"plain.bad: no images here, there is deep/"),
        (break_good_and_loose, r"plain: 1\.png lie beside good/"),
        (break_mask_names, r"hole: none of its 1 masks.*\n?.*expected 000_mask\.png or 000\.png"),
    ],
)
def test_rejects_what_is_no_layout(
    root: Path, damage: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        scan(damage(root))


def test_rejects_unknown_categories_with_the_nearest(root: Path) -> None:
    with pytest.raises(InputError, match=r"'botle'; did you mean 'bottle'\? It has bottle, cable"):
        scan(root, ["cable", "botle"])


def test_rejects_an_empty_choice_of_categories(root: Path) -> None:
    with pytest.raises(InputError, match="categories: expected at least one"):
        scan(root, [])


def test_rejects_a_mask_folder_that_is_nowhere(root: Path) -> None:
    with pytest.raises(InputError, match=r"mask_folder: no category of .* 'masks2'"):
        scan(root, mask_folder="masks2")


def samples_at(base: str, counts: dict[str, int]) -> list[Sample]:
    return [
        Sample(Path(base) / category / "train" / "good" / f"{i:03}.png", category, False)
        for category, count in counts.items()
        for i in range(count)
    ]


def test_split_is_a_partition_in_order() -> None:
    samples = samples_at("/data", {"a": 20, "b": 7})
    fit, holdout = split_holdout(samples, 0.3, seed=1)
    assert sorted([*fit, *holdout], key=samples.index) == samples
    assert list(fit) == [sample for sample in samples if sample in fit]
    assert list(holdout) == [sample for sample in samples if sample in holdout]


def test_split_takes_the_fraction_of_each_category() -> None:
    _, holdout = split_holdout(samples_at("/data", {"a": 20, "b": 7}), 0.3, seed=1)
    assert [sample.category for sample in holdout] == ["a"] * 6 + ["b"] * 2


def test_split_is_the_same_wherever_the_data_lies() -> None:
    here = split_holdout(samples_at("/data", {"a": 40, "b": 9}), 0.25, seed=3)
    there = split_holdout(samples_at("relative/copy", {"a": 40, "b": 9}), 0.25, seed=3)
    assert [s.path.name for s in here[1]] == [s.path.name for s in there[1]]


def test_split_is_the_same_on_every_machine() -> None:
    # Fixed by SHA-256 of "7:000.png" and so on: a change here changes everyone's hold-out.
    _, holdout = split_holdout(samples_at("/data", {"a": 10}), 0.3, seed=7)
    assert [sample.path.name for sample in holdout] == ["001.png", "003.png", "006.png"]


def test_split_depends_on_the_seed() -> None:
    samples = samples_at("/data", {"a": 40})
    assert split_holdout(samples, 0.5, seed=0) != split_holdout(samples, 0.5, seed=1)


def test_split_does_not_depend_on_the_order_of_the_samples() -> None:
    samples = samples_at("/data", {"a": 40})
    assert set(split_holdout(samples, 0.5, 0)[1]) == set(split_holdout(samples[::-1], 0.5, 0)[1])


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(1, 0.99, 0), (2, 0.99, 1), (5, 0.01, 1), (5, 0.0, 0), (10, 0.25, 3)],
)
def test_split_never_empties_the_fit_part(count: int, fraction: float, held: int) -> None:
    fit, holdout = split_holdout(samples_at("/data", {"a": count}), fraction, seed=0)
    assert (len(fit), len(holdout)) == (count - held, held)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_rejects_fractions_outside_0_to_1(fraction: float) -> None:
    with pytest.raises(InputError, match=r"fraction: expected a share in \[0, 1\)"):
        split_holdout(samples_at("/data", {"a": 2}), fraction, seed=0)


def masked(tmp_path: Path, mask: Image.Image, name: str = "mask.png") -> Sample:
    image = save(tmp_path / "image.png", mask.height, mask.width)
    mask.save(tmp_path / name)
    return Sample(image, "a", True, "hole", tmp_path / name)


MASK = RNG.random((23, 37)) < 0.3


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK.astype(np.uint16) * 256),
        Image.fromarray(np.dstack([0 * MASK, 0 * MASK, MASK, 0 * MASK + 255]).astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("P"),
    ],
    ids=["1-bit", "grey 1", "grey 255", "16-bit", "blue with alpha", "palette"],
)
def test_mask_is_whatever_is_not_black(tmp_path: Path, image: Image.Image) -> None:
    mask = read_mask(masked(tmp_path, image))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, MASK)


@pytest.mark.parametrize("size", [(23, 37), (11, 50), (64, 64), (1, 1)], ids=str)
def test_mask_is_resized_by_the_nearest_rule(tmp_path: Path, size: tuple[int, int]) -> None:
    sample = masked(tmp_path, Image.fromarray(MASK))
    rows = ((np.arange(size[0]) + 0.5) * 23 / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * 37 / size[1]).astype(int)
    np.testing.assert_array_equal(read_mask(sample, size), MASK[rows][:, columns])


@pytest.mark.parametrize(("size", "expected"), [(None, (8, 12)), ((5, 6), (5, 6))], ids=str)
def test_mask_of_a_normal_image_is_false(
    tmp_path: Path, size: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    mask = read_mask(Sample(save(tmp_path / "a.png"), "a", False), size)
    assert mask.shape == expected
    assert not mask.any()


def test_rejects_a_mask_of_another_size(tmp_path: Path) -> None:
    sample = masked(tmp_path, Image.fromarray(MASK))
    save(sample.path, 24, 37)
    with pytest.raises(
        InputError, match=r"mask\.png: mask of \[23, 37\].*\[24, 37\]: .*image\.png"
    ):
        read_mask(sample, (16, 16))


def test_rejects_a_damaged_mask(tmp_path: Path) -> None:
    sample = masked(tmp_path, Image.fromarray(MASK))
    (tmp_path / "mask.png").write_bytes((tmp_path / "mask.png").read_bytes()[:80])
    with pytest.raises(InputError, match=r"mask\.png: is damaged or truncated"):
        read_mask(sample)


def test_rejects_to_invent_a_mask(tmp_path: Path) -> None:
    sample = Sample(save(tmp_path / "a.png"), "a", True, "hole")
    with pytest.raises(InputError, match=r"a\.png: anomalous, without a mask"):
        read_mask(sample)


@pytest.fixture
def nuts(tmp_path: Path) -> tuple[Sample, ...]:
    for i in range(7):
        save(tmp_path / f"nuts/{i}.png", 20 + i, 30)
    return scan(tmp_path / "nuts").train


def as_pillow(path: Path) -> np.ndarray:
    bilinear = Image.Resampling.BILINEAR
    with Image.open(path) as image:
        # In two calls, because Pillow 13 orders the passes by the shape.
        return np.asarray(image.resize((10, image.height), bilinear).resize((10, 8), bilinear))


def test_batches_hold_all_images_in_order_as_pillow_resizes_them(nuts: tuple[Sample, ...]) -> None:
    batches = list(load_images(nuts, (8, 10), batch_size=3))
    assert [len(kept) for _, kept in batches] == [3, 3, 1]
    assert [sample for _, kept in batches for sample in kept] == list(nuts)
    expected = [as_pillow(sample.path) for sample in nuts]
    np.testing.assert_array_equal(np.concatenate([batch for batch, _ in batches]), expected)


def test_a_damaged_image_stops_the_loading_by_name(nuts: tuple[Sample, ...]) -> None:
    nuts[4].path.write_text("damaged")
    with pytest.raises(InputError, match=r"4\.png: is not an image"):
        list(load_images(nuts, (8, 8)))


def test_wide_images_take_the_declared_range(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2000, np.uint16)).save(tmp_path / "a.png")
    ((batch, _),) = load_images(scan(tmp_path).train, (4, 4), value_range=(0, 4000))
    assert (batch == 128).all()


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"size": (0, 8)}, {"value_range": (9, 1)}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_rejects_arguments_before_the_first_batch(
    nuts: tuple[Sample, ...], arguments: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="expected"):
        load_images(nuts, **{"size": (8, 8), **arguments})


def test_batches_do_not_share_memory(nuts: tuple[Sample, ...]) -> None:
    batches = [batch for batch, _ in load_images(nuts, (8, 8), batch_size=3)]
    assert not np.shares_memory(batches[0], batches[1])
