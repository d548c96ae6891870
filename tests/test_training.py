"""Training: what it reads, what it leaves, and that a kill or a cache changes nothing."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastad.errors import EngineError, InputError
from fastad.models import Method, build
from fastad.training import features as features_module
from fastad.training import fit as fit_module
from fastad.training import loop as loop_module
from fastad.training.checkpoint import load_checkpoint
from fastad.training.features import (
    EpochSampler,
    ImageData,
    cache_features,
    free_memory_bytes,
)
from fastad.training.fit import train
from fastad.training.folder import scan
from fastad.training.recipe import Recipe, TrainSettings, dump_recipe, load_recipe, shipped
from fastad.training.validation import Validation

CONFIG = {
    "backbone": {"name": "mobilenetv3_small_050", "taps": [1, 2]},
    "size": [48, 48],
    "fusion": "crad-s",
    "blocks": 1,
    "feature_scale": "auto",
}


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {"epochs": 4, "batch": 4, "lr": 1e-3, "groups": {"grid_lr": 0.1}}
    settings |= {"holdout": 0.25, "weight_decay": 0.01, "gradient_clip": 0.1}
    settings |= {"step_epochs": 2, "seed": 3}
    return Recipe("grad", TrainSettings(**(settings | changes)), CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories of eight noisy images each, and test images that training must not open."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for base, category in ((90, "dark"), (170, "light")):
        folder = root / category / "train" / "good"
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(rng.normal(base, 25, (60, 60, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        test = root / category / "test" / "hole"
        test.mkdir(parents=True)
        (test / "0.png").write_bytes(b"opening this file fails")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(data, run, recipe(), weights="random")
    return run


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run).method.state_dict()


def losses_of(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_leaves_a_checkpoint_without_pickle(run: Path) -> None:
    names = sorted(p.name for p in run.rglob("*") if p.is_file())
    assert names == ["metrics.csv", "model.json", "model.safetensors", "recipe.yaml"]
    assert len(losses_of(run)) == 4
    assert losses_of(run)[-1] < losses_of(run)[0]
    assert load_recipe(run / "recipe.yaml") == recipe()


def test_record_names_what_was_trained_on(run: Path) -> None:
    record = load_checkpoint(run).record
    assert record.spec.categories == ("dark", "light")
    assert (len(record.fit), len(record.holdout)) == (12, 4)
    assert not set(record.fit) & set(record.holdout)
    assert all("/train/good/" in name for name in record.fit + record.holdout)
    assert record.provenance["backbone_weights"] == "random"


def test_same_seed_same_weights(data: Path, run: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "again", recipe(), weights="random")
    first, second = weights_of(run), weights_of(tmp_path / "again")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_other_seed_other_weights(data: Path, run: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "other", recipe(seed=4), weights="random")
    first, second = weights_of(run), weights_of(tmp_path / "other")
    assert not torch.equal(first["local_table"], second["local_table"])


def test_resume_repeats_the_whole_run(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "SAVE_EVERY_S", 0.0)

    def stop(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train" and done == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(data, tmp_path / "run", recipe(), weights="random", report=stop)
    assert (tmp_path / "run" / "resume.safetensors").is_file()
    train(data, tmp_path / "run", recipe(), weights="random", resume=True)
    whole, resumed = weights_of(run), weights_of(tmp_path / "run")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert losses_of(tmp_path / "run") == losses_of(run)


def test_resume_after_sigkill(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(epochs=400)))
    script = (
        "import sys; from fastad.training import fit, loop; loop.SAVE_EVERY_S = 0.0; "
        "fit.train(sys.argv[1], sys.argv[2], sys.argv[3], weights='random')"
    )
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", script, str(data), str(run), str(path)])
    try:
        while not (run / "resume.safetensors").is_file():
            assert child.poll() is None
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    short = recipe(epochs=len(losses_of(run)) + 1)
    train(data, run, short, weights="random", resume=True)
    assert len(losses_of(run)) == short.train.epochs
    assert load_checkpoint(run).record.fit


def test_cached_features_equal_computed_ones(data: Path, tmp_path: Path) -> None:
    samples = scan(data).train
    method = build("grad", CONFIG, weights="random").eval()
    cached = cache_features(samples, method, "memory", tmp_path)
    direct = method.features(ImageData(samples, method).__getitems__(list(range(16))))
    assert torch.equal(cached.levels[0], direct[0])


def test_file_cache_equals_memory_and_is_deleted(data: Path, tmp_path: Path) -> None:
    samples = scan(data).train
    method = build("grad", CONFIG, weights="random").eval()
    memory = cache_features(samples, method, "memory", tmp_path)
    file = cache_features(samples, method, "file", tmp_path / "cache")
    assert torch.equal(memory.levels[0], file.levels[0])
    assert len(list((tmp_path / "cache").iterdir())) == 1
    file.close()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("cache", ["none", "file"])
def test_cache_does_not_change_the_loss_curve(
    data: Path, run: Path, tmp_path: Path, cache: str
) -> None:
    train(data, tmp_path / "run", recipe(cache=cache), weights="random")
    # Without cache the backbone sees shuffled batches: float32 rounding, grown over four epochs.
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(run), rtol=2e-3)


def test_learning_rate_falls_after_the_extra_epoch(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4])


def rates_of(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


COSINE: dict[str, object] = {"schedule": "cosine", "warmup": 0.25, "step_epochs": None}


def test_cosine_rises_and_falls_to_zero_step_by_step() -> None:
    settings = recipe(**COSINE).train  # 4 epochs of 3 steps, 3 of these 12 warm up
    rates = [settings.rate(step, 3) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[7] == pytest.approx(0.5)
    assert rates[11] == 0.0


def test_step_schedule_warms_up_by_steps() -> None:
    settings = recipe(warmup=0.25).train
    assert [settings.rate(step, 3) for step in range(12)] == pytest.approx(
        [0.25, 0.5, 0.75, *[1.0] * 6, *[0.1] * 3]
    )


def test_training_follows_the_cosine(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", recipe(**COSINE), weights="random")
    settings = recipe(**COSINE).train
    expected = [1e-3 * settings.rate(3 * epoch, 3) for epoch in range(4)]
    assert rates_of(tmp_path / "run") == pytest.approx(expected)


def test_resume_continues_the_cosine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "SAVE_EVERY_S", 0.0)
    train(data, tmp_path / "whole", recipe(**COSINE), weights="random")
    stopped_run(data, tmp_path / "run", recipe(**COSINE), epochs=2)
    train(data, tmp_path / "run", weights="random", resume=True)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert rates_of(tmp_path / "run") == rates_of(tmp_path / "whole")


@pytest.mark.parametrize("changes", [COSINE, {"warmup": 0.5}], ids=["cosine", "warmup"])
def test_resume_refuses_other_epochs_where_rates_follow_from_them(
    data: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    stopped_run(data, tmp_path / "run", recipe(**changes))
    with pytest.raises(InputError, match=r"was started with train\.epochs=4"):
        train(data, tmp_path / "run", recipe(**changes, epochs=6), weights="random", resume=True)


def test_refuses_steps_with_the_cosine() -> None:
    with pytest.raises(InputError, match=r"train\.step_epochs: expected none with schedule cosine"):
        load_recipe("grad.paper", ["train.schedule=cosine", "train.step_epochs=2"])


def test_refuses_a_used_folder(data: Path, run: Path) -> None:
    with pytest.raises(InputError, match="expected a new or empty folder"):
        train(data, run, recipe(), weights="random")


def stopped_run(data: Path, run: Path, settings: Recipe | None = None, epochs: int = 1) -> None:
    """A run that was killed after so many epochs."""

    def stop(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train" and done == epochs:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(data, run, settings or recipe(), weights="random", report=stop)


def test_resume_takes_the_runs_own_recipe(data: Path, tmp_path: Path) -> None:
    stopped_run(data, tmp_path / "run")
    train(data, tmp_path / "run", weights="random", resume=True)
    assert len(losses_of(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-2}, r"other recipe, so it cannot go on: train\.lr: 0\.001 then, 0\.01 now$"),
        (
            {"groups": {"grid_lr": 0.1, "more": 1.0}},
            r"train\.groups\.more: unset then, 1\.0 now$",
        ),
        ({"holdout": 0.5}, r"other recipe, .* train\.holdout: 0\.25 then, 0\.5 now$"),
    ],
)
def test_resume_refuses_other_settings(
    data: Path, tmp_path: Path, changes: dict[str, float], message: str
) -> None:
    stopped_run(data, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match=message):
        train(data, tmp_path / "run", recipe(**changes), weights="random", resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_resume_names_the_first_image_that_is_new(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    chosen = recipe(holdout=0.0)
    stopped_run(copy, tmp_path / "run", chosen)
    shutil.copyfile(data / "dark/train/good/0.png", copy / "dark/train/good/00.png")
    message = r"other images, .*: 16 then, 17 now, dark/train/good/00\.png only now$"
    with pytest.raises(InputError, match=message):
        train(copy, tmp_path / "run", chosen, weights="random", resume=True)


@pytest.mark.parametrize("epochs", [0, 4], ids=["refused later", "trained"])
def test_reads_the_recipe_of_its_own_folder(data: Path, tmp_path: Path, epochs: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe()))
    if epochs:
        train(data, run, run / "recipe.yaml", weights="random")
    else:
        with pytest.raises(InputError, match="greater than or equal to 1"):
            train(data, run, run / "recipe.yaml", weights="random", overrides=["train.epochs=0"])
    assert load_recipe(run / "recipe.yaml") == recipe()


def test_resume_removes_the_feature_cache_of_a_killed_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_run(data, run)
    (run / "features.killed.bin").write_bytes(b"large")
    (run / ".0123456789abcdef.partial").write_bytes(b"half")
    train(data, run, weights="random", resume=True)
    names = sorted(p.name for p in run.rglob("*") if p.is_file())
    assert names == ["metrics.csv", "model.json", "model.safetensors", "recipe.yaml"]


def test_starts_in_a_folder_where_a_run_was_killed_before_its_first_save(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.csv", "recipe.yaml", "features.killed.bin", ".0123.partial"):
        (run / name).write_bytes(b"left")
    train(data, run, recipe(epochs=1), weights="random")
    assert len(losses_of(run)) == 1
    assert not [p.name for p in run.iterdir() if p.name.startswith((".", "features"))]


def test_resume_refuses_fewer_epochs_than_are_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "SAVE_EVERY_S", 0.0)

    def stop(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train" and done == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(data, tmp_path / "run", recipe(), weights="random", report=stop)
    with pytest.raises(InputError, match=r"3 epochs are done, train\.epochs is 2"):
        train(data, tmp_path / "run", recipe(epochs=2), weights="random", resume=True)


def test_a_run_that_failed_at_once_can_be_repeated(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower the learning rate"):
        train(data, tmp_path / "run", recipe(lr=1e30, gradient_clip=0.0), weights="random")
    train(data, tmp_path / "run", recipe(epochs=1), weights="random")
    assert len(losses_of(tmp_path / "run")) == 1


def test_full_disk_leaves_no_feature_cache(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(EngineError, match="feature cache of"):
        train(data, tmp_path / "run", recipe(cache="file"), weights="random")
    assert not list((tmp_path / "run").iterdir())


def test_file_cache_needs_no_fallocate(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = scan(data).train
    method = build("grad", CONFIG, weights="random").eval()
    memory = cache_features(samples, method, "memory", tmp_path)
    monkeypatch.delattr("os.posix_fallocate", raising=False)  # as on Windows and macOS
    monkeypatch.setattr(features_module, "_ZEROS", bytes(1000))  # several blocks, the last shorter
    file = cache_features(samples, method, "file", tmp_path / "cache")
    assert file.file is not None
    assert file.file.stat().st_size == sum(4 * level.numel() for level in file.levels)
    assert torch.equal(memory.levels[0], file.levels[0])
    file.close()


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        ("1000000", "400000", None, 600000),
        ("1000000", "400000", "anon 50000\ninactive_file 300000\nactive_file 7", 900000),
        ("1000000", "1200000", "inactive_file 100000", 0),
        ("1000000", "400000", "anon 50000", 600000),
        ("max", "1", "inactive_file 0", None),
    ],
    ids=["without-stat", "page-cache", "full", "stat-without-files", "no-limit"],
)
def test_memory_of_a_container_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    used: str,
    stat: str | None,
    expected: int | None,
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    if stat is not None:
        (tmp_path / "memory.stat").write_text(f"{stat}\n")
    monkeypatch.setattr(features_module, "CGROUP", tmp_path)
    monkeypatch.setattr(features_module, "_system_free_bytes", lambda: 1 << 40)
    assert free_memory_bytes() == (1 << 40 if expected is None else expected)


def test_ctrl_c_reaches_the_caller(data: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", recipe(), weights="random", report=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "run" / "resume.safetensors").is_file()


EARLY = recipe(
    epochs=60, lr=0.5, gradient_clip=0.0, step_epochs=None, validation_fraction=0.3, patience=2
)


def test_patience_ends_training_with_the_best_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Validation.measure
    epochs: list[tuple[float, dict[str, torch.Tensor]]] = []

    def recorded(self: Validation, method: Method, device: torch.device) -> float:
        loss = measure(self, method, device)
        epochs.append((loss, {k: v.clone() for k, v in method.state_dict().items()}))
        return loss

    monkeypatch.setattr(Validation, "measure", recorded)
    train(data, tmp_path / "run", EARLY, weights="random")
    assert 3 <= len(losses_of(tmp_path / "run")) == len(epochs) < 60
    validation = [loss for loss, _ in epochs]
    assert min(validation) == validation[-3] < validation[-1]  # patience is 2
    saved, last = weights_of(tmp_path / "run"), epochs[-1][1]
    assert all(torch.equal(saved[k], v) for k, v in epochs[-3][1].items())
    assert not all(torch.equal(saved[k], v) for k, v in last.items())


def test_resume_does_not_train_on_after_patience(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path / "whole", EARLY, weights="random")

    def full(*_: object) -> None:
        raise EngineError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_checkpoint", full)
        with pytest.raises(EngineError, match="disk full"):
            train(data, tmp_path / "run", EARLY, weights="random")
    before = (tmp_path / "run" / "metrics.csv").read_text()
    train(data, tmp_path / "run", weights="random", resume=True)
    assert (tmp_path / "run" / "metrics.csv").read_text() == before
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_validation_sees_every_category(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for category in ("a", "b", "c"):
        folder = tmp_path / "data" / category / "train" / "good"
        folder.mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = {"epochs": 1, "holdout": 0.0, "validation_fraction": 0.5}
    done = train(tmp_path / "data", tmp_path / "run", recipe(**settings), weights="random")
    every = {f"{c}/train/good/{i}.png" for c in "abc" for i in range(24)}
    kept = sorted(every - set(done.record.fit))
    assert len(kept) == 20  # of the 36 asked for; the others are trained on
    assert {name[0] for name in kept} == set("abc")


@pytest.mark.parametrize("images", [7, 64, 65, 72, 127, 300])
def test_constants_are_fixed_on_images_of_the_whole_set(images: int) -> None:
    chosen = fit_module._spread(images, fit_module.ADAPT_IMAGES)
    assert len(set(chosen)) == len(chosen) == min(images, 64)
    assert chosen[0] == 0
    assert images - chosen[-1] <= -(-images // 64)


def test_never_trains_on_a_silently_random_backbone(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 'none'"):
        train(data, tmp_path / "run", recipe(), weights="none")


def test_refuses_to_resume_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        train(data, tmp_path / "none", recipe(), weights="random", resume=True)


def test_refuses_corrupt_training_images(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "dark" / "train" / "good" / "0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"0\.png"):
        train(copy, tmp_path / "run", recipe(holdout=0.0), weights="random")


def test_diverging_loss_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower the learning rate"):
        train(data, tmp_path / "run", recipe(lr=1e30, gradient_clip=0.0), weights="random")


def test_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = copy / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match="damaged"):
        load_checkpoint(copy)


def test_record_of_another_version_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = copy / "checkpoint" / "model.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"surprise": 1}))
    with pytest.raises(EngineError, match="surprise"):
        load_checkpoint(copy)


@pytest.mark.parametrize("epoch", [0, 5])
def test_sampler_repeats_an_epoch(epoch: int) -> None:
    first, second = EpochSampler(50, seed=1), EpochSampler(50, seed=1, first_epoch=epoch)
    first.set_epoch(epoch)
    assert list(first) == list(second)
    assert sorted(first) == list(range(50))


def test_sampler_visits_every_image_equally_often() -> None:
    indices = list(EpochSampler(7, seed=1, visits=3))
    assert sorted(indices) == sorted(list(range(7)) * 3)
    assert sorted(indices[:7]) == list(range(7))


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_read(name: str) -> None:
    assert load_recipe(name).train.epochs > 0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grad.papr", (), "did you mean grad.paper"),
        ("grad.paper", ("train.epochs=many",), "train.epochs"),
        ("grad.paper", ("train.speed=1",), "train.speed"),
        ("grad.paper", ("epochs",), "expected key=value"),
        ("grad.paper", ("method.x=1",), "is a value"),
        ("missing.yaml", (), "no file missing.yaml"),
        ("grad.paper", ("train.epochs=[",), "is not a YAML value"),
        ("grad.paper", ("train.epochs=0",), "greater than or equal to 1"),
        ("grad.paper", ("train.lr=-1",), "greater than 0"),
        ("grad.paper", ("train.step_epochs=0",), "greater than or equal to 1"),
        ("grad.paper", ("train.holdout=1",), "less than 1"),
    ],
)
def test_refuses_recipes(name: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(name, overrides)


def test_overrides_reach_the_recipe() -> None:
    changed = load_recipe("grad.paper", ["train.epochs=5", "config.backbone.name=resnet18"])
    assert changed.train.epochs == 5
    assert changed.config["backbone"] == {"name": "resnet18"}
